"""Feeds events to the decisions and writes down both, so that what is stored is always what was decided, in order."""

import logging
from collections.abc import Callable, Sequence

from controller.core import codec, events, machine
from controller.core.actions import Action
from controller.core.nodes import InvalidTransition
from controller.core.state import STATE_VERSION, State
from controller.documents import write_changes
from controller.store import effects
from controller.store.encoding import dump
from controller.store.finals import Disagreement, Final
from controller.store.ingest import Ingest, Sighting, note_processes
from controller.store.reports import Report, StepRecords
from controller.store.writer import Unit
from controller.telemetry import Metrics, Traces

log = logging.getLogger(__name__)

# Events between two snapshots: reading so many back takes a tenth of a second, and a snapshot of a small cluster is
# about as large as ten events.
SNAPSHOT_EVERY = 1000


class Recorder:
    """Holds core's state. Everything it decides goes into a unit, which the caller commits in the same order.

    Invariants: `seq` is the seq of the last event written; the `now` given to decisions never goes back.
    """

    def __init__(
        self,
        state: State,
        seq: int,
        ingest: Ingest,
        clock: Callable[[], float],
        metrics: Metrics,
        traces: Traces,
    ) -> None:
        """Go on from `state`, which includes the event `seq`; `clock` gives seconds since 1970."""
        self.state = state
        self.seq = seq
        self.ingest = ingest
        self._clock = clock
        self._metrics = metrics
        self._traces = traces
        self._now = 0.0

    def now(self) -> float:
        """Give the time for the next decision: the clock's, but never before the last one's."""
        self._now = max(self._now, self._clock())
        return self._now

    def decide(self, unit: Unit, event: events.Event, source: tuple[int, int] | None = None) -> list[Action]:
        """Decide on one event and write it down; `source` is (agent's epoch, seq) if a report brought it.

        An event that contradicts the rules changes nothing and is not written: one bad report must not stop the
        controller, now or when it is sent again after a restart.
        """
        now = self.now()
        event, span = self._traces.begin(event)
        try:
            after, ordered = machine.decide(self.state, event, now)
        except (InvalidTransition, LookupError, ValueError, TypeError):
            log.exception("event refused: %r", event)
            self._metrics.refused.labels(type(event).__name__).inc()
            self._traces.end(span, ())
            return []
        before, self.state = self.state, after
        if not isinstance(event, events.Tick) or machine.matters(before, after, ordered):
            self._write(unit, event, source, ordered, now)
            write_changes(unit, before, after, now)
        self._traces.end(span, ordered)
        self._note(before, event, ordered)
        return ordered

    def reports(self, unit: Unit, node: str, epoch: int, reports: Sequence[Report]) -> list[Action]:
        """Take a batch of reports: rows for what is new in them, and decisions on the events."""
        ordered: list[Action] = []
        fresh = [report.body for report in reports if report.seq > self.ingest.mark(node, epoch)]
        self._metrics.reports.inc(len(fresh))
        for body in fresh:
            if isinstance(body, StepRecords):
                self._metrics.stepped(node, body.records)
                _tell_lost(node, body)
        for found in self.ingest.take(unit, node, epoch, reports, self._world):
            if isinstance(found, Sighting):
                ordered += self._sighted(unit, epoch, found)
            elif isinstance(found, Final):
                ordered += self._final(unit, found)
            else:
                ordered += self._disagreement(unit, found)
        return ordered

    def _sighted(self, unit: Unit, epoch: int, found: Sighting) -> list[Action]:
        ordered = self.decide(unit, found.event, (epoch, found.seq) if found.seq is not None else None)
        if isinstance(found.event, events.CheckpointCaptured | events.CheckpointDurable):
            # The step of a checkpoint may have become final before core heard of the checkpoint.
            late = self.ingest.finals.recent(found.event.job, found.event.generation, found.event.step)
            if late is not None:
                ordered += self._final(unit, late)
        return ordered

    def _final(self, unit: Unit, final: Final) -> list[Action]:
        if not machine.wants_final(self.state, final.job, final.generation, final.step):
            return []
        event = events.StepFinal(
            time=final.time,
            job=final.job,
            generation=final.generation,
            step=final.step,
            digest=final.digest,
            chain=final.chain,
            loss=final.loss,
        )
        return self.decide(unit, event)

    def _disagreement(self, unit: Unit, found: Disagreement) -> list[Action]:
        event = events.DigestDisagreement(
            time=found.time,
            job=found.job,
            generation=found.generation,
            step=found.step,
            digests=found.digests,
            blamed_rank=-1,
            reason="the ranks' step records name different states",
        )
        return self.decide(unit, event)

    def _world(self, job: str) -> int:
        known = self.state.jobs.get(job)
        return known.world if known is not None else 0

    def _write(
        self, unit: Unit, event: events.Event, source: tuple[int, int] | None, ordered: Sequence[Action], now: float
    ) -> None:
        self.seq += 1
        unit.add(
            "event",
            seq=self.seq,
            time=event.time,
            recorded=now,
            type=type(event).__name__,
            node=event.node,
            job=getattr(event, "job", ""),
            body=dump(codec.encode(event)),
            agent_epoch=source[0] if source else None,
            report_seq=source[1] if source else None,
        )
        for position, action in enumerate(ordered):
            self._write_action(unit, position, action, now)
        effects.of_event(unit, event, now)
        for action in ordered:
            effects.of_action(unit, action, now)
        if isinstance(event, events.AgentHello):
            note_processes(unit, event.node, event.processes)
        if self.seq % SNAPSHOT_EVERY == 0:
            self._snapshot(unit)

    def _write_action(self, unit: Unit, position: int, action: Action, now: float) -> None:
        """Write one action; what the controller does itself is done by the same transaction's other writes."""
        unit.add(
            "action",
            event_seq=self.seq,
            position=position,
            id=action.id,
            type=type(action).__name__,
            node=action.node,
            job=action.job,
            generation=action.generation,
            incident=action.incident,
            reason=action.reason,
            body=dump(codec.encode(action)),
            decided=now,
            status="pending" if action.node else "done",
            detail="",
            finished=None if action.node else now,
        )

    def _snapshot(self, unit: Unit) -> None:
        body = dump(codec.encode_state(self.state))
        unit.add("snapshot", seq=self.seq, version=STATE_VERSION, body=body)
        unit.add("snapshots_before", before=self.seq - SNAPSHOT_EVERY)

    def _note(self, before: State, event: events.Event, ordered: Sequence[Action]) -> None:
        """Count the decision, and close the traces of incidents that it closed."""
        self._metrics.decided(event, ordered)
        for incident in machine.changed_incidents(before, self.state):
            old = before.incidents.get(incident.id)
            if old is None:
                self._metrics.incidents.labels(incident.kind).inc()
            if incident.verdict and (old is None or old.decided_at != incident.decided_at):
                self._metrics.verdicts.labels(incident.verdict).inc()
                if isinstance(event, events.ReplayResult):
                    self._metrics.widened.inc(event.widened)
            if incident.recovered_at is not None and (old is None or old.recovered_at is None):
                self._traces.incident(incident)


def _tell_lost(node: str, steps: StepRecords) -> None:
    """Log why coverage was lost: a rank tells each reason once."""
    for record in steps.records:
        for reason in record.lost_because:
            where = (steps.job, steps.rank, node, record.step)
            log.warning("job %s: sensors of rank %d on %s lose coverage in step %d: %r", *where, reason)
