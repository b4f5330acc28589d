"""Whose fault it is when what ranks handed each other is not what was given: by what each of them holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diagnostics.health import Verdict
from diagnostics.verify.votes import Ruling


@dataclass(frozen=True, slots=True)
class Copy:
    """One rank's copy of a sum over all ranks: the worst reading of its checksum, and its hash (0: not comparable)."""

    node: str
    device: str
    reading: float
    hash: int

    @property
    def sound(self) -> bool:
        """Whether it is the sum of what the ranks gave, as far as the checksum sees."""
        return self.reading <= 1.0


def sum_ruling(copies: Sequence[Copy]) -> tuple[Ruling, int]:
    """Judge a sum that alarmed, or of which ranks hold different copies, given in rank order; and the rank it is about.

    Where all ranks receive the same sum, a single copy that is not like the others is its device's. Votes cannot tell:
    every rank computes its part again as it did. Where all copies are wrong alike, or each rank receives another part
    of the sum, others had a hand in it: UNDECIDED, naming the rank whose sum is wrong, and the redo sums anew.
    """
    wrong = _wrong(copies)
    lead = wrong[0] if wrong else 0
    if len(wrong) == 1 and len({copy.hash for copy in copies}) > 1:
        odd = copies[lead]
        others = "the other copies are what was summed" if not odd.sound else "all others are alike"
        reason = f"in the reduction: {odd.node}'s copy of the sum differs, {others}"
        return Ruling(Verdict.CORRUPT, odd.node, odd.device, recurrent=False, needs=None, reason=reason), lead
    return Ruling(Verdict.UNDECIDED, None, None, recurrent=False, needs=None, reason=_undecided(copies, wrong)), lead


def _wrong(copies: Sequence[Copy]) -> list[int]:
    """Ranks whose copy is not the sum; by the checksum, and where it sees nothing, by the majority of equal copies."""
    unsound = [rank for rank, copy in enumerate(copies) if not copy.sound]
    if unsound:
        return unsound
    held, count = Counter(copy.hash for copy in copies).most_common(1)[0]
    return [rank for rank, copy in enumerate(copies) if copy.hash != held] if 2 * count > len(copies) else []


def _undecided(copies: Sequence[Copy], wrong: Sequence[int]) -> str:
    if not wrong:
        return (
            "in the reduction: copies of the sum differ by less than their checksum sees, and none is in the majority"
        )
    names = ", ".join(copies[rank].node for rank in wrong)
    if len(wrong) == len(copies):
        return "in the reduction: no rank holds the sum of what the ranks gave"
    return f"in the reduction: what {names} holds is not the sum of what the ranks gave"


def tokens_ruling(deviating: Mapping[int, tuple[str, str]], first: int) -> tuple[Ruling, int]:
    """Judge tokens that did not come to the experts that were chosen, though each piece arrived as it was sent.

    `deviating` are the ranks, with node and device, that send other rows when they compute their part again; `first` is
    the first rank of their group, which the ruling is about if not one of them alone does.
    """
    if len(deviating) == 1:
        ((rank, (node, device)),) = deviating.items()
        reason = f"tokens went astray: {node} sent other rows than it does again: did not reproduce"
        return Ruling(Verdict.CORRUPT, node, device, recurrent=False, needs=None, reason=reason), rank
    who = "no rank" if not deviating else f"{len(deviating)} ranks"
    reason = f"tokens went astray, and {who} of the group would send other rows again"
    return Ruling(Verdict.UNDECIDED, None, None, recurrent=False, needs=None, reason=reason), first


@dataclass(frozen=True, slots=True)
class Holder:
    """One end of an exchange: the hash of a piece as it was taken in the step, and taken again from what is kept."""

    node: str
    device: str
    first: int
    again: int


