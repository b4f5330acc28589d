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


def choose(holdings: Sequence[Sequence[Holding]]) -> Choice | None:
    """Choose from all ranks' holdings, given in rank order; None means that no live state can be trusted.

    Living ranks are at most one step apart, so a rank whose newest state is more than one step behind the newest of
    all holds a left-over and is not asked. Of the others the one furthest behind decides: the step it committed last
    was agreed at the gate by everybody who is ahead. If the holders of that step differ, the strict majority counts;
    without one the step before is tried.
    """
    newest = [max((h.step for h in held), default=-1) for held in holdings]
    front = max(newest)
    if front < 0:
        return None
    step = min(n for n in newest if n >= front - 1)
    for candidate in (step, step - 1):
        if choice := _agreed(holdings, candidate):
            return choice
    return None


def _agreed(holdings: Sequence[Sequence[Holding]], step: int) -> Choice | None:
    held = {rank: h for rank, have in enumerate(holdings) for h in have if h.step == step}
    if not held:
        return None
    state, count = Counter(held.values()).most_common(1)[0]
    if 2 * count <= len(held):
        return None
    return Choice(state, tuple(rank for rank, h in held.items() if h == state))
