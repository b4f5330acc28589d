"""A held step is heard: every suspect is judged before anything follows from a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agent.training.collective import Group
from agent.training.gate import Outcome
from agent.training.handed import Finding
from agent.training.held import Held
from agent.training.replay import Daemon, Judged, Replayer
from agent.training.seals import Garbled
from diagnostics.health import Verdict
from diagnostics.verify.between import (
    Changed,
    Handed,
    Holder,
    changed_ruling,
    handed_ruling,
    piece_ruling,
    sum_rulings,
    tokens_ruling,
    update_ruling,
)
from diagnostics.verify.votes import Ruling


@dataclass(frozen=True, slots=True)
class Told:
    """What one rank says of its part in a held step: how it alarmed, if it did, and a hash of its copy of the sum."""

    sensors: bool
    garbled: Garbled | None
    strays: bool
    copy: int


class Hearing:
    """Brings the suspects of a held step to their verdicts. Every rank makes the same calls."""

    def __init__(self, replayer: Replayer, group: Group, daemon: Daemon) -> None:
        self._replayer = replayer
        self._group = group
        self._daemon = daemon

    def hear(self, held: Held, outcome: Outcome) -> tuple[str, list[Judged]]:
        """Judge all suspects, then say what was found; returns the trace of the last one, which the redo belongs to.

        Verdicts may end the generation, so the first is said when the last is known, and what ends most is said last:
        that the software is to blame, and only if no device turned out to be.
        """
        held = replace(held, reason=outcome.reason, overflowed=outcome.overflowed)
        traces: dict[int, str] = {}
        heard = []
        for suspect, ruling in self._cases(held, outcome):
            traces[suspect] = self.begin_trace(suspect, "alarm", held.step)
            with self._daemon.span("replay", traces[suspect], step=held.step, suspect=suspect, reason=outcome.reason):
                heard.append(self._judged(held, suspect, ruling))
        final = unless_spread(heard)
        for judged in sorted(final, key=_ends):
            with self._daemon.span("verdict", traces[judged.suspect], step=held.step, suspect=judged.suspect):
                self._replayer.publish(held, judged)
        return traces[heard[-1].suspect], final

    def begin_trace(self, rank: int, name: str, step: int) -> str:
        """`rank` begins the trace of an incident; every rank learns its context, to join it."""
        mine = ""
        if self._group.rank == rank:
            with self._daemon.span(name, "", step=step) as mine:
                pass  # a mark in time: what follows from it has spans of its own
        return str(self._group.gather_objects(mine)[rank])

    def _cases(self, held: Held, outcome: Outcome) -> list[tuple[int, Ruling | None]]:
        """Whom to judge; None where that takes votes. What ranks handed each other no recomputation can judge.

        A sum concerns all ranks, so who is to blame for it is asked once, however many of them alarmed.
        """
        if held.findings:
            return [(finding.suspect, self._of_finding(finding)) for finding in held.findings]
        suspects = outcome.suspects
        if outcome.astray:
            return [self._of_tokens(held, suspects)]
        told = self._group.gather_objects(_told(held))
        summed = [suspect for suspect in suspects if _in_sums(told, suspect)]
        # Of a rank that is heard for something else its redo tells: one attempt has one verdict about one rank.
        of_sums = self._of_sums(held, summed[0]) if summed else []
        cases: list[tuple[int, Ruling | None]] = [
            (rank, ruling) for rank, ruling in of_sums if rank in summed or rank not in suspects
        ]
        for suspect in suspects:
            if suspect not in summed:
                garbled = told[suspect].garbled
                cases.append((suspect, None if garbled is None else self._of_piece(garbled)))
        return cases

    def _of_sums(self, held: Held, first: int) -> list[tuple[int, Ruling]]:
        """By what did not compare; copies that differ though nothing else did are nobody's, and summed anew."""
        parts = [stray.part for stray in held.sums]
        reason = "in the reduction: copies of the sum differ, though each is what its owners announced"
        nobody = Ruling(Verdict.UNDECIDED, None, None, recurrent=False, needs=None, reason=reason)
        return sum_rulings(parts, self._members()) or [(first, nobody)]

    def _of_tokens(self, held: Held, suspects: Sequence[int]) -> tuple[int, Ruling]:
        """Each rank of the group computes its part again by itself: who sends other rows now misdirected them."""
        members = self._replayer.members
        found = self._replayer.deviating(held, suspects)
        deviating = {rank: (members[rank].node, members[rank].device) for rank in found}
        ruling, lead = tokens_ruling(deviating, suspects[0])
        return lead, ruling

    def _of_piece(self, garbled: Garbled) -> Ruling:
        """Both ends hash again what they keep of it; a rank that sent to itself is both."""
        again = self._group.gather_objects(self._replayer.engine.seals.again(garbled))
        source, destination = (self._replayer.members[r] for r in (garbled.source, garbled.destination))
        return piece_ruling(
            Holder(source.node, source.device, garbled.announced, again[garbled.source]),
            Holder(destination.node, destination.device, garbled.arrived, again[garbled.destination]),
        )

    def _of_finding(self, finding: Finding) -> Ruling:
        if isinstance(finding.evidence, Handed):
            return handed_ruling(finding.evidence, self._members())
        if isinstance(finding.evidence, Changed):
            return changed_ruling(finding.evidence, self._members())
        return update_ruling(finding.evidence, self._members())

    def _members(self) -> list[tuple[str, str]]:
        return [(member.node, member.device) for member in self._replayer.members]

    def _judged(self, held: Held, suspect: int, ruling: Ruling | None) -> Judged:
        if ruling is None:
            return self._replayer.judge(held, suspect)
        found = [finding.alarm for finding in held.findings if finding.suspect == suspect]
        summed = [stray.alarm for stray in held.sums if suspect in stray.ends]
        # The holder of a stray has its alarm already.
        alarms = tuple(dict.fromkeys((*held.computation.alarms, *found, *summed)))
        held = replace(held, computation=replace(held.computation, alarms=alarms))
        self._replayer.alarm(held, suspect, (), needs_third=False)
        return Judged(suspect, (), ruling)


