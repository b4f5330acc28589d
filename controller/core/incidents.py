"""The record of what went wrong: opening, joining, matching with drills, closing, and the document people read."""

from collections.abc import Callable
from typing import Any

from controller.core.change import Change
from controller.core.events import Vote
from controller.core.state import Fired, Incident, Job

# The kind of incident that a drill of each kind must end in.
EXPECTED = {
    "sdc": "sdc",
    "kill": "crash",
    "hang": "hang",
    "node": "node",
    "checkpoint": "checkpoint",
    "controller": "controller",
}
# One outage is one incident; what explains more of it names it. Higher explains more.
PRECEDENCE = {"crash": 1, "hang": 2, "node": 3, "checkpoint": 4}
# Sources by how far they are from the lost worker; the incident takes the furthest of all ranks.
DISTANCE = {"live": 1, "spare": 2, "replica": 3, "checkpoint": 4, "init": 4}
# An outage is looked for this long after its drill: a hang is the slowest to be seen, after tens of seconds.
DRILL_WINDOW_S = 120.0
# Reports of one machine are stamped by different processes; a second covers the order in which they read the clock.
CLOCK_SLACK_S = 1.0


def open_incident(
    change: Change,
    job: Job,
    kind: str,
    text: str,
    *,
    rank: int = -1,
    node: str = "",
    device: str = "",
    step: int | None = None,
    fault_at: float | None = None,
    detected_at: float | None = None,
    before_commit: bool | None = None,
) -> str:
    """Open an incident of `kind` and give its id. Times are in seconds since 1970."""
    key = f"inc-{change.state.next_incident:04d}"
    change.state.next_incident += 1
    homes = (item for item in job.placements if item.node == node)
    place = job.placed(rank) if rank >= 0 else next(homes, None)
    seen = change.event.time if detected_at is None else detected_at
    change.state.incidents[key] = Incident(
        id=key,
        kind=kind,
        job=job.id,
        generation=job.generation,
        traceparent=change.event.traceparent,
        opened_at=change.now,
        rank=place.rank if place else rank,
        node=node or (place.node if place else ""),
        device=device or (place.device if place else ""),
        detected_step=step,
        before_commit=before_commit,
        fault_at=seen if fault_at is None else fault_at,
        detected_at=seen,
    )
    change.note(key, f"detected: {text}")
    return key


def join(
    change: Change,
    key: str,
    job: Job,
    kind: str,
    text: str,
    *,
    rank: int = -1,
    node: str = "",
    step: int | None = None,
    fault_at: float | None = None,
) -> None:
    """Add news to an open outage; a kind that explains more takes the name and the blame over."""
    incident = change.incident(key)
    change.note(key, text)
    if incident.detected_step is None:
        incident.detected_step = step
    if incident.kind == "sdc":
        return
    sharper = PRECEDENCE[kind] > PRECEDENCE[incident.kind]
    if sharper:
        incident.kind = kind
    if node and (sharper or not incident.node):
        place = next((item for item in job.placements if item.node == node and rank in (-1, item.rank)), None)
        incident.node, incident.rank = node, place.rank if place else rank
        incident.device = place.device if place else ""
    if fault_at is not None and not incident.drills:
        incident.fault_at = fault_at if incident.fault_at is None else min(incident.fault_at, fault_at)


def of_job(change: Change, job: Job) -> list[Incident]:
    """The incidents of a job in the order they were opened."""
    return [incident for _, incident in sorted(change.state.incidents.items()) if incident.job == job.id]


def match_drills(change: Change, job: Job) -> None:
    """Find for every fired drill the incident that shows it, and date that incident's fault by it."""
    for fired in [item for _, item in sorted(job.fired.items()) if not item.incident]:
        known = [incident for incident in of_job(change, job) if incident.caught]
        tests: tuple[Callable[[Incident, Fired], bool], ...] = (_shows, _covers)
        found = next((incident for test in tests for incident in known if test(incident, fired)), None)
        if found is not None:
            _annotate(change, job, fired, found.id)


def _shows(incident: Incident, fired: Fired) -> bool:
    """Whether the incident is what the drill was to cause, and is not another drill's."""
    if incident.kind != EXPECTED.get(fired.kind) or incident.drills:
        return False
    if fired.kind == "sdc":
        return incident.detected_step == fired.step and (fired.rank < 0 or incident.rank in (-1, fired.rank))
    if fired.kind != "controller" and not _same_place(incident, fired):
        return False
    seen = incident.opened_at if incident.detected_at is None else incident.detected_at
    return fired.fired_at - CLOCK_SLACK_S <= seen <= fired.fired_at + DRILL_WINDOW_S


def _covers(incident: Incident, fired: Fired) -> bool:
    """Whether the drill fell into an outage that had begun for another reason, and joined it."""
    if fired.kind in ("sdc", "controller") or not (incident.kind in PRECEDENCE or incident.restart_generation):
        return False
    begun = incident.opened_at if incident.fault_at is None else incident.fault_at
    over = incident.recovered_at if incident.recovered_at is not None else incident.closed_at
    # Only an outage that is over can tell: while it lasts, the drill may yet turn out to be one of its own.
    return over is not None and begun - CLOCK_SLACK_S <= fired.fired_at <= over


