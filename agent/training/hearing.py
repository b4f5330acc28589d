"""A held step is heard: every suspect is judged before anything follows from a verdict."""

from collections.abc import Sequence
from dataclasses import replace

from agent.training.collective import Group
from agent.training.gate import Outcome
from agent.training.held import Held
from agent.training.replay import Daemon, Judged, Replayer
from diagnostics.health import Verdict


class Hearing:
    """Brings the suspects of a held step to their verdicts. Every rank makes the same calls."""

    def __init__(self, replayer: Replayer, group: Group, daemon: Daemon) -> None:
        self._replayer = replayer
        self._group = group
        self._daemon = daemon

    def hear(self, held: Held, outcome: Outcome) -> tuple[str, list[Judged]]:
        """Judge all suspects, and say what was found; returns the trace of the last one, which the redo belongs to.

        That the software is to blame ends a job, so it is said last, and only if no device turned out to be.
        """
        traces: dict[int, str] = {}
        heard = []
        for suspect in outcome.suspects:
            traces[suspect] = self.begin_trace(suspect, "alarm", held.step)
            with self._daemon.span("replay", traces[suspect], step=held.step, suspect=suspect, reason=outcome.reason):
                judged = self._replayer.judge(held, suspect)
                if judged.ruling.verdict is not Verdict.SOFTWARE:
                    self._replayer.publish(held, judged)
            heard.append(judged)
        final = unless_spread(heard)
        for before, judged in zip(heard, final, strict=True):
            if before.ruling.verdict is Verdict.SOFTWARE:
                with self._daemon.span("verdict", traces[judged.suspect], step=held.step, suspect=judged.suspect):
                    self._replayer.publish(held, judged)
        return traces[outcome.suspects[-1]], final

    def begin_trace(self, rank: int, name: str, step: int) -> str:
        """`rank` begins the trace of an incident; every rank learns its context, to join it."""
        mine = ""
        if self._group.rank == rank:
            with self._daemon.span(name, "", step=step) as mine:
                pass  # a mark in time: what follows from it has spans of its own
        return str(self._group.gather_objects(mine)[rank])


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
