"""Turns an agent's reports into rows, exactly once, and into the events that the decisions need to see."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from controller.core import events
from controller.store import segments
from controller.store.finals import Disagreement, Final, Finals
from controller.store.reports import NodeProcesses, Report, ReportsDropped, StepRecords
from controller.store.writer import Unit


@dataclass(frozen=True, slots=True)
class Sighting:
    """An event for the decisions, and the seq of its report (None if it was derived from several)."""

    event: events.Event
    seq: int | None


class Ingest:
    """What has been taken from each life of each agent. Reports at or below its mark are duplicates.

    Invariant: a mark only grows; it is raised in the same unit that holds the reports' rows.
    """

    def __init__(self, marks: dict[tuple[str, int], int], finals: Finals) -> None:
        """Start from the stored marks by (node, epoch)."""
        self._marks = dict(marks)
        self.finals = finals

    def mark(self, node: str, epoch: int) -> int:
        """Give the highest seq taken from this life of the agent; 0 if none."""
        return self._marks.get((node, epoch), 0)

    def take(
        self, unit: Unit, node: str, epoch: int, reports: Sequence[Report], world: Callable[[str], int]
    ) -> Iterator[Sighting | Final | Disagreement]:
        """Add the rows of the reports that are new to `unit`; yield the events in them, and what steps came to.

        Everything is yielded in the order of the reports; the caller decides on each before it asks for the next.
        `world(job)` gives a job's number of ranks, 0 for an unknown job. Exhaust the iterator: the mark comes last.
        """
        fresh = [report for report in reports if report.seq > self.mark(node, epoch)]
        steps: list[tuple[int, StepRecords]] = []
        dropped = 0
        for report in fresh:
            body = report.body
            if isinstance(body, StepRecords):
                steps.append((report.seq, body))
                yield from self._compare(body, world(body.job))
            elif isinstance(body, NodeProcesses):
                note_processes(unit, node, body.processes)
            elif isinstance(body, ReportsDropped):
                dropped += body.count
            else:
                yield Sighting(replace(body, node=body.node or node), report.seq)
        for seq, merged in segments.merge(steps):
            unit.add("segment", **segments.pack(node, epoch, seq, merged))
        if fresh:
            self._marks[node, epoch] = fresh[-1].seq
            unit.add("mark", node=node, epoch=epoch, seq=fresh[-1].seq, dropped=dropped)

    def _compare(self, steps: StepRecords, world: int) -> Iterator[Final | Disagreement]:
        if not 0 <= steps.rank < world:
            return
        for record in steps.records:
            found = self.finals.add(steps.job, steps.generation, world, steps.rank, record)
            if found is not None:
                yield found


def note_processes(unit: Unit, node: str, processes: Sequence[events.Process]) -> None:
    """Replace what is stored of a node's processes."""
    unit.add("forget_processes", of_node=node)
    for process in processes:
        unit.add(
            "process",
            node=node,
            pid=process.pid,
            role=process.role,
            job=process.job,
            generation=process.generation,
            rank=process.rank,
        )
