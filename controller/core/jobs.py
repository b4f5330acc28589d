"""The life of a job: submitted, started, resumed, extended, ended."""

from controller.core import checkpoints
from controller.core.actions import (
    DeliverVote,
    EndJob,
    InjectDrill,
    Placement,
    PrepareStandby,
    Replay,
    StartGeneration,
    StopGeneration,
)
from controller.core.change import Change
from controller.core.events import DrillFired, DrillRequested, JobCancelled, JobSubmitted, Resumed, StepFinal
from controller.core.incidents import DISTANCE, close_recovered, list_escaped, of_job, open_incident
from controller.core.nodes import SPENT, prepare
from controller.core.placement import first_plan, hopeless, told
from controller.core.state import ACTIVE, UNDER_WAY, Fired, Job, JobStatus, Resume

# What an agent no longer needs to do, and the executor no longer to send, once its generation or job is to end.
OVERRULED_BY_STOP = (StartGeneration, Replay, DeliverVote, InjectDrill)
OVERRULED_BY_END = (*OVERRULED_BY_STOP, PrepareStandby)
PROOFS = 16  # generations whose proof is remembered; only the current one's is ever asked for


def submitted(change: Change, event: JobSubmitted) -> None:
    """Start a job, go on with one that has ended, or extend one that runs. A repeated order changes nothing."""
    known = change.state.jobs.get(event.job)
    if known is None:
        change.state.jobs[event.job] = Job(event.job, event.spec, event.steps, event.world)
    elif event.steps <= known.steps and (known.status in ACTIVE or known.status is JobStatus.COMPLETED):
        return
    job = change.job(event.job)
    job.spec, job.steps = event.spec, event.steps
    fresh = {drill.id for drill in job.drills}
    job.drills = (*job.drills, *(drill for drill in event.drills if drill.id not in fresh))
    if known is not None and known.status in ACTIVE:
        return
    job.world, job.status, job.submitted_at = event.world, JobStatus.PENDING, change.now
    job.explanation, job.ended_at, job.fingerprint, job.fruitless = "", None, "", 0
    job.failures = {}
    for _, node in sorted(change.state.nodes.items()):
        prepare(change, job, node)


def cancelled(change: Change, event: JobCancelled) -> None:
    """An operator ends a job."""
    job = change.state.jobs.get(event.job)
    if job is not None and job.status in ACTIVE:
        end(change, change.job(event.job), JobStatus.CANCELLED, f"cancelled by {event.actor}: {event.reason}")


def advance_pending(change: Change, job: Job) -> None:
    """Start a waiting job once its warm workers are ready; give up when they do not come."""
    fenced = job.generation == 0 or job.generation in job.proofs
    plan = first_plan(change, job) if fenced else None
    if plan is not None:
        reason = "first start" if job.generation == 0 else f"goes on to step {job.steps}"
        start(change, job, plan, reason)
    elif why := hopeless(change, job):
        end(change, job, JobStatus.FAILED, why)
    elif change.now >= job.submitted_at + change.policy.pending_s:
        why = "not enough warm workers" if fenced else f"generation {job.generation} is not proven stopped"
        if failures := told(job):
            why += f" ({failures})"
        end(change, job, JobStatus.FAILED, f"did not start within {change.policy.pending_s:.0f} s: {why}")


