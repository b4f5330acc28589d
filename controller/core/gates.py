"""Held steps: the third vote for a commit gate, and what the gate's own news mean for it."""

from dataclasses import replace

from controller.core.actions import AskHuman, DeliverVote, Replay
from controller.core.change import Change
from controller.core.events import AuditResult, DigestDisagreement, GateAlarm, ReplayResult, Vote
from controller.core.incidents import add_evidence, add_votes, of_job, open_incident
from controller.core.placement import ready
from controller.core.state import UNDER_WAY, Gate, Job, JobStatus, Node
from controller.core.verdicts import CORRUPT, UNDECIDED, rule


def gate_alarm(change: Change, event: GateAlarm) -> None:
    """A gate holds a step. Opens its incident once, and arranges a third vote when the gate asks for one."""
    job = _running(change, event.job, event.generation, event.node)
    if job is None or job.placed(event.rank) is None:
        return
    text = f"{_alarmed(event)}; the gate holds the step"
    known = f"{event.step}/{event.rank}" in job.gates
    gate = _gate(change, job, event.step, event.rank, text, device=event.device)
    incident = change.incident(gate.incident)
    add_votes(incident, event.votes)
    if known and event.attempt > gate.alarmed:
        again = f"attempt {event.attempt} of step {event.step} alarmed too"
        change.note(gate.incident, again if gate.alarmed else text)
    gate = _keep(job, replace(gate, alarmed=max(gate.alarmed, event.attempt)))
    role = "third" if any(vote.role == "peer" for vote in event.votes) else "peer"
    wanted = event.needs_third and event.attempt > gate.judged
    if wanted and (event.attempt, role) > (gate.asked, gate.role) and not job.restart:
        _ask(change, job, _keep(job, replace(gate, asked=event.attempt, role=role)), event)


def _alarmed(event: GateAlarm) -> str:
    """What held the step: the worst alarm, or what the rows of all ranks said where nothing alarmed at the suspect."""
    worst = max(event.alarms, key=lambda alarm: alarm.reading, default=None)
    if worst is None and event.reason:
        return f"{event.reason} at step {event.step}, rank {event.rank} is asked"
    where = f": {worst.sensor} of {worst.module} {worst.pass_} reads {worst.reading:.3g}" if worst else ""
    return f"rank {event.rank} alarmed at step {event.step}{where}"


def replay_result(change: Change, event: ReplayResult) -> None:
    """A spare's vote for a gate, or the gate's verdict."""
    if not event.verdict:
        _third_vote(change, event)
        return
    job = _under_way(change, event.job, event.generation, event.node)
    if job is None or job.placed(event.rank) is None:
        return
    gate = _gate(change, job, event.step, event.rank, f"the gate holds step {event.step}, rank {event.rank} was asked")
    attempt = event.attempt or max(gate.attempt, 1)
    if gate.judged >= attempt:
        return  # told again
    undecided = event.verdict == UNDECIDED
    _keep(job, replace(gate, judged=attempt, undecided=undecided))
    add_votes(change.incident(gate.incident), event.votes)
    add_evidence(change, gate.incident, event.evidence, event.evidence_note)
    # An undecided step whose redo is undecided again is no passing fault.
    again = undecided and gate.undecided and gate.judged >= event.first_attempt
    counts = event.recurrent or not _told_already(change, job, gate, attempt, event.blamed_device)
    rule(change, job, gate.incident, replace(event, recurrent=event.recurrent or again), counts)


def _told_already(change: Change, job: Job, gate: Gate, attempt: int, device: str) -> bool:
    """Whether another rank's verdict on the same attempt was held against this device: one fault reached several."""
    others = [other for other in job.gates.values() if (other.step, other.judged) == (gate.step, attempt)]
    incidents = [change.state.incidents[other.incident] for other in others if other.rank != gate.rank]
    return any(incident.verdict == CORRUPT and incident.device == device for incident in incidents)


