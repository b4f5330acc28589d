"""Whose fault it is when what ranks handed each other is not what was given: by what each of them holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diagnostics.health import Verdict
from diagnostics.verify.votes import Ruling


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


def piece_ruling(source: Holder, destination: Holder, where: str = "an exchange") -> Ruling:
    """Judge a piece that did not arrive as it was announced; `source.first` was the announcement. `where` is told.

    What a device sent itself is its own fault. Else both ends keep what they sent and received. Whoever does not hash
    it as before is to blame; else it changed on its way between them, and no recomputation can tell whose network or
    memory it was: UNDECIDED, and it is sent again.
    """
    if source.device == destination.device:
        reason = f"in {where}: a piece changed on its way from {source.node} to itself"
        return Ruling(Verdict.CORRUPT, source.node, source.device, recurrent=False, needs=None, reason=reason)
    for end, what in ((source, "sent"), (destination, "received")):
        if end.again != end.first:
            reason = f"in {where}: what {end.node} {what} does not hash as it did: did not reproduce"
            return Ruling(Verdict.CORRUPT, end.node, end.device, recurrent=False, needs=None, reason=reason)
    if source.first == destination.first:
        told = f"in {where}: the hash of a piece changed on its way from {source.node} to {destination.node}"
    else:
        told = f"in {where}: a piece changed on its way from {source.node} to {destination.node}"
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


def handed_ruling(handed: Handed, members: Sequence[tuple[str, str]], where: str = "an exchange") -> Ruling:
    """Judge a part of a state that arrived otherwise; `members` are the ranks' nodes and devices, in rank order."""
    node, device = members[handed.holder]
    if handed.alone:
        reason = f"in {where}: {node} alone does not hold what all were sent"
        return Ruling(Verdict.CORRUPT, node, device, recurrent=False, needs=None, reason=reason)
    return piece_ruling(
        Holder(*members[handed.source], handed.written, handed.written_again),
        Holder(node, device, handed.held, handed.held_again),
        where,
    )


#: What a part of a sum was when it was not what it should be: given to be summed, added up, handed to the others.
GIVEN, ADDED, GATHERED = "given", "added", "gathered"


@dataclass(frozen=True, slots=True)
class Summed:
    """A part of a sum over ranks that its holder has otherwise than its source announced; `what`: see above.

    Of what was ADDED otherwise than before, source and holder are the rank that added.
    """

    what: str
    piece: Handed


def sum_rulings(parts: Sequence[Summed], members: Sequence[tuple[str, str]]) -> list[tuple[int, Ruling]]:
    """Judge a sum over ranks by the parts of it that are wrong: every rank to blame, with its ruling.

    Who added otherwise than before, or does not hash as before what it gave or holds, is CORRUPT. What is left changed
    between two ranks. If it is several parts and one rank is an end of each, that one is CORRUPT. A single part of the
    sum that one rank holds otherwise, though its owner and everybody else stand by it, is that rank's. Where else it
    was on its way nobody can tell: UNDECIDED, about the first holder. `members` are the ranks' nodes and devices.
    """
    found: dict[int, Ruling] = {}
    for part in parts:
        if (rank := _at_fault(part)) is not None:
            found.setdefault(rank, _of_end(part, members))
    rest = [part for part in parts if not found.keys() & _ends(part)]
    if rest:
        found.update([_on_its_way(rest, members)])
    return list(found.items())


def _at_fault(part: Summed) -> int | None:
    """The end that its own words convict."""
    piece = part.piece
    if piece.source == piece.holder or piece.written != piece.written_again:
        return piece.source
    return piece.holder if piece.held != piece.held_again else None


def _of_end(part: Summed, members: Sequence[tuple[str, str]]) -> Ruling:
    node, device = members[part.piece.holder]
    if part.what == ADDED:
        reason = f"in the reduction: what {node} added up is not the sum when it adds again: did not reproduce"
    elif part.piece.source == part.piece.holder:  # it was sent nowhere
        what = f"the part of the sum that {node} made" if part.what == GATHERED else f"what {node} gave itself to add"
        reason = f"in the reduction: {what} changed in its memory"
    else:
        return handed_ruling(part.piece, members, "the reduction")
    return Ruling(Verdict.CORRUPT, node, device, recurrent=False, needs=None, reason=reason)


def _on_its_way(parts: Sequence[Summed], members: Sequence[tuple[str, str]]) -> tuple[int, Ruling]:
    """Of parts whose ends both stand by their hashes."""
    first = parts[0].piece
    shared = set.intersection(*map(_ends, parts))
    if len(shared) == 1:
        (rank,) = shared
        node, device = members[rank]
        reason = f"in the reduction: {len(parts)} pieces changed on their way, and {node} is an end of each"
    elif len(parts) == 1 and parts[0].what == GATHERED and first.written != first.held:
        rank = first.holder
        node, device = members[rank]
        reason = f"in the reduction: {node} alone does not hold the sum that its owner made"
    else:
        return first.holder, handed_ruling(first, members, "the reduction")
    return rank, Ruling(Verdict.CORRUPT, node, device, recurrent=False, needs=None, reason=reason)


def _ends(part: Summed) -> set[int]:
    return {part.piece.source, part.piece.holder}


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
