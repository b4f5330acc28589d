"""The step transaction over two slots: what is committed, the commit itself, and the way back by one step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from agent.slots import SlotRecord, Slots
from agent.training.division import Division
from agent.training.layout import State, StateLayout
from agent.training.optimizer import AdamW, Pass

#: Words of the meta region in use.
SEED, STEP, SAMPLES, RNG = range(4)
#: (previous chain, step, state digest) -> the next link.
LinkOf = Callable[[int, int, int], int]


class StateLost(RuntimeError):
    """Neither slot holds a state that can be gone on from."""


@dataclass(frozen=True, slots=True)
class Altered:
    """A slot whose words, which hashed to its record when that was written, hash to `now`: memory changed."""

    record: SlotRecord
    now: int


@dataclass(frozen=True, slots=True)
class Commit:
    """What a commit needs besides the gradients: all of it is the same on every rank.

    `biases` makes the router's, float32 [MoE layers, experts], after the step from those before it.
    """

    generation: int
    step: int
    lr: float
    coefficient: float
    samples: int
    biases: Callable[[Tensor], Tensor]
    key: int | None = None  # what its checks are drawn from; None: unchecked


class Transaction:
    """Reads the committed slot, writes the other, commits by one store.

    Invariants: the committed slot is never written; between two commits the other slot holds the step before, or is
    marked invalid while it is being written.
    """

    def __init__(self, slots: Slots, layout: StateLayout, alone: bool = False) -> None:
        self.slots = slots
        self.layout = layout
        self._alone = alone
        self._states = (layout.view(slots.state(0)), layout.view(slots.state(1)))

    @property
    def current(self) -> int:
        """The committed slot's number. Raises StateLost before there is one."""
        slot = self.slots.committed
        if slot is None:
            raise StateLost(f"{self.slots.path} holds no committed state")
        return slot

    @property
    def record(self) -> SlotRecord:
        """What is committed."""
        record = self.slots.record(self.current)
        if record is None:
            raise StateLost(f"{self.slots.path} lost its committed record")
        return record

    @property
    def state(self) -> State:
        """The committed state."""
        return self._states[self.current]

    def slot_state(self, slot: int) -> State:
        """The state in one slot, whatever it holds."""
        return self._states[slot]

    def commit(
        self, gradients: Tensor, settings: AdamW, change: Commit, link: LinkOf, division: Division
    ) -> SlotRecord:
        """Apply the summed `gradients` and commit; returns the new record.

        What a division raises leaves the committed slot as it was.
        """
        source = self.current
        target = 1 - source
        old, new = self._states[source], self._states[target]
        before = self.record
        self.slots.invalidate(target)
        replica = 0 if before.shard is None else before.shard.replica
        applied = Pass(change.step, change.lr, change.coefficient, settings, change.key, before.digest, replica)
        state_digest, shard = division.advance(old, new, gradients, applied, lambda: self._beside(old, new, change))
        chained = link(before.chain, change.step, state_digest)
        record = SlotRecord(change.generation, change.step, state_digest, chained, shard)
        self.slots.write_record(target, record)
        self.slots.commit(target)
        return record

    def _beside(self, old: State, new: State, change: Commit) -> None:
        """Write what no gradient updates: the router's biases, and what the state says of itself."""
        new.router_bias.copy_(old.router_bias)
        rows = self.layout.bias_rows(new.router_bias)
        rows.copy_(change.biases(self.layout.bias_rows(old.router_bias)))
        new.meta.copy_(old.meta)
        new.meta[STEP] = change.step
        new.meta[SAMPLES] += change.samples
        new.meta[RNG] = change.step

    def own(self, look: bool = False) -> int:
        """Digest of this rank's words of the committed state: as they are now, where nobody else updates them.

        What one rank of a mesh holds, or the only rank of a job, no other can contradict: a bit that changed in its
        memory would spread to all alike. Where several ranks have the whole, the digests after the next update tell,
        and it is the committed one, unless there is reason to `look`.
        """
        record = self.record
        shared = record.shard is None and not self._alone
        return record.digest if shared and not look else self.layout.digest(self.state)

    def adopt(self, slot: int, record: SlotRecord) -> None:
        """Make `slot`, whose contents are complete, the committed one, and distrust the other."""
        self.slots.write_record(slot, record)
        self.slots.commit(slot)
        self.slots.invalidate(1 - slot)

    def previous(self) -> SlotRecord | Altered | None:
        """The step before the committed one, as its slot has it."""
        return self.look(1 - self.current)

    def look(self, slot: int) -> SlotRecord | Altered | None:
        """The slot's record, if its contents hash to it now; None if it is empty or was being written."""
        record = self.slots.record(slot)
        if record is None:
            return None
        now = self.layout.digest(self._states[slot])
        return record if now == record.own else Altered(record, now)

    def holdings(self) -> tuple[list[SlotRecord], list[Altered]]:
        """What both slots hold, contents verified. A rank whose committed slot changed trusts none of its memory."""
        committed = self.slots.committed
        if committed is None:
            return [], []
        found = [self.look(slot) for slot in (0, 1)]
        altered = [one for one in found if isinstance(one, Altered)]
        held = [one for one in found if isinstance(one, SlotRecord)]
        return ([] if isinstance(found[committed], Altered) else held), altered