def digest_disagreement(change: Change, event: DigestDisagreement) -> None:
    """Ranks committed different states. The gate rolls back and redoes the step; the blamed device is held to it."""
    job = _under_way(change, event.job, event.generation, event.node)
    if job is None:
        return
    place = job.placed(event.blamed_rank)
    text = _difference(event)
    if place is not None and (known_as := _told_before(change, job, event, place.device)):
        change.note(known_as, f"{text}: {event.reason}")
        return
    # The gate and the record both compare digests: the first to report them speaks for both.
    known = [gate for gate in job.gates.values() if gate.step == event.step]
    after = [gate for gate in known if change.state.incidents[gate.incident].before_commit is False]
    echoed = [gate for gate in after if event.times <= max(1, gate.differed)]  # else a redo was committed wrong as well
    if any(event.blamed_rank in (-1, gate.rank) for gate in echoed):
        return
    unclaimed = next((gate for gate in echoed if gate.rank < 0), None)
    if unclaimed:  # the record saw it first and could not tell whose state is wrong
        gate = _blame_late(change, job, unclaimed, event.blamed_rank, text)
        attempt = gate.attempt
    else:
        gate = _gate(change, job, event.step, event.blamed_rank, text, before_commit=False)
        change.incident(gate.incident).before_commit = False  # also of one that was held before it was committed
        attempt = gate.attempt + 1
    _keep(job, replace(gate, judged=attempt, differed=event.times))
    for other in [other for other in job.gates.values() if other.step == event.step]:
        _keep(job, replace(other, undecided=False))  # the step is taken again
    verdict = ReplayResult(
        time=event.time,
        node=event.node,
        job=event.job,
        generation=event.generation,
        step=event.step,
        rank=event.blamed_rank,
        votes=(),
        verdict=CORRUPT if place else UNDECIDED,
        blamed_node=place.node if place else "",
        blamed_device=place.device if place else "",
        recurrent=False,
        reason=event.reason,
        action_id="",
    )
    rule(change, job, gate.incident, verdict)


def _told_before(change: Change, job: Job, event: DigestDisagreement, device: str) -> str:
    """The open incident of an earlier generation that this memory was held against its device in; "" if there is none.

    Whose memory changed is known before its words are made good: if the workers ended in between, it is found again.
    """
    if not _in_memory(event):
        return ""
    steps = (event.step, event.step + 1)  # as the gate's hash, or as ranks that compared the next state, found it
    return next(
        (
            item.id
            for item in of_job(change, job)
            if item.closed_at is None
            and (item.kind, item.verdict, item.device) == ("sdc", CORRUPT, device)
            and item.generation < event.generation
            and item.detected_step in steps
        ),
        "",
    )


def _in_memory(event: DigestDisagreement) -> bool:
    """Whether the state changed in memory since it was committed: then it had the digest of all."""
    return len(set(event.digests.values())) <= 1


def _difference(event: DigestDisagreement) -> str:
    """What is wrong with the states."""
    if not _in_memory(event):
        texts = ", ".join(f"rank {rank} {digest}" for rank, digest in sorted(event.digests.items()))
        return f"the states after step {event.step} differ: {texts}"
    whose = f" of rank {event.blamed_rank}" if event.blamed_rank >= 0 else ""
    return f"the state{whose} after step {event.step} changed in memory"


def _blame_late(change: Change, job: Job, gate: Gate, rank: int, text: str) -> Gate:
    """The rank that an incident without one is about."""
    del job.gates[f"{gate.step}/{gate.rank}"]
    place = job.placed(rank)
    incident = change.incident(gate.incident)
    incident.rank = rank
    incident.node, incident.device = (place.node, place.device) if place else ("", "")
    change.note(gate.incident, text)
    return replace(gate, rank=rank)


def audit_result(change: Change, event: AuditResult) -> None:
    """A spare's recomputation differs from what a rank committed: two witnesses disagree, so a person has to judge."""
    job = _running(change, event.job, event.generation, "")
    if job is None or event.equal or job.placed(event.rank) is None:
        return
    text = f"an audit on {event.node} found other bits for rank {event.rank} at step {event.step}"
    gate = _gate(change, job, event.step, event.rank, text, before_commit=False)
    if gate.judged:
        return
    _keep(job, replace(gate, judged=1))
    change.incident(gate.incident).verdict = UNDECIDED
    question = f"{text}: expected {event.expected}, found {event.found}. Which device is bad?"
    change.act(AskHuman, job, "", text, incident=gate.incident, question=question)


def advance(change: Change, job: Job) -> None:
    """Give up on third votes that did not come in time."""
    for gate in [gate for _, gate in sorted(job.gates.items()) if gate.replay and change.now >= gate.vote_due]:
        no_vote(change, job, gate.replay, f"no vote came within {change.policy.third_vote_s:.0f} s")


def wakes(job: Job) -> list[float]:
    """When `advance` may do something though nothing happened (seconds since 1970)."""
    return [gate.vote_due for gate in job.gates.values() if gate.replay]