def start(change: Change, job: Job, plan: tuple[Placement, ...], reason: str, incident: str = "") -> None:
    """Start the next generation with `plan`, one action a node."""
    job.generation += 1
    first = change.state.nodes[plan[0].node].standbys[plan[0].standby]
    job.fingerprint = first.fingerprint
    drills = tuple(drill for drill in job.drills if drill.persistent or drill.id not in job.fired)
    for name in dict.fromkeys(place.node for place in plan):
        own = tuple(place for place in plan if place.node == name)
        ranks = " and ".join(f"rank {place.rank}" for place in own)
        body = {"spec": job.spec, "ranks": own, "rendezvous": first.rendezvous, "drills": drills}
        change.act(StartGeneration, job, name, f"{ranks}: {reason}", incident=incident, **body)
        node = change.node(name)
        for place in own:
            del node.standbys[place.standby]
        node.spent = (*node.spent, *(place.standby for place in own))[-SPENT:]
    job.status, job.placements, job.run_steps, job.started_at = JobStatus.RUNNING, plan, job.steps, change.now
    job.exits, job.stalls, job.resumed, job.gates = {}, {}, {}, {}
    job.final_step, job.finish_due, job.restart = 0, 0.0, None


def stop_members(change: Change, job: Job, reason: str, incident: str = "", first: str = "") -> tuple[str, ...]:
    """Order the end of every worker of the generation that is not known to be gone; gives the nodes, `first` first."""
    alive = [place.node for place in job.placements if place.rank not in job.exits]
    names = tuple(dict.fromkeys(sorted(alive, key=lambda name: name != first)))
    change.withdraw(job.id, OVERRULED_BY_STOP, names)
    for name in names:
        change.act(StopGeneration, job, name, reason, incident=incident)
    return names


def prove(change: Change, job: Job, generation: int, text: str) -> None:
    """Remember that a member of `generation` is proven stopped: every gate needs every rank, so it cannot go on."""
    if generation in job.proofs:
        return
    job.proofs[generation] = text
    for old in sorted(job.proofs)[:-PROOFS]:
        del job.proofs[old]
    if job.outage and generation == job.generation and job.status in UNDER_WAY:
        incident = change.incident(job.outage)
        incident.fenced_at = change.now
        change.note(job.outage, f"fenced: generation {generation} cannot go on, for {text}")


def end(change: Change, job: Job, status: JobStatus, why: str, incident: str = "") -> None:
    """End a job on every node, close its incidents and list the drills that nothing noticed."""
    if job.status in UNDER_WAY and status is not JobStatus.COMPLETED:
        stop_members(change, job, why, incident)
    job.status, job.explanation, job.ended_at = status, why, change.now
    change.withdraw(job.id, OVERRULED_BY_END, tuple(change.state.nodes))
    for name in sorted(change.state.nodes):
        change.act(EndJob, job, name, why, incident=incident, outcome=status.value.lower())
        node = change.node(name)
        node.standbys = {key: standby for key, standby in node.standbys.items() if standby.job != job.id}
    if status is JobStatus.COMPLETED:
        close_recovered(change, job, job.generation, job.committed_step, change.event.time)
    for item in [item for item in of_job(change, job) if item.closed_at is None]:
        change.incident(item.id).closed_at = change.now
        change.note(item.id, f"the job ended: {why}")
    job.restart, job.outage = None, ""
    list_escaped(change, job)


def advance_running(change: Change, job: Job) -> None:
    """Complete a job whose ranks have left after the last step; go on if it was extended meanwhile.

    A rank leaves only after the closing gate, in which all ranks agreed on the last step's state. So one that left
    speaks for members that cannot be reached, and for records that were lost on the way; both get time to turn up.
    """
    if not _left(change, job):
        job.finish_due = 0.0
    elif job.committed_step < job.run_steps and not job.finish_due:
        job.finish_due = change.now + change.policy.finish_wait_s
    elif job.committed_step >= job.run_steps or change.now >= job.finish_due:
        why = f"all {job.run_steps} steps are committed"
        if job.committed_step < job.run_steps:
            why += ", though the records of some ranks are missing"
            _note_silence(change, job)
        _progress(job, job.run_steps)
        if job.run_steps >= job.steps:
            end(change, job, JobStatus.COMPLETED, why)
            return
        close_recovered(change, job, job.generation, job.committed_step, change.event.time)
        job.status, job.submitted_at, job.outage = JobStatus.PENDING, change.now, ""


