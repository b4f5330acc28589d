"""Where ranks find a live state again: in their own slots, or in another rank's, over the group."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from agent.slots import SlotRecord
from agent.training.collective import Group
from agent.training.restore import (
    Choice,
    Holding,
    ShardChoice,
    agreed,
    agreed_shards,
    choose,
    choose_shards,
)
from agent.training.shards import ShardLayout
from agent.training.transaction import Altered, StateLost, Transaction
from agent.training.zero import Zero1
from diagnostics.sensors.digest import digest

#: Hears, on every rank, which slots of each rank no longer hash to their records, before anything follows from it.
Tell = Callable[[Sequence[Sequence[Altered]]], None]


class Source(Protocol):
    """Live state. Every rank makes the same calls."""

    def recover(self, generation: int, tell: Tell) -> str | None:
        """Take the nearest state that can be trusted, as `generation`; gives "live" or "replica", None without one.

        Raises StateLost if what arrives is not what was sent, PeerLost.
        """

    def return_to(self, step: int, generation: int, tell: Tell) -> None:
        """Go back to `step`, the one before the committed one. Raises StateLost if nobody holds it unharmed."""


class WholeSource:
    """Each rank holds the whole state: any of them can give it to any other."""

    def __init__(self, group: Group, transaction: Transaction) -> None:
        self._group = group
        self._transaction = transaction

    def recover(self, generation: int, tell: Tell) -> str | None:
        """Holders adopt their slot, the others receive it."""
        held, altered = self._transaction.holdings()
        gathered = self._group.gather_objects(([_holding(r) for r in held], altered))
        tell([a for _, a in gathered])
        choice = choose([h for h, _ in gathered])
        if choice is None:
            return None
        self._take(choice, generation)
        return "live" if self._group.rank in choice.holders else "replica"

    def return_to(self, step: int, generation: int, tell: Tell) -> None:
        """From the other slot, whose bits still hash to its record."""
        held, altered = _sorted(self._transaction.previous())
        gathered = self._group.gather_objects((held, altered))
        tell([a for _, a in gathered])
        choice = agreed([h for h, _ in gathered], step)
        if choice is None:
            raise StateLost(f"no rank holds step {step} unharmed")
        self._take(choice, generation)

    def _take(self, choice: Choice, generation: int) -> None:
        state = choice.state
        record = SlotRecord(generation, state.step, state.digest, state.chain)
        if self._group.rank in choice.holders:
            self._transaction.adopt(_slot_of(self._transaction, state), record)
            if self._group.rank == choice.holders[0]:
                for rank in range(self._group.world):
                    if rank not in choice.holders:
                        self._group.send(self._transaction.state.words, rank)
            return
        self._transaction.slots.invalidate(0)
        words = self._transaction.slot_state(0).words
        self._group.receive(words, choice.holders[0])
        if digest(words) != state.digest:
            raise StateLost(f"step {state.step} arrived with other bits than rank {choice.holders[0]} has")
        self._transaction.adopt(0, record)


class ShardSource:
    """Each rank holds a shard, and a replica of that of the rank before it: any one of two neighbours can be lost."""

    def __init__(self, group: Group, transaction: Transaction, layout: ShardLayout, division: Zero1) -> None:
        self._group = group
        self._transaction = transaction
        self._layout = layout
        self._division = division

    def recover(self, generation: int, tell: Tell) -> str | None:
        """Lost shards come from their replicas, what all hold alike from anybody; then replicas are made anew."""
        held, altered = self._transaction.holdings()
        own = [_holding(r) for r in held]
        replicas = [_holding(r) for slot in (0, 1) if (r := self._verified_replica(slot))]
        gathered = self._group.gather_objects((own, replicas, altered))
        tell([a for *_, a in gathered])
        choice = choose_shards([o for o, *_ in gathered], [r for _, r, _ in gathered])
        if choice is None or not self._take(choice, generation):
            return None
        return "live" if self._group.rank in choice.holders else "replica"

    def return_to(self, step: int, generation: int, tell: Tell) -> None:
        """From the other slot of every rank, or its replica."""
        own, altered = _sorted(self._transaction.previous())
        replica = self._verified_replica(1 - self._transaction.current)
        gathered = self._group.gather_objects((own, [_holding(replica)] if replica else [], altered))
        tell([a for *_, a in gathered])
        choice = agreed_shards([o for o, *_ in gathered], [r for _, r, _ in gathered], step)
        if choice is None or not self._take(choice, generation):
            raise StateLost(f"the shards of step {step} are not all there, unharmed")

    def _verified_replica(self, slot: int) -> SlotRecord | None:
        """The slot's record, if the replica in it hashes to what it says."""
        record = self._transaction.slots.record(slot)
        if record is None or record.shard is None:
            return None
        found = self._layout.digest_replica(self._transaction.slot_state(slot))
        return record if found == record.shard.replica else None

    def _take(self, choice: ShardChoice, generation: int) -> bool:
        """Put the state together; False, on every rank, if that gave other bits than its record names."""
        rank, layout = self._group.rank, self._layout
        holds = rank in choice.holders
        slot = _slot_of(self._transaction, choice.state) if holds or rank in choice.keepers else 0
        if not holds:
            self._transaction.slots.invalidate(slot)
        state = self._transaction.slot_state(slot)
        for lacking in range(self._group.world):
            if lacking in choice.holders:
                continue
            keeper = (lacking + 1) % self._group.world
            self._give(state.replica, keeper, state.words[layout.unique], lacking)
            self._give(state.words[: layout.dense], choice.holders[0], state.words[: layout.dense], lacking)
            self._give(state.words[layout.tail :], choice.holders[0], state.words[layout.tail :], lacking)
        found, shard = self._division.settle(state)
        wanted = choice.state
        if not all(self._group.gather_objects(found == wanted.digest)):
            return False
        self._transaction.adopt(slot, SlotRecord(generation, wanted.step, wanted.digest, wanted.chain, shard))
        return True

    def _give(self, mine: Tensor, giver: int, target: Tensor, taker: int) -> None:
        if self._group.rank == giver:
            self._group.send(mine, taker)
        elif self._group.rank == taker:
            self._group.receive(target, giver)


def _sorted(found: SlotRecord | Altered | None) -> tuple[list[Holding], list[Altered]]:
    """What one slot holds, and whether it changed."""
    if isinstance(found, Altered):
        return [], [found]
    return ([_holding(found)] if found else []), []


def _holding(record: SlotRecord) -> Holding:
    return Holding(record.step, record.digest, record.chain)


def _slot_of(transaction: Transaction, state: Holding) -> int:
    """The slot whose record names `state`."""
    records = (transaction.slots.record(slot) for slot in (0, 1))
    return next(slot for slot, record in enumerate(records) if record is not None and _holding(record) == state)
