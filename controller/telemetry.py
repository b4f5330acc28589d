"""What the controller shows of itself: metrics for Prometheus, and the spans that join an incident's processes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from opentelemetry.trace import Span, Tracer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from assay.telemetry import context, traceparent
from controller.core import actions, events
from controller.core.state import Incident
from controller.store.reports import StepRecord

# Seconds of one commit: an fsync takes 1 ms on a good disk, 0.1 s on a bad one; above 1 s acknowledgements are late.
COMMIT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
# Events that an incident may begin with: each gets a trace if it came without one, so that all that follows joins it.
DISRUPTIONS = (
    events.AgentHello,
    events.LinkLost,
    events.WorkerExited,
    events.ProgressStalled,
    events.GateAlarm,
    events.DigestDisagreement,
    events.ReplayResult,
    events.ShardRefused,
    events.LeaseAcquired,
)


class Metrics:
    """The controller's numbers, in a registry of their own."""

    def __init__(self) -> None:
        """Register everything."""
        self.registry = CollectorRegistry()
        self.reports = Counter("assay_reports", "Reports taken, without duplicates.", registry=self.registry)
        self.events = Counter("assay_events", "Events decided on.", ["type"], registry=self.registry)
        self.refused = Counter(
            "assay_events_refused", "Events that the decisions could not take.", ["type"], registry=self.registry
        )
        self.actions = Counter("assay_actions", "Actions decided.", ["type"], registry=self.registry)
        self.incidents = Counter("assay_incidents", "Incidents opened.", ["kind"], registry=self.registry)
        self.verdicts = Counter("assay_verdicts", "Verdicts on held steps.", ["verdict"], registry=self.registry)
        self.widened = Counter(
            "assay_tolerances_widened", "Tolerances widened after false alarms.", registry=self.registry
        )
        self.nodes = Gauge("assay_nodes_linked", "Nodes with an open stream.", registry=self.registry)
        self.step = Gauge("assay_job_final_step", "Last step that core saw final.", ["job"], registry=self.registry)
        self.checks = Counter(
            "assay_checks", "Checks that sensors made in committed steps.", ["node"], registry=self.registry
        )
        self.failed_checks = Counter(
            "assay_checks_failed", "Checks that failed themselves: coverage lost.", ["node"], registry=self.registry
        )
        self.unjudged = Counter(
            "assay_calls_unjudged", "Calls that their check could not judge.", ["node"], registry=self.registry
        )
        self.units = Counter("assay_store_units", "Units committed.", registry=self.registry)
        self.commits = Histogram(
            "assay_store_commit_seconds", "Time of one commit.", buckets=COMMIT_BUCKETS, registry=self.registry
        )

    def committed(self, units: int, seconds: float) -> None:
        """Count a commit; called on the writer's thread."""
        self.units.inc(units)
        self.commits.observe(seconds)

    def stepped(self, node: str, records: Iterable[StepRecord]) -> None:
        """Count what the sensors of a node saw in these steps, and what they lost."""
        for record in records:
            self.checks.labels(node).inc(record.checks)
            self.failed_checks.labels(node).inc(record.failed_checks)
            self.unjudged.labels(node).inc(record.unjudged)

    def decided(self, event: events.Event, ordered: Sequence[actions.Action]) -> None:
        """Count a decision."""
        self.events.labels(type(event).__name__).inc()
        for action in ordered:
            self.actions.labels(type(action).__name__).inc()
        if isinstance(event, events.StepFinal):
            self.step.labels(event.job).set(event.step)

    def text(self) -> bytes:
        """Write everything in Prometheus's text format."""
        return generate_latest(self.registry)


class Traces:
    """The spans of decisions. Started before the decision, so that its actions can name them as their parent."""

    def __init__(self, tracer: Tracer) -> None:
        """Record with `tracer`."""
        self._tracer = tracer

    def begin(self, event: events.Event) -> tuple[events.Event, Span | None]:
        """Open the span of a decision that may matter; the event then carries it, for the actions to join."""
        if not isinstance(event, DISRUPTIONS) or (
            isinstance(event, events.WorkerExited) and event.cause == "completed"
        ):
            return event, None
        span = self._tracer.start_span(
            "assay.incident.decide",
            context=context(event.traceparent),
            attributes={"event": type(event).__name__, "node": event.node},
        )
        return replace(event, traceparent=traceparent(span)), span

    def end(self, span: Span | None, ordered: Sequence[actions.Action]) -> None:
        """Close a decision's span with what was decided; the background thread exports it."""
        if span is not None:
            span.set_attribute("actions", [f"{type(action).__name__} {action.node}" for action in ordered])
            span.end()

    def incident(self, incident: Incident) -> None:
        """Record a recovered incident as one span from its detection to the next committed step, in its own trace."""
        start = incident.detected_at or incident.opened_at
        span = self._tracer.start_span(
            "assay.incident.recovered",
            context=context(incident.traceparent),
            start_time=int(start * 1e9),
            attributes={"incident": incident.id, "kind": incident.kind, "resumed_from": incident.resumed_from},
        )
        span.end(int((incident.recovered_at or incident.closed_at or start) * 1e9))
