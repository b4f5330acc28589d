"""From a lost, stopped or silent worker to an outage: what each report proves, and whom it blames."""

from dataclasses import replace

from controller.core.change import Change
from controller.core.events import AgentHello, LeaseAcquired, LinkLost, ProgressStalled, WorkerExited, WorkerReady
from controller.core.incidents import open_incident
from controller.core.jobs import prove
from controller.core.nodes import ADMITTING, SPENT, admit, hello, link_lost, lost, stop_stragglers, unlink
from controller.core.restarts import report
from controller.core.state import ACTIVE, UNDER_WAY, Failures, Job, JobStatus, Standby


def worker_ready(change: Change, event: WorkerReady) -> None:
    """A warm worker waits. It is also what shows that a new agent's node can work."""
    known = change.state.nodes.get(event.node)
    job = change.state.jobs.get(event.job)
    if known is None or job is None or job.status not in ACTIVE or event.standby in known.spent:
        return
    if event.node in job.failures:
        del change.job(event.job).failures[event.node]
    node = change.node(event.node)
    node.standbys[event.standby] = Standby(
        event.standby, event.job, event.pid, event.device, event.rendezvous, event.fingerprint
    )
    if node.state is ADMITTING:
        admit(change, event.node)


def worker_exited(change: Change, event: WorkerExited) -> None:
    """A worker is proven gone: after its last step, on our word, as a victim, or as the cause of an outage."""
    _forget_standby(change, event)
    known = change.state.jobs.get(event.job)
    place = known.placed(event.rank) if known is not None else None
    if known is None or place is None or event.generation != known.generation or place.node != event.node:
        return
    if event.rank in known.exits:
        return
    job = change.job(event.job)
    cause = "completed" if job.committed_step >= job.run_steps else event.cause
    job.exits[event.rank] = cause
    text = f"rank {event.rank} on {event.node} ended at step {event.step} ({event.phase}): {cause}"
    if event.detail:
        text += f": {event.detail}"
    if job.status not in UNDER_WAY or cause in ("completed", "stopped"):
        prove(change, job, job.generation, f"rank {event.rank} on {event.node} is gone")
    if job.status not in UNDER_WAY or cause == "completed":
        return
    if cause == "stopped" and job.restart is not None:
        change.note(job.restart.incident, text)
        return
    victim = cause == "collective"
    report(
        change,
        job,
        "crash",
        text,
        known=not victim,
        rank=-1 if victim else event.rank,
        node="" if victim else event.node,
        step=event.step,
        fault_at=event.time,
        proof=f"rank {event.rank} on {event.node} is gone",
    )


def _forget_standby(change: Change, event: WorkerExited) -> None:
    """A standby that is gone cannot be promoted, and late news of it must not bring it back."""
    known = change.state.nodes.get(event.node)
    if known is not None and event.standby and event.standby not in known.spent:
        node = change.node(event.node)
        node.standbys.pop(event.standby, None)
        node.spent = (*node.spent, event.standby)[-SPENT:]
        if event.generation == 0 and event.cause == "error" and event.job in change.state.jobs:
            job = change.job(event.job)
            count = job.failures[event.node].count if event.node in job.failures else 0
            job.failures[event.node] = Failures(count + 1, event.detail)


def progress_stalled(change: Change, event: ProgressStalled) -> None:
    """A worker does not move. One that only waits for others is a victim; when all wait, the gang is stuck."""
    known = change.state.jobs.get(event.job)
    place = known.placed(event.rank) if known is not None else None
    if known is None or place is None or event.generation != known.generation or place.node != event.node:
        return
    if known.status not in UNDER_WAY or event.rank in known.exits:
        return
    job = change.job(event.job)
    text = f"rank {event.rank} on {event.node} has not moved for {event.stalled_s:.1f} s in {event.phase}"
    if not event.waiting or event.process_state == "T":
        text += ": the process is stopped" if event.process_state == "T" else f" (allowed {event.deadline_s:.1f} s)"
        since = event.time - event.stalled_s
        report(change, job, "hang", text, known=True, rank=event.rank, node=event.node, step=event.step, fault_at=since)
        return
    job.stalls[event.rank] = event.step
    if _all_wait(change, job):
        absent = [place.node for place in job.placements if lost(change.state.nodes[place.node], change.now)]
        kind, node = ("node", absent[0]) if absent else ("hang", "")
        text = f"every rank that can be heard waits for the others at step {event.step}"
        since = event.time - event.stalled_s
        report(change, job, kind, text, known=True, node=node, step=event.step, fault_at=since, gone=bool(absent))


def _all_wait(change: Change, job: Job) -> bool:
    """Whether all ranks on linked nodes wait. Ranks are at most one step apart, so older stalls are over."""
    newest = max(job.stalls.values())
    heard = {place.rank for place in job.placements if change.state.nodes[place.node].linked}
    return heard <= {rank for rank, step in job.stalls.items() if step >= newest - 1}


def agent_hello(change: Change, event: AgentHello) -> None:
    """An agent (re)connected. A new life of it proves that the workers of the old one are gone."""
    reborn = hello(change, event)
    for job_id in sorted(change.state.jobs) if reborn else ():
        known = change.state.jobs[job_id]
        ranks = [place.rank for place in known.placements if place.node == event.node]
        if not ranks or (known.status in UNDER_WAY and all(known.exits.get(rank) == "completed" for rank in ranks)):
            continue
        job = change.job(job_id)
        text = f"the agent of {event.node} started anew, so its workers are gone"
        if job.status not in UNDER_WAY:
            prove(change, job, job.generation, text)
            continue
        job.exits.update({rank: "node" for rank in ranks if rank not in job.exits})
        report(change, job, "node", text, known=True, node=event.node, proof=text, gone=True)
    stop_stragglers(change, event)


def agent_lost(change: Change, event: LinkLost) -> None:
    """A link broke. That alone is no reason to act: training goes on without links."""
    if link_lost(change, event):
        for job in change.state.jobs.values():
            if job.outage and job.status is JobStatus.RESTARTING and job.holds(event.node):
                change.note(job.outage, f"the link to {event.node} broke")


def lease_acquired(change: Change, event: LeaseAcquired) -> None:
    """A controller starts: it meets no links, and if its predecessor died that is an incident of each running job."""
    if event.epoch <= change.state.controller_epoch:
        return
    change.state.controller_epoch = event.epoch
    for name, node in sorted(change.state.nodes.items()):
        if node.linked:
            unlink(change, name, change.now + change.policy.reconnect_grace_s)
    for job_id in sorted(change.state.jobs):
        if change.state.jobs[job_id].status not in UNDER_WAY:
            continue
        job = change.job(job_id)
        if job.restart is not None:  # nobody could answer while there was no controller
            late = max(job.restart.deadline, change.now + change.policy.node_return_s)
            job.restart = replace(job.restart, deadline=late)
        if event.unclean:
            text = f"the controller of epoch {event.epoch} found that its predecessor had died"
            open_incident(
                change,
                job,
                "controller",
                text,
                fault_at=event.last_seen,
                detected_at=change.now,
                before_commit=True,
            )
