"""Ranks that each hold the whole state agree on what they are about to commit, or find out who is wrong.

All make the same update of the same state with the same sum, so their digests are one. Where they are not, each rank
looks at what it has once more, which no clean step pays for: the state it started from, whose digest was committed; the
sum, whose hash all compared at the gate; and the update of both, made again in another order and other chunks, so that
a device that is bad in one place or at one time contradicts itself.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.training.collective import Group
from agent.training.handed import Finding, Unlike
from diagnostics.health import Alarm
from diagnostics.sensors.multilinear import MASK, signed
from diagnostics.verify.between import Changed, Repeat

AT_REST = "at rest"


@dataclass(frozen=True, slots=True)
class Hashes:
    """64-bit hashes of what a rank updates from: the old state, and the sum (0: not known)."""

    state: int
    summed: int


@dataclass(frozen=True, slots=True)
class Again:
    """What a rank finds when it looks once more: its operands' hashes, and the digest of the update made again."""

    operands: Hashes
    made: int


def agree(group: Group, made: int, known: Hashes, look: Callable[[], Again]) -> None:
    """Compare `made`, the digest of the new state, over the ranks; every rank calls this after each update.

    `known` is what the operands must hash to. Raises Unlike on every rank, with a finding for each one that is wrong,
    and PeerLost.
    """
    with group.waiting():
        first = [row[0] & MASK for row in group.gather([signed(made)])]
    if len(set(first)) > 1:
        raise Unlike(findings(first, known, group.gather_objects(look())))


def findings(first: Sequence[int], known: Hashes, seen: Sequence[Again]) -> tuple[Finding, ...]:
    """Who is wrong, from the digests of the new state by rank, and what ranks see when they look again.

    A rank whose memory changed made its update of something else: it has no say about updates, which are judged once
    there is no such rank.
    """
    changed = [finding for rank, one in enumerate(seen) if (finding := _changed(rank, known, one.operands))]
    return tuple(changed) or _updates(first, tuple(one.made for one in seen))


def _changed(rank: int, known: Hashes, now: Hashes) -> Finding | None:
    """There is no tolerance, so the reading is infinite."""
    for sensor, what, was, found in (
        (AT_REST, "state", known.state, now.state),
        ("reduction", "sum", known.summed, now.summed),
    ):
        if was != found:
            alarm = Alarm(sensor, what, "digest", "step", math.inf, f"in the memory of rank {rank}")
            return Finding(rank, alarm, Changed(rank, what, was, found))
    return None


def _updates(first: Sequence[int], again: tuple[int, ...]) -> tuple[Finding, ...]:
    """One for each rank that did not make what most ranks make now; without a majority one, which stays undecided."""
    truth, count = Counter(again).most_common(1)[0]
    decided = 2 * count > len(again)
    found = []
    for rank in [rank for rank, made in enumerate(first) if made != truth] if decided else [0]:
        other = next(number for number, made in enumerate(first) if made != first[rank])
        alarm = Alarm("optimizer", "update", "adamw", "step", math.inf, f"of rank {rank}, beside rank {other}'s")
        found.append(Finding(rank, alarm, Repeat(rank, other, first[rank], first[other], again)))
    return tuple(found)
