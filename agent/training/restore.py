"""Which state a new generation goes on from: a pure choice from what the ranks' slots hold."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Holding:
    """A state some slot holds, its contents just hashed and found equal to its record."""

    step: int
    digest: int
    chain: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The state to go on from, and the ranks that hold it; the others receive it from the first of them."""

    state: Holding
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardChoice:
    """The state to go on from; the ranks that hold their own shard of it, and those that hold the replica of another's.

    Invariant: each rank's shard is with itself or, as a replica, with the rank after it.
    """

    state: Holding
    holders: tuple[int, ...]
    keepers: tuple[int, ...]


def choose(holdings: Sequence[Sequence[Holding]]) -> Choice | None:
    """Choose from all ranks' holdings, given in rank order; None means that no live state can be trusted.

    Living ranks are at most one step apart, so a rank whose newest state is more than one step behind the newest of
    all holds a left-over and is not asked. Of the others the one furthest behind decides: the step it committed last
    was agreed at the gate by everybody who is ahead. If the holders of that step differ, the strict majority counts;
    without one the step before is tried.
    """
    for candidate in _candidates(holdings):
        if choice := agreed(holdings, candidate):
            return choice
    return None


def choose_shards(own: Sequence[Sequence[Holding]], replicas: Sequence[Sequence[Holding]]) -> ShardChoice | None:
    """As `choose`, where each rank has a shard of its own and a replica of that of the rank before it.

    None also where a rank and the one that keeps its replica are both lost.
    """
    for candidate in _candidates(own):
        if choice := agreed_shards(own, replicas, candidate):
            return choice
    return None


def agreed_shards(
    own: Sequence[Sequence[Holding]], replicas: Sequence[Sequence[Holding]], step: int
) -> ShardChoice | None:
    """The state of `step`, if the majority of the ranks' own records names it and all its shards are there."""
    choice = agreed(own, step)
    if choice is None:
        return None
    keepers = tuple(rank for rank, held in enumerate(replicas) if choice.state in held)
    kept = {(rank - 1) % len(replicas) for rank in keepers}
    if kept | set(choice.holders) != set(range(len(own))):
        return None
    return ShardChoice(choice.state, choice.holders, keepers)


def _candidates(holdings: Sequence[Sequence[Holding]]) -> tuple[int, ...]:
    """Steps to go on from, the best first."""
    newest = [max((h.step for h in held), default=-1) for held in holdings]
    front = max(newest)
    if front < 0:
        return ()
    step = min(n for n in newest if n >= front - 1)
    return step, step - 1


def agreed(holdings: Sequence[Sequence[Holding]], step: int) -> Choice | None:
    """The state of `step` that the strict majority of those who hold one holds."""
    held = {rank: h for rank, have in enumerate(holdings) for h in have if h.step == step}
    if not held:
        return None
    state, count = Counter(held.values()).most_common(1)[0]
    if 2 * count <= len(held):
        return None
    return Choice(state, tuple(rank for rank, h in held.items() if h == state))
