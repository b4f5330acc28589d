"""The decisions: an event in, the next state and the ordered actions out; the same input gives the same output."""

from collections.abc import Callable
from typing import Any

from controller.core import checkpoints, events, gates, jobs, nodes, outages, restarts, results
from controller.core.actions import Action
from controller.core.change import Change
from controller.core.incidents import match_drills
from controller.core.state import ACTIVE, Incident, Job, JobStatus, State


def _nothing(change: Change, event: events.Event) -> None:
    """A Tick says only that time passed; every event is followed by what is due anyway."""


def _policy_changed(change: Change, event: events.PolicyChanged) -> None:
    change.state.policy = change.policy = change.policy.changed(event.policy)


HANDLERS: dict[type[events.Event], Callable[[Change, Any], None]] = {
    events.AgentHello: outages.agent_hello,
    events.LinkLost: outages.agent_lost,
    events.WorkerReady: outages.worker_ready,
    events.WorkerExited: outages.worker_exited,
    events.ProgressStalled: outages.progress_stalled,
    events.GateAlarm: gates.gate_alarm,
    events.ReplayResult: gates.replay_result,
    events.AuditResult: gates.audit_result,
    events.DigestDisagreement: gates.digest_disagreement,
    events.Resumed: jobs.resumed,
    events.StepFinal: jobs.step_final,
    events.CheckpointCaptured: checkpoints.captured,
    events.CheckpointDurable: checkpoints.durable,
    events.ShardRefused: checkpoints.shard_refused,
    events.FindingRaised: nodes.finding_raised,
    events.FindingCleared: nodes.finding_cleared,
    events.ProbeResult: nodes.probe_result,
    events.DrillFired: jobs.drill_fired,
    events.ActionResult: results.action_result,
    events.JobSubmitted: jobs.submitted,
    events.JobCancelled: jobs.cancelled,
    events.DrillRequested: jobs.drill_requested,
    events.PolicyChanged: _policy_changed,
    events.LeaseAcquired: outages.lease_acquired,
    events.Tick: _nothing,
}


def decide(state: State, event: events.Event, now: float) -> tuple[State, list[Action]]:
    """The state after `event`, seen at `now` (seconds since 1970, recorded with the event), and what to do about it.

    Pure and deterministic: no clock, no randomness, no I/O. `state` is not altered: what changes is copied first, and
    what does not change is shared, so `before.jobs[id] is after.jobs[id]` says that a job is as it was. News that is
    late, repeated or out of place changes nothing. Raises InvalidTransition where a rule contradicts the node
    lifecycle: an error of this code, never of its input.
    """
    change = Change(state, event, now)
    HANDLERS[type(event)](change, event)
    for job_id in [job.id for job in nodes.active(change)]:
        _advance(change, change.job(job_id))
    for job_id in [
        job.id for job in change.state.jobs.values() if any(not item.incident for item in job.fired.values())
    ]:
        match_drills(change, change.job(job_id))
    nodes.settle(change)
    change.finish(state)
    change.state.wake = _wake(change)
    return change.state, change.actions


def matters(before: State, after: State, actions: list[Action]) -> bool:
    """Whether a decision must be recorded. The caller keeps `after` in any case: it holds the next wake."""
    return bool(actions) or before != after


def next_deadline(state: State) -> float | None:
    """When a Tick is needed (seconds since 1970), or None if only events can change anything."""
    return state.wake


def wants_final(state: State, job: str, generation: int, step: int) -> bool:
    """Whether the StepFinal of this step is wanted: most steps say nothing that the decisions need.

    Wanted are a generation's first step, those of captured checkpoints, the last one, those that an incident waits
    for, and after a restart the first one that is progress.
    """
    known = state.jobs.get(job)
    if known is None or known.status not in ACTIVE or not 0 < generation <= known.generation:
        mark = known.checkpoints.get(step) if known is not None else None
        return mark is not None and not mark.final and mark.trust in ("captured", "durable")
    if step == known.steps or step == known.run_steps:
        return True
    mark = known.checkpoints.get(step)
    if mark is not None and not mark.final and mark.trust in ("captured", "durable"):
        return True
    if generation != known.generation:
        return False
    if known.final_step == 0 or (known.fruitless > 0 and step > known.committed_step):
        return True
    return any(item.job == job and item.closed_at is None for item in state.incidents.values())


def changed_incidents(before: State, after: State) -> list[Incident]:
    """The incidents that a decision opened or altered, by id."""
    return [item for key, item in sorted(after.incidents.items()) if before.incidents.get(key) is not item]


def _advance(change: Change, job: Job) -> None:
    """Do what is due for a job, whatever the event was."""
    gates.advance(change, job)
    if job.status is JobStatus.RUNNING:
        jobs.advance_running(change, job)
    if job.status is JobStatus.PENDING:
        jobs.advance_pending(change, job)
    if job.status is JobStatus.RESTARTING:
        restarts.advance(change, job)


def _wake(change: Change) -> float | None:
    """The first time after now at which something may be due."""
    times: list[float] = []
    for job in nodes.active(change):
        if job.status is JobStatus.PENDING:
            times += [job.submitted_at + change.policy.spare_start_s, job.submitted_at + change.policy.pending_s]
        times += [job.finish_due, *gates.wakes(job), *restarts.wakes(change, job)]
    return min((time for time in times if time > change.now), default=None)