def no_vote(change: Change, job: Job, replay: str, why: str) -> None:
    """There will be no third vote from the Replay of that id: the gate must decide without."""
    gate = next((gate for gate in job.gates.values() if gate.replay == replay), None)
    if gate is not None:
        _deliver(change, job, gate, (), why)


def _running(change: Change, job_id: str, generation: int, reporter: str) -> Job | None:
    """The job to alter, if the news is of its running generation and from a member of it (or from the controller)."""
    job = _under_way(change, job_id, generation, reporter)
    return job if job is not None and job.status is JobStatus.RUNNING else None


def _under_way(change: Change, job_id: str, generation: int, reporter: str) -> Job | None:
    """The same, also while that generation is being ended: of what it found nothing is lost."""
    known = change.state.jobs.get(job_id)
    if known is None or known.generation != generation or known.status not in UNDER_WAY:
        return None
    if reporter and not known.holds(reporter):
        return None
    return change.job(job_id)


def _gate(
    change: Change, job: Job, step: int, rank: int, text: str, *, device: str = "", before_commit: bool = True
) -> Gate:
    """The held step, with an incident of its own; opened at its first news."""
    key = f"{step}/{rank}"
    if key not in job.gates:
        incident = open_incident(
            change, job, "sdc", text, rank=rank, device=device, step=step, before_commit=before_commit
        )
        job.gates[key] = Gate(step, rank, incident)
    return job.gates[key]


def _keep(job: Job, gate: Gate) -> Gate:
    job.gates[f"{gate.step}/{gate.rank}"] = gate
    return gate


def _ask(change: Change, job: Job, gate: Gate, event: GateAlarm) -> None:
    """Have a node without a rank recompute the suspect's gradients, from the state of another rank if there is one."""
    voted = {vote.node for vote in event.votes}
    nodes = [node for _, node in sorted(change.state.nodes.items()) if node.name not in voted]
    spare = next((node for node in nodes if not job.holds(node.name) and ready(node, job)), None)
    if spare is None:
        _deliver(change, job, gate, (), f"no spare has a warm worker for a {gate.role} vote")
        return
    if gate.role == "third":
        why = f"rank {gate.rank} and its peer differ at step {gate.step}: a third vote decides"
    else:
        why = f"no other rank can recompute step {gate.step} of rank {gate.rank}: a spare is its peer"
    source = _source(change, job, gate.rank)
    replay = change.act(
        Replay,
        job,
        spare.name,
        why,
        incident=gate.incident,
        seconds=change.policy.third_vote_s,
        spec=job.spec,
        step=gate.step,
        rank=gate.rank,
        source_rank=source[0],
        source=source[1].peer_endpoint,
        attempt=event.attempt,
    )
    _keep(job, replace(gate, replay=replay.id, vote_due=replay.deadline))


def _source(change: Change, job: Job, suspect: int) -> tuple[int, Node]:
    """The rank to read the state from: a suspect's own is the last choice, and so is a node that cannot be reached."""
    places = [(place.rank, change.state.nodes[place.node]) for place in job.placements]
    return min(places, key=lambda place: (place[0] == suspect, not place[1].linked, place[0]))


def _third_vote(change: Change, event: ReplayResult) -> None:
    known = change.state.jobs.get(event.job)
    gate = None
    if known is not None and known.generation == event.generation:
        gate = next((gate for gate in known.gates.values() if gate.replay and gate.replay == event.action_id), None)
    if known is None or gate is None or event.node != _asked(change, gate):
        return
    job = change.job(known.id)
    votes = tuple(replace(vote, role=gate.role) for vote in event.votes)
    add_votes(change.incident(gate.incident), votes)
    _deliver(change, job, gate, votes, f"{event.node} has voted")


def _asked(change: Change, gate: Gate) -> str:
    """The node whose vote is awaited; the id of the order tells it even after the order was acknowledged."""
    action = change.state.outstanding.get(gate.replay)
    return action.node if action is not None else gate.replay.split("/")[-2]


def _deliver(change: Change, job: Job, gate: Gate, votes: tuple[Vote, ...], why: str) -> None:
    """Hand the third vote, or the news that there is none, to every rank: each gate waits for it."""
    _keep(job, replace(gate, replay="", vote_due=0.0))
    for name in dict.fromkeys(place.node for place in job.placements):
        body = {"step": gate.step, "rank": gate.rank, "votes": votes}
        change.act(DeliverVote, job, name, why, incident=gate.incident, **body)
