"""From an outage to the next generation: stop what is left, wait for proof and warm workers, start."""

from dataclasses import replace

from controller.core.actions import AskHuman, Placement
from controller.core.change import Change
from controller.core.incidents import join, open_incident
from controller.core.jobs import end, prove, start, stop_members
from controller.core.nodes import lost
from controller.core.placement import hopeless, next_plan, told, waits
from controller.core.state import Job, JobStatus, Restart


def report(
    change: Change,
    job: Job,
    kind: str,
    text: str,
    *,
    known: bool,
    rank: int = -1,
    node: str = "",
    step: int | None = None,
    fault_at: float | None = None,
    proof: str = "",
    gone: bool = False,
) -> None:
    """Something ended or holds up the running generation: open or join the job's outage and want a new generation.

    `known`: this is a cause and no consequence. `proof`: why a member is proven stopped, if it is. `gone`: the node
    itself is lost, so that its ranks go elsewhere if they can.
    """
    if job.outage:
        join(change, job.outage, job, kind, text, rank=rank, node=node, step=step, fault_at=fault_at)
    else:
        job.outage = open_incident(
            change, job, kind, text, rank=rank, node=node, step=step, fault_at=fault_at, before_commit=True
        )
    require(change, job, job.outage, text, known=known, avoid=(node,) if gone and node else (), first=node)
    if proof:
        prove(change, job, job.generation, proof)


def require(
    change: Change, job: Job, key: str, why: str, *, known: bool, avoid: tuple[str, ...] = (), first: str = ""
) -> None:
    """Want a new generation because of incident `key`: order the end of the old one, unless that is under way."""
    if job.restart is not None:
        cause_known = job.restart.cause_known or known
        avoided = tuple(dict.fromkeys((*job.restart.avoid, *avoid)))
        job.restart = replace(job.restart, cause_known=cause_known, avoid=avoided)
        return
    incident = change.incident(key)
    incident.decided_at = change.now if incident.decided_at is None else incident.decided_at
    if job.fruitless >= change.policy.fruitless_restarts:
        why = f"{job.fruitless} restarts brought no step beyond {job.committed_step}; the last outage: {why}"
        end(change, job, JobStatus.FAILED, why, key)
        return
    policy = change.policy
    due, deadline = change.now + policy.cause_wait_s, change.now + policy.node_return_s
    job.status = JobStatus.RESTARTING
    job.restart = Restart(key, change.now, due, deadline, known, avoid)
    change.note(key, f"decided: generation {job.generation} ends and another takes its place")
    stop_members(change, job, why, key, first)


def advance(change: Change, job: Job) -> None:
    """Start the next generation if everything for it is there; fail the job if it has waited too long."""
    if job.restart is not None and not job.restart.cause_known:
        _blame_lost_link(change, job)
    restart = job.restart
    if restart is None:
        return
    fenced = job.generation in job.proofs
    plan = None
    if fenced and (restart.cause_known or change.now >= restart.due):
        plan = next_plan(change, job, restart)
    if plan is not None:
        _start_next(change, job, restart.incident, plan)
    elif fenced and (why := hopeless(change, job)):
        end(change, job, JobStatus.FAILED, why, restart.incident)
    elif change.now >= restart.deadline:
        _give_up(change, job, restart.incident, fenced)


def wakes(change: Change, job: Job) -> list[float]:
    """When `advance` may do something though nothing happened (seconds since 1970)."""
    restart = job.restart
    return [] if restart is None else [restart.due, restart.deadline, *waits(change, job, restart)]


def _blame_lost_link(change: Change, job: Job) -> None:
    """Peers lost a member and so did we: two witnesses, so its node is the cause."""
    for place in job.placements:
        if place.rank not in job.exits and lost(change.state.nodes[place.node], change.now):
            text = f"{place.node} is lost: its link is down, and its peers lost it too"
            report(change, job, "node", text, known=True, node=place.node, gone=True)
            return


def _start_next(change: Change, job: Job, key: str, plan: tuple[Placement, ...]) -> None:
    old = {place.rank: place.node for place in job.placements}
    start(change, job, plan, f"takes over from generation {job.generation}", key)
    job.fruitless += 1
    incident = change.incident(key)
    incident.restart_generation, incident.restarted_at, incident.resumed_from = job.generation, change.now, ""
    moves = ", ".join(_move(place, old[place.rank]) for place in plan)
    change.note(key, f"restarted: generation {job.generation}: {moves}")


def _move(place: Placement, old: str) -> str:
    way = "stays on" if place.node == old else f"moves from {old} to"
    return f"rank {place.rank} {way} {place.node}"


def _give_up(change: Change, job: Job, key: str, fenced: bool) -> None:
    """No restart within the time for it: end the job, with the reason, rather than wait for ever or guess."""
    waited = f"{change.policy.node_return_s:.0f} s"
    if fenced:
        why = f"no spare is left and no node came back within {waited}"
        if failures := told(job):
            why += f" ({failures})"
    else:
        why = f"no member of generation {job.generation} could be proven stopped within {waited}"
        question = f"Are the workers of {job.id}, generation {job.generation}, gone? None of their nodes answers."
        change.act(AskHuman, job, "", why, incident=key, question=question)
    end(change, job, JobStatus.FAILED, why, key)