def _note_silence(change: Change, job: Job) -> None:
    """An agent that could not be reached to the end took its node's records along: that is an incident of its node."""
    for place in job.placements:
        node = change.state.nodes[place.node]
        if place.rank in job.exits or node.linked:
            continue
        text = f"the agent of {place.node} cannot be reached; what rank {place.rank} reported since then is missing"
        key = open_incident(
            change, job, "node", text, rank=place.rank, node=place.node, fault_at=node.lost_at, before_commit=True
        )
        incident = change.incident(key)
        incident.detected_step, incident.resumed_from = job.run_steps, "live"
        incident.recovered_at = incident.closed_at = change.now
        change.note(key, "the job completed without it")


def _left(change: Change, job: Job) -> bool:
    """Whether at least one rank has left after the last step, and each other one has too or cannot be reached."""
    rest = [place for place in job.placements if job.exits.get(place.rank) != "completed"]
    reachable = [place for place in rest if place.rank in job.exits or change.state.nodes[place.node].linked]
    return len(rest) < job.world and not reachable


def step_final(change: Change, event: StepFinal) -> None:
    """All ranks committed a step with one digest: progress, and what closes incidents and verifies checkpoints."""
    known = change.state.jobs.get(event.job)
    if known is None or not 0 < event.generation <= known.generation:
        return
    job = change.job(event.job)
    if event.generation == job.generation:
        job.final_step = max(job.final_step, event.step)
    _progress(job, event.step)
    if job.status in ACTIVE:
        close_recovered(change, job, event.generation, event.step, event.time)
    checkpoints.step_final(change, job, event)


def resumed(change: Change, event: Resumed) -> None:
    """A rank of the running generation found its state; the incident takes the furthest source of all."""
    known = change.state.jobs.get(event.job)
    if known is None or event.generation != known.generation or event.rank in known.resumed:
        return
    job = change.job(event.job)
    job.resumed[event.rank] = Resume(event.step, event.source, event.digest)
    if job.outage and change.state.incidents[job.outage].restart_generation == event.generation:
        incident = change.incident(job.outage)
        source = "checkpoint" if event.source == "init" else event.source
        if DISTANCE.get(source, 0) > DISTANCE.get(incident.resumed_from, 0):
            incident.resumed_from = source
        change.note(job.outage, f"resumed: rank {event.rank} goes on after step {event.step} from {event.source}")
    digests = {(item.step, item.digest) for item in job.resumed.values()}
    if len(job.resumed) == job.world and len(digests) == 1:
        _progress(job, event.step)  # every rank holds the same bits: as good as a StepFinal


def drill_requested(change: Change, event: DrillRequested) -> None:
    """Arm a drill in a job; running workers hear of it at once, later generations with their start."""
    known = change.state.jobs.get(event.job)
    if known is None or known.status not in ACTIVE or any(drill.id == event.drill.id for drill in known.drills):
        return
    job = change.job(event.job)
    job.drills = (*job.drills, event.drill)
    for place in job.placements if job.status in UNDER_WAY else ():
        meant = event.drill.rank in (-1, place.rank) and event.drill.node in ("", place.node)
        if meant and place.rank not in job.exits:
            change.act(InjectDrill, job, place.node, f"{event.actor}: {event.reason}", drill=event.drill)


def drill_fired(change: Change, event: DrillFired) -> None:
    """A drill did its work: it will not be armed again, and its incident is dated by it."""
    known = change.state.jobs.get(event.job)
    if known is None or event.drill in known.fired:
        return
    job = change.job(event.job)
    job.fired[event.drill] = Fired(
        event.drill, event.kind, event.step, event.rank, event.node, event.fired_at, event.detail
    )
    if job.status not in ACTIVE:
        list_escaped(change, job)


def _progress(job: Job, step: int) -> None:
    if step > job.committed_step:
        job.committed_step, job.fruitless = step, 0
