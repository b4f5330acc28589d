"""What a rank sent and received in a step's forward and backward, so that its part can be computed again by itself.

With expert parallelism a rank's gradients depend on what others sent it. A replay is given what was received, and is
compared with what was sent: it needs no other rank, and no corruption of another rank can reach it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.model.parallel import Transport
from agent.training.collective import PeerLost
from diagnostics.sensors.digest import digest
from diagnostics.sensors.multilinear import MASK

#: Mixed into the digest of a deviation: two replays that deviate at different exchanges must not look alike.
_PLACE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Passage:
    """One exchange: the digest of what was sent, and what was received."""

    sent: int
    received: Tensor


class Deviation(Exception):
    """A replay sent something else than the record says; `digest` stands for what, and where.

    Nothing after it can be compared: the ranks that received the recorded rows answered those.
    """

    def __init__(self, exchange: int, sent: int) -> None:
        super().__init__(f"exchange {exchange} sent other rows than recorded")
        self.digest = f"{(sent + (exchange + 1) * _PLACE) & MASK:016x}"


class Journal:
    """The exchanges of one forward and backward, in their order, which is the same on every rank of the group."""

    def __init__(self) -> None:
        self._sent: list[Tensor] = []
        self._received: list[Tensor] = []
        self._checks: list[int] = []
        self._position: Callable[[], int] = int
        #: Surrounds a live exchange, in which the rank waits for others.
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self._replayed: Sequence[Passage] | None = None

    def begin(self, position: Callable[[], int]) -> None:
        """Forget the last step; `position` tells how many checks have been made so far."""
        self._sent, self._received, self._checks = [], [], []
        self._position = position

    @property
    def made(self) -> int:
        """How many exchanges there have been in the step."""
        return len(self._checks)

    def clock(self, check: int) -> int:
        """How many exchanges came before the check of that number: what this rank may have learned from others."""
        return sum(made <= check for made in self._checks)

    def record(self) -> tuple[Passage, ...]:
        """All of it. Hashes what was sent, which only a held gate pays for."""
        return tuple(Passage(digest(s), r) for s, r in zip(self._sent, self._received, strict=True))

    @contextmanager
    def replaying(self, record: Sequence[Passage]) -> Iterator[None]:
        """Exchanges inside answer from `record`, and raise Deviation at the first that sends something else."""
        kept = (self._sent, self._received, self._checks)
        self._replayed = record
        try:
            yield
        finally:
            self._replayed = None
            self._sent, self._received, self._checks = kept

    def exchange(self, live: Transport | None, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """One exchange, live or from the record. Raises PeerLost, Deviation."""
        number = len(self._sent)
        self._checks.append(self._position())
        self._sent.append(rows)
        if self._replayed is not None:
            received = self._answer(number, rows, receive)
        else:
            with self.waiting():
                received = _live(live, rows, send, receive)
        self._received.append(received)
        return received

    def _answer(self, number: int, rows: Tensor, receive: Sequence[int]) -> Tensor:
        assert self._replayed is not None
        sent = digest(rows)
        if number >= len(self._replayed) or self._replayed[number].sent != sent:
            raise Deviation(number, sent)
        received = self._replayed[number].received
        if received.shape[0] != sum(receive) or received.dtype != rows.dtype:
            raise Deviation(number, sent)
        return received.clone()


@dataclass(frozen=True, slots=True)
class Wire:
    """A transport whose exchanges pass through a journal. Without a `live` one behind it, it can only be replayed."""

    journal: Journal
    world: int
    live: Transport | None = None

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows sorted by destination -> rows sorted by source, as `Transport` says. Raises PeerLost, Deviation."""
        return self.journal.exchange(self.live, rows, send, receive)


def _live(live: Transport | None, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    if live is None:
        raise PeerLost("an exchange outside of a replay, by a rank that is not in this group")
    try:
        return live.exchange(rows, send, receive)
    except (RuntimeError, torch.distributed.DistError) as error:
        raise PeerLost(f"exchange of expert parallelism: {error}") from error
