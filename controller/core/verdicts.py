"""What follows from a verdict: which device it is held against, who is taken out, and who is asked."""

from controller.core.actions import AskHuman
from controller.core.change import Change
from controller.core.events import ReplayResult, Vote
from controller.core.jobs import end
from controller.core.nodes import OUT, Weigh, accuse, quarantine
from controller.core.placement import spared
from controller.core.restarts import require
from controller.core.state import Incident, Job, JobStatus
from controller.core.suspicion import blamed, doubted, excused

CORRUPT, FALSE_ALARM, UNDECIDED, SOFTWARE = "CORRUPT", "FALSE_ALARM", "UNDECIDED", "SOFTWARE"


def rule(change: Change, job: Job, key: str, event: ReplayResult, counts: bool = True) -> None:
    """Act on a verdict. It is held against the device as the policy weighs it; only repeated ones cost a restart.

    Of a generation that is being ended already it is recorded and weighed: another device is taken out if there is a
    node for its rank too, nothing is restarted twice, and the job ends only where no device can help.
    counts: False of a corruption that was held against its device already, by what another rank made of it.
    """
    incident = change.incident(key)
    incident.verdict = event.verdict
    incident.decided_at = change.now
    change.note(key, f"decided: {event.verdict}{', recurrent' if event.recurrent else ''}: {event.reason}")
    if event.widened:
        change.note(key, f"recalibrated: {event.widened} tolerances widened or checks muted on rank {event.rank}")
    if event.verdict == CORRUPT:
        _corrupt(change, job, incident, event, counts)
    elif event.verdict == FALSE_ALARM:
        _judge_alarmed(change, job, event, excused)
    elif event.verdict == SOFTWARE:
        why = f"step {event.step} comes out wrong everywhere: {event.reason}"
        end(change, job, JobStatus.FAILED, why, key)
    elif event.verdict == UNDECIDED:
        where = f"rank {event.rank} at step {event.step}" if event.rank >= 0 else f"step {event.step}"
        question = f"Which device corrupted {where}? {event.reason}"
        change.act(AskHuman, job, "", event.reason, incident=key, question=question)
        _judge_alarmed(change, job, event, blamed if _contradicted(event.votes) else doubted)
        if event.recurrent and job.restart is None:
            why = f"step {event.step} keeps failing its checks: {event.reason}"
            end(change, job, JobStatus.FAILED, why, key)


def _judge_alarmed(change: Change, job: Job, event: ReplayResult, weigh: Weigh) -> None:
    """Note a verdict that blames nobody with the device whose sensors alarmed."""
    place = job.placed(event.rank)
    if place is not None:
        accuse(change, place.node, place.device, weigh)


def _contradicted(votes: tuple[Vote, ...]) -> bool:
    """Whether the suspect's own results differ: the bits of one device and one step are one, so it was wrong once."""
    return len({vote.digest for vote in votes if vote.role in ("original", "suspect")}) > 1


def _corrupt(change: Change, job: Job, incident: Incident, event: ReplayResult, counts: bool) -> None:
    """A device is confirmed to have corrupted a step: remember it, and replace its node if it will do it again."""
    place = next((item for item in job.placements if item.node == event.blamed_node), None)
    device = event.blamed_device or (place.device if place else "")
    incident.node, incident.device = event.blamed_node or incident.node, device or incident.device
    if not counts:
        change.note(incident.id, f"held against {device} once: the same corruption reached another rank")
        return
    last = job.corruptions.get(device)
    job.corruptions[device] = event.step
    level = accuse(change, event.blamed_node, device, blamed)
    reasons = []
    if event.recurrent:
        reasons.append("its fault recurs")
    # The same step again is the redo of a held step: a fault that stayed.
    if last is not None and 0 <= event.step - last <= change.policy.recurrence_steps:
        reasons.append(f"it corrupted step {last} and now step {event.step}")
    if level >= change.policy.quarantine_at:
        reasons.append(f"suspicion of it has come to {level:.2f}")
    stayed = event.recurrent or last == event.step
    known = event.blamed_node in change.state.nodes
    why = f"{device}: {'; '.join(reasons)}"
    if reasons and job.restart is not None and (but := _stays(change, job, event)):
        change.note(incident.id, f"{why}; generation {job.generation} ends already, {but}")
    elif reasons and known and (stayed or spared(change, job, event.blamed_node)):
        _replace(change, job, incident.id, event.blamed_node, why)
    elif reasons:  # its redone steps are clean, so the job goes on; a node of nobody's cannot be replaced
        question = f"{device} should be replaced and cannot be: {reasons[0]}. Add a node."
        change.act(AskHuman, job, "", event.reason, incident=incident.id, question=question)


def _stays(change: Change, job: Job, event: ReplayResult) -> str:
    """Why a device to blame beside what the generation ends for is not taken out with it; "" if it is.

    A device that is taken out itself takes nobody along: some other one must have voted, or brought the verdict.
    """
    nodes = change.state.nodes
    voices = {vote.node for vote in event.votes} - {event.blamed_node} or {event.node}
    if event.blamed_node not in nodes:
        return "and its node is not known"
    if nodes[event.blamed_node].state in OUT:
        return "and its node is out of service"
    if all(name in nodes and nodes[name].state in OUT for name in voices):
        return f"and it stays: only {', '.join(sorted(voices))} speaks against it"
    return "" if spared(change, job, event.blamed_node) else "and it stays: no node is left for its rank"


def _replace(change: Change, job: Job, key: str, name: str, why: str) -> None:
    """Quarantine a node and put another in its place; without another, a person has to find one."""
    quarantine(change, name, job, why, key)
    if not job.holds(name):
        return
    if not spared(change, job, name):
        question = f"{name} is quarantined ({why}) and no spare is left. Add a node, then submit {job.id} again."
        change.act(AskHuman, job, "", why, incident=key, question=question)
        end(change, job, JobStatus.FAILED, f"{name} is quarantined and no spare is left: {why}", key)
        return
    job.outage = job.outage or key
    # A restart that is under way for a cause that is not known yet still waits for it.
    require(change, job, job.outage, why, known=job.restart is None, avoid=(name,), first=name)