def _told(held: Held) -> Told:
    return Told(bool(held.original), held.computation.garbled, bool(held.reduction.strays), held.reduction.copy)


def _in_sums(told: Sequence[Told], suspect: int) -> bool:
    """Whether what holds the step at this suspect is the sum: nothing came before; parts strayed, or copies differ."""
    one = told[suspect]
    if one.sensors or one.garbled is not None:
        return False
    return one.strays or len({t.copy for t in told}) > 1


def _ends(judged: Judged) -> int:
    """How much a verdict may end: nothing, this generation, the job. Once a generation ends, no other verdict does."""
    if judged.ruling.recurrent:
        return 1
    return {Verdict.UNDECIDED: 2, Verdict.SOFTWARE: 3}.get(judged.ruling.verdict or Verdict.CORRUPT, 0)


def unless_spread(heard: Sequence[Judged]) -> list[Judged]:
    """The same, but where a device is to blame, what is wrong everywhere elsewhere may have come from it: UNDECIDED.

    The redo tells: without that device's corruption a fault of the software is still there.
    """
    corrupt = next((j.ruling for j in heard if j.ruling.verdict is Verdict.CORRUPT), None)
    if corrupt is None:
        return list(heard)
    softened = []
    for judged in heard:
        if judged.ruling.verdict is Verdict.SOFTWARE:
            reason = f"{judged.ruling.reason}; {corrupt.blamed_node} corrupted the same step, so it is redone"
            ruling = replace(judged.ruling, verdict=Verdict.UNDECIDED, reason=reason)
            judged = replace(judged, ruling=ruling)
        softened.append(judged)
    return softened
