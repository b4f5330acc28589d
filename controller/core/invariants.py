"""What must hold after every decision, whatever happened: the promises that the rest relies on."""

from collections.abc import Callable
from itertools import chain

from controller.core.nodes import OUT
from controller.core.state import ACTIVE, UNDER_WAY, Job, JobStatus, NodeState, State


def invariants(state: State) -> list[str]:
    """Every broken promise in words; an empty list if all hold."""
    per_job = chain.from_iterable(rule(state, job) for job in state.jobs.values() for rule in JOB_RULES)
    return [*per_job, *_nodes(state), *_incidents(state), *_ids(state)]


def broken_steps(before: State, after: State) -> list[str]:
    """Promises about two states in a row: what only grows must not shrink."""
    found = []
    for key, old in before.jobs.items():
        new = after.jobs.get(key)
        if new is None:
            found.append(f"job {key} was forgotten")
        elif new.generation not in (old.generation, old.generation + 1):
            found.append(f"job {key}: generation went from {old.generation} to {new.generation}")
        elif new.generation > old.generation > 0 and old.generation not in new.proofs:
            found.append(f"job {key}: generation {new.generation} started without proof against {old.generation}")
        elif new.committed_step < old.committed_step:
            found.append(f"job {key}: committed step went from {old.committed_step} to {new.committed_step}")
    for key, node in before.nodes.items():
        if key not in after.nodes or after.nodes[key].epoch < node.epoch:
            found.append(f"node {key}: its epoch shrank, or it was forgotten")
    if after.next_action < before.next_action or after.next_incident < before.next_incident:
        found.append("an id counter went back")
    found += [f"incident {key} was forgotten" for key in before.incidents if key not in after.incidents]
    return found


def _placements(state: State, job: Job) -> list[str]:
    if job.status not in UNDER_WAY:
        return []
    ranks = [place.rank for place in job.placements]
    homes = [place.node for place in job.placements]
    found = []
    if ranks != list(range(job.world)):
        found.append(f"job {job.id}: ranks {ranks} instead of 0..{job.world - 1}, each once")
    if len(set(homes)) != len(homes):
        found.append(f"job {job.id}: a node holds two ranks: {homes}")
    for home in homes:
        if state.nodes[home].state is NodeState.QUARANTINED:
            found.append(f"job {job.id}: quarantined node {home} holds a rank of generation {job.generation}")
    return found


def _fencing(state: State, job: Job) -> list[str]:
    old = job.generation - 1
    missing = old >= 1 and old not in job.proofs
    return [f"job {job.id}: generation {job.generation} runs without proof that {old} cannot"] if missing else []


def _restarting(state: State, job: Job) -> list[str]:
    found = []
    if (job.restart is not None) != (job.status is JobStatus.RESTARTING):
        found.append(f"job {job.id}: is {job.status} with restart {job.restart}")
    if job.restart is not None and job.restart.incident != job.outage:
        found.append(f"job {job.id}: restarts for {job.restart.incident}, but its outage is {job.outage or 'none'}")
    if job.outage and job.status not in UNDER_WAY:
        found.append(f"job {job.id}: outage {job.outage} is open though it is {job.status}")
    if job.outage and state.incidents[job.outage].closed_at is not None:
        found.append(f"job {job.id}: its outage {job.outage} is closed")
    return found


def _gates(state: State, job: Job) -> list[str]:
    return [
        f"job {job.id}: gate {key} of {gate.incident} asked about attempt {gate.asked} of {gate.alarmed}"
        for key, gate in job.gates.items()
        if gate.asked > gate.alarmed or gate.incident not in state.incidents
    ]


def _nodes(state: State) -> list[str]:
    found = []
    for node in state.nodes.values():
        if set(node.standbys) & set(node.spent):
            found.append(f"node {node.name}: a warm worker is also used up")
        if node.linked and node.state is NodeState.UNKNOWN:
            found.append(f"node {node.name}: linked and UNKNOWN")
        if not node.linked and node.state not in OUT and node.state is not NodeState.UNKNOWN:
            found.append(f"node {node.name}: {node.state} without a link")
    return found


def _incidents(state: State) -> list[str]:
    found = []
    for incident in state.incidents.values():
        job = state.jobs.get(incident.job)
        if incident.closed_at is None and (job is None or job.status not in ACTIVE):
            found.append(f"incident {incident.id} is open, but job {incident.job} is over")
        if incident.recovered_at is not None and incident.closed_at is None:
            found.append(f"incident {incident.id} has recovered and is open")
        if incident.verdict and incident.kind != "sdc":
            found.append(f"incident {incident.id} is a {incident.kind} with verdict {incident.verdict}")
    outages = [item for item in state.incidents.values() if item.closed_at is None and item.kind in OUTAGES]
    for job in state.jobs.values():
        own = [item.id for item in outages if item.job == job.id]
        if len(own) > 1:
            found.append(f"job {job.id}: one outage, several incidents: {own}")
    return found


def _ids(state: State) -> list[str]:
    numbers = [int(key.rsplit("/", 1)[1]) for key in state.outstanding]
    found = [f"action number {number} is not given out yet" for number in numbers if number >= state.next_action]
    if len(set(numbers)) != len(numbers):
        found.append("an action number was given twice")
    return found


OUTAGES = frozenset({"crash", "hang", "node", "checkpoint"})
JOB_RULES: tuple[Callable[[State, Job], list[str]], ...] = (_placements, _fencing, _restarting, _gates)