def _same_place(incident: Incident, fired: Fired) -> bool:
    """Whether nothing known of the two contradicts that they are about one rank or node."""
    if fired.rank >= 0 and incident.rank >= 0:
        return fired.rank == incident.rank
    return not fired.node or not incident.node or fired.node == incident.node


def _annotate(change: Change, job: Job, fired: Fired, key: str) -> None:
    incident = change.incident(key)
    incident.fault_at = (
        fired.fired_at if not incident.drills else min(fired.fired_at, incident.fault_at or fired.fired_at)
    )
    incident.injected_step = fired.step if incident.injected_step is None else incident.injected_step
    if incident.caught and incident.detected_step is None:
        incident.detected_step = fired.step
    incident.drills = (*incident.drills, fired.id)
    where = f" on rank {fired.rank}" if fired.rank >= 0 else ""
    change.note(key, f"this was a drill: {fired.kind} at step {fired.step}{where}")
    job.fired[fired.id] = Fired(
        fired.id, fired.kind, fired.step, fired.rank, fired.node, fired.fired_at, fired.detail, key
    )


def list_escaped(change: Change, job: Job) -> None:
    """At a job's end, list the drills that fired and that nothing noticed."""
    match_drills(change, job)
    for fired in [item for _, item in sorted(job.fired.items()) if not item.incident]:
        place = job.placed(fired.rank)
        kind = EXPECTED.get(fired.kind, fired.kind)
        key = open_incident(change, job, kind, "nothing", node=fired.node, rank=fired.rank, before_commit=False)
        incident = change.incident(key)
        incident.device = place.device if place else ""
        incident.timeline = ()
        incident.caught, incident.detected_at, incident.closed_at = False, None, change.now
        _annotate(change, job, fired, key)
        change.note(key, "nothing noticed it")


def close_recovered(change: Change, job: Job, generation: int, step: int, at: float) -> None:
    """A step was committed by all ranks at `at`: close what waited for it."""
    for incident in [item for item in of_job(change, job) if item.closed_at is None]:
        if not _recovers(incident, job, generation, step):
            continue
        own = change.incident(incident.id)
        # Training goes on without a controller: what recovers is the record, and that is now.
        own.recovered_at = change.now if incident.kind == "controller" else at
        own.closed_at = change.now
        if own.detected_step is None:
            own.detected_step = max(step, job.committed_step)
        change.note(incident.id, f"recovered: step {step} committed by generation {generation}")
        if job.outage == incident.id:
            job.outage = ""


def _recovers(incident: Incident, job: Job, generation: int, step: int) -> bool:
    if incident.id == job.outage:
        # Late news of a generation that is being replaced does not end the outage that has joined since.
        return job.restart is None and 0 < incident.restart_generation <= generation
    if incident.kind == "controller":
        return generation >= incident.generation
    return generation >= incident.generation and step >= (incident.detected_step or 0)


def add_votes(incident: Incident, votes: tuple[Vote, ...]) -> None:
    """Keep the votes of a held step, each once, in the order they came."""
    incident.votes = tuple(dict.fromkeys((*incident.votes, *votes)))


def add_evidence(change: Change, key: str, name: str, note: str) -> None:
    """Say what a held step left behind, or why it left nothing."""
    incident = change.incident(key)
    if name and name not in incident.evidence:
        incident.evidence = (*incident.evidence, name)
    if name or note:
        change.note(key, f"evidence {name or 'is missing'}: {note}" if note else f"evidence {name}")


def incident_document(incident: Incident) -> dict[str, Any]:
    """The incident as people and tools get it: JSON types only, durations in seconds from the fault.

    Where nothing was restarted, training went on from the live state, and `resumed_from` says so.
    """
    sdc = incident.kind == "sdc"
    source = incident.resumed_from or ("live" if incident.recovered_at is not None else None)
    return {
        "id": incident.id,
        "kind": incident.kind,
        "job": incident.job,
        "rank": incident.rank if incident.rank >= 0 else None,
        "injected_step": incident.injected_step,
        "detected_step": incident.detected_step,
        "before_commit": incident.caught if incident.before_commit is None else incident.before_commit,
        "verdict": (incident.verdict or None) if sdc else None,
        "votes": [
            {
                "node": vote.node,
                "device": vote.device,
                "pid": vote.pid,
                "digest": vote.digest,
                "role": vote.role,
                "number": max(vote.number, 1),
            }
            for vote in incident.votes
        ],
        "node": incident.node or None,
        "device": incident.device or None,
        "actions": [{"type": item.type, "target": item.target, "reason": item.reason} for item in incident.actions],
        "detect_s": _since(incident.fault_at, incident.detected_at),
        "recovery_s": _since(incident.fault_at, incident.recovered_at),
        "resumed_from": source,
        "caught": incident.caught,
        "timeline": [{"time": note.time, "text": note.text} for note in incident.timeline],
        "evidence": list(incident.evidence),
    }


def _since(start: float | None, end: float | None) -> float | None:
    """Seconds between two stamps that may be of different clocks: never negative."""
    return None if start is None or end is None else max(0.0, end - start)