def piece_ruling(source: Holder, destination: Holder) -> Ruling:
    """Judge a piece that did not arrive as it was announced; `source.first` was the announcement.

    What a device sent itself is its own fault. Else both ends keep what they sent and received. Whoever does not hash
    it as before is to blame; else it changed on its way between them, and no recomputation can tell whose network or
    memory it was: UNDECIDED, and it is sent again.
    """
    if source.device == destination.device:
        reason = f"in an exchange: a piece changed on its way from {source.node} to itself"
        return Ruling(Verdict.CORRUPT, source.node, source.device, recurrent=False, needs=None, reason=reason)
    for end, what in ((source, "sent"), (destination, "received")):
        if end.again != end.first:
            reason = f"in an exchange: what {end.node} {what} does not hash as it did: did not reproduce"
            return Ruling(Verdict.CORRUPT, end.node, end.device, recurrent=False, needs=None, reason=reason)
    if source.first == destination.first:
        told = f"in an exchange: the hash of a piece changed on its way from {source.node} to {destination.node}"
    else:
        told = f"in an exchange: a piece changed on its way from {source.node} to {destination.node}"
    return Ruling(Verdict.UNDECIDED, None, None, recurrent=False, needs=None, reason=told)


@dataclass(frozen=True, slots=True)
class Handed:
    """One part that arrived otherwise than its source wrote it, with each end's digest then and now.

    `alone` says that others received the same part, and hold what was written.
    """

    source: int
    holder: int
    written: int
    written_again: int
    held: int
    held_again: int
    alone: bool


def handed_ruling(handed: Handed, members: Sequence[tuple[str, str]]) -> Ruling:
    """Judge a part of a state that arrived otherwise; `members` are the ranks' nodes and devices, in rank order."""
    node, device = members[handed.holder]
    if handed.alone:
        reason = f"in an exchange: {node} alone does not hold what all were sent"
        return Ruling(Verdict.CORRUPT, node, device, recurrent=False, needs=None, reason=reason)
    return piece_ruling(
        Holder(*members[handed.source], handed.written, handed.written_again),
        Holder(node, device, handed.held, handed.held_again),
    )


@dataclass(frozen=True, slots=True)
class Changed:
    """Something in one rank's memory that no longer hashes to what it did, the same on all ranks."""

    holder: int
    what: str
    was: int
    now: int


def changed_ruling(changed: Changed, members: Sequence[tuple[str, str]]) -> Ruling:
    """Judge memory that changed: it is the device's that holds it; `members` are nodes and devices in rank order."""
    node, device = members[changed.holder]
    reason = f"in memory: the {changed.what} of {node} hashes to {changed.now:016x}, it was {changed.was:016x}"
    return Ruling(Verdict.CORRUPT, node, device, recurrent=False, needs=None, reason=reason)


@dataclass(frozen=True, slots=True)
class Repeat:
    """An update, or a block of one, that another rank made otherwise: digests of what each made of the same operands.

    `wrote` is what the owner had written, `made` what the rank that checked it got, `again` what all got afterwards,
    by rank.
    """

    owner: int
    checker: int
    wrote: int
    made: int
    again: tuple[int, ...]


def update_ruling(repeat: Repeat, members: Sequence[tuple[str, str]]) -> Ruling:
    """Judge an update by the strict majority of the ranks; `members` are their nodes and devices.

    With two ranks it takes both. If they differ again, the one that does not make what it made before is to blame; if
    both stand by theirs, there is nobody to say who is right.
    """
    truth, count = Counter(repeat.again).most_common(1)[0]
    if count < 2 or 2 * count <= len(repeat.again):
        firsts = ((repeat.owner, repeat.wrote), (repeat.checker, repeat.made))
        fickle = [rank for rank, first in firsts if first != repeat.again[rank]]
        if len(repeat.again) == 2 and len(fickle) == 1:
            node, device = members[fickle[0]]
            reason = f"in the optimizer: {node} makes another update than it did of the same operands"
            return Ruling(Verdict.CORRUPT, node, device, recurrent=False, needs=None, reason=reason)
        reason = "in the optimizer: devices differ in the same update, and there is no majority"
        return Ruling(Verdict.UNDECIDED, None, None, recurrent=False, needs=None, reason=reason)
    for rank, first in ((repeat.owner, repeat.wrote), (repeat.checker, repeat.made)):
        if first != truth:
            stays = repeat.again[rank] != truth
            node, device = members[rank]
            what = "differs again" if stays else "did not reproduce"
            reason = f"in the optimizer: {count} of {len(repeat.again)} devices make another update than {node}: {what}"
            return Ruling(Verdict.CORRUPT, node, device, recurrent=stays, needs=None, reason=reason)
    reason = f"in the optimizer: {members[repeat.checker][0]}'s comparison did not reproduce"
    return Ruling(Verdict.CORRUPT, *members[repeat.checker], recurrent=False, needs=None, reason=reason)
