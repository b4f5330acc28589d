"""What a rank needs to compute another rank's part of a held step: its shard of the state, and what it received."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from agent.training.collective import Group
from agent.training.engine import Engine
from agent.training.journal import Passage
from agent.training.layout import State
from agent.training.shards import ShardLayout


class Roles:
    """Lets ranks act as a suspect. Without a mesh every rank has all it needs for that, and nothing is exchanged.

    A suspect's experts are taken from the replica that the next rank keeps, not from the suspect, whose memory may be
    what is wrong. What it received comes from the suspect; the record says what it sent, too, and a replay is compared
    with that, so rows received are the only thing believed.
    """

    def __init__(self, engine: Engine, group: Group) -> None:
        self.engine = engine
        self.group = group
        self._mesh = engine.spec.mesh
        self._record: tuple[Passage, ...] | None = None
        self._experts: Tensor | None = None

    @property
    def record(self) -> tuple[Passage, ...]:
        """What the suspect exchanged with others in the step; empty where nothing is, or before it was handed over."""
        return self._record or ()

    def close(self) -> None:
        """Forget the last suspect."""
        self._record = self._experts = None

    def hand_over(self, state: State, replica: int, suspect: int, voter: int) -> bool:
        """Bring the suspect's record and experts to the voter; False, on every rank, if that cannot be done.

        It cannot where the replica of the experts does not hash to `replica` any more: a vote from it would be one
        about the memory it lies in. Every rank calls this, but for a suspect's own vote, which needs no other.
        Raises PeerLost.
        """
        if self._mesh is None:
            return True
        if self._record is None and self.group.rank == suspect:
            self._record = self.engine.journal.record()
        if voter == suspect:
            return True
        if not self._intact(state, replica, suspect):
            return False
        self._hand_record(suspect, voter)
        self._hand_experts(state, suspect, voter)
        return True

    def _intact(self, state: State, replica: int, suspect: int) -> bool:
        """Whether the rank after the suspect still has the replica it was given."""
        layout = self.engine.layout
        assert isinstance(layout, ShardLayout)
        keeps = self.group.rank == self._keeper(suspect)
        sound = layout.digest_replica(state) == replica if keeps else True
        return bool(self.group.gather([int(sound)])[self._keeper(suspect)][0])

    def _keeper(self, suspect: int) -> int:
        return (suspect + 1) % self.group.world

    @contextmanager
    def acting(self, state: State, suspect: int) -> Iterator[Engine]:
        """An engine bound to the suspect's parameters, whose exchanges answer from its record."""
        if self._mesh is None:
            yield self.engine
            return
        assert self._record is not None
        engine = self.engine.acting(suspect)
        if engine is not self.engine:
            engine.bind(self._borrowed(engine, state))
        with engine.journal.replaying(self._record):
            yield engine

    def _borrowed(self, engine: Engine, state: State) -> State:
        """A state of which only parameters and biases count: ours, with the suspect's experts."""
        assert isinstance(engine.layout, ShardLayout)
        assert self._experts is not None
        borrowed = engine.layout.view(memoryview(bytearray(engine.layout.nbytes)))
        borrowed.parameters[: engine.layout.dense].copy_(state.parameters[: engine.layout.dense])
        borrowed.parameters[engine.layout.dense :].copy_(self._experts)
        borrowed.router_bias.copy_(state.router_bias)
        return borrowed

    def _hand_record(self, suspect: int, voter: int) -> None:
        told = None
        if self.group.rank == suspect:
            assert self._record is not None
            told = [(p.sent, str(p.received.dtype)[6:], tuple(p.received.shape)) for p in self._record]
        described = self.group.gather_objects(told)[suspect]
        if self.group.rank == suspect:
            for passage in self._record or ():
                self._send(passage.received, voter)
        elif self.group.rank == voter:
            received = [self._receive(getattr(torch, dtype), shape, suspect) for _, dtype, shape in described]
            self._record = tuple(Passage(sent, rows) for (sent, _, _), rows in zip(described, received, strict=True))

    def _hand_experts(self, state: State, suspect: int, voter: int) -> None:
        layout = self.engine.layout
        assert isinstance(layout, ShardLayout)
        keeper = self._keeper(suspect)
        if self.group.rank == keeper:
            self._experts = layout.replica_experts(state)
        if voter == keeper:
            return
        if self.group.rank == keeper:
            self.group.send(layout.replica_experts(state), voter)
        elif self.group.rank == voter:
            self._experts = torch.empty(layout.expert)
            self.group.receive(self._experts, keeper)

    def _send(self, rows: Tensor, to: int) -> None:
        if rows.numel():
            self.group.send(rows.contiguous().view(torch.uint8), to)

    def _receive(self, dtype: torch.dtype, shape: tuple[int, ...], source: int) -> Tensor:
        rows = torch.empty(shape, dtype=dtype)
        if rows.numel():
            self.group.receive(rows.view(torch.uint8), source)
        return rows
