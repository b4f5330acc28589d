"""The life of a node: which states follow which, and what links, agents and findings do to them."""

from collections.abc import Callable

from controller.core.actions import PrepareStandby, Quarantine, StopGeneration
from controller.core.change import Change
from controller.core.events import AgentHello, Device, FindingCleared, FindingRaised, LinkLost, ProbeResult
from controller.core.policy import Policy
from controller.core.state import ACTIVE, UNDER_WAY, Claim, Job, Node, NodeState, State, Suspicion
from controller.core.suspicion import mean, merged

UNKNOWN, ADMITTING, HEALTHY = NodeState.UNKNOWN, NodeState.ADMITTING, NodeState.HEALTHY
SUSPECT, DRAINING, QUARANTINED = NodeState.SUSPECT, NodeState.DRAINING, NodeState.QUARANTINED

# Nobody starts healthy, and nothing but the end of a drain leads into quarantine. The way out of quarantine (probes,
# probation) goes through ADMITTING.
TRANSITIONS: dict[NodeState, frozenset[NodeState]] = {
    UNKNOWN: frozenset({ADMITTING, HEALTHY, SUSPECT, DRAINING}),
    ADMITTING: frozenset({UNKNOWN, HEALTHY, SUSPECT, DRAINING}),
    HEALTHY: frozenset({UNKNOWN, ADMITTING, SUSPECT, DRAINING}),
    SUSPECT: frozenset({UNKNOWN, ADMITTING, HEALTHY, DRAINING}),
    DRAINING: frozenset({QUARANTINED}),
    QUARANTINED: frozenset({ADMITTING}),
}
USABLE = frozenset({HEALTHY, SUSPECT})
OUT = frozenset({DRAINING, QUARANTINED})
SPENT = 64  # standbys remembered as used up, a node's last; an agent keeps one warm, so late news of older ones is over


class InvalidTransition(Exception):
    """A node was to enter a state that does not follow from its own. Carries the whole story."""

    def __init__(self, node: Node, wanted: NodeState, why: str, event: object) -> None:
        allowed = ", ".join(sorted(TRANSITIONS[node.state]))
        super().__init__(
            f"node {node.name} cannot go from {node.state} to {wanted} ({why}); allowed from {node.state}: {allowed}; "
            f"epoch {node.epoch}, linked {node.linked}, before UNKNOWN it was {node.before_unknown}; "
            f"while deciding {event!r}"
        )
        self.node = node
        self.wanted = wanted


def enter(change: Change, name: str, wanted: NodeState, why: str) -> None:
    """Move a node to `wanted`; staying is allowed. Raises InvalidTransition; the state before stays as it was."""
    node = change.node(name)
    if node.state is wanted:
        return
    if wanted not in TRANSITIONS[node.state]:
        raise InvalidTransition(node, wanted, why, change.event)
    if wanted is UNKNOWN:
        node.before_unknown = node.state
    node.state = wanted


def usable(node: Node) -> bool:
    """Whether the node may be given a rank: reachable and not under a cloud that forbids it."""
    return node.linked and node.state in USABLE


def lost(node: Node, now: float) -> bool:
    """Whether the node's link counts as lost rather than as not yet made."""
    return not node.linked and now >= node.lost_at


def hello(change: Change, event: AgentHello) -> bool:
    """Take note of an agent; True if it is a new life of it, so that whatever ran on the node before is gone."""
    known = change.state.nodes.get(event.node)
    if known is not None and event.epoch < known.epoch:
        return False
    node = change.node(event.node)
    reborn = event.epoch > node.epoch
    node.epoch, node.linked, node.lost_at = event.epoch, True, 0.0
    node.spare, node.devices, node.fingerprint = event.spare, event.devices, event.fingerprint
    node.peer_endpoint = event.peer_endpoint
    for device in event.devices:
        _claim(change, node.name, device)
    if reborn:
        node.spent = (*node.spent, *node.standbys)[-SPENT:]
        node.standbys = {}
        if node.state not in OUT:
            enter(change, node.name, ADMITTING, "a new agent has to show a warm worker first")
        for job in active(change):
            prepare(change, job, node)
        return known is not None and bool(known.epoch)
    alive = {process.pid for process in event.processes if process.role == "standby"}
    node.standbys = {key: standby for key, standby in node.standbys.items() if standby.pid in alive}
    if node.state is UNKNOWN:
        back = node.before_unknown if node.before_unknown is not UNKNOWN else ADMITTING
        enter(change, node.name, back, "the same agent is back")
    return False


def admit(change: Change, name: str) -> None:
    """A node under admission has shown a warm worker. What is held against its devices outlives its agent."""
    doubts = _doubts(change, change.state.nodes[name])
    state = SUSPECT if doubts >= change.policy.suspect_at else HEALTHY
    enter(change, name, state, "it has a warm worker")


def _doubts(change: Change, node: Node) -> float:
    suspicions = [change.state.suspicion.get(identity(change.state, device)) for device in node.devices]
    return max((mean(item, change.now, change.policy) for item in suspicions), default=0.0)


def stop_stragglers(change: Change, event: AgentHello) -> None:
    """Stop workers of generations that are over: a node that was cut off may still run them."""
    node = change.state.nodes[event.node]
    if event.epoch < node.epoch:
        return
    for job_id, generation in sorted({(p.job, p.generation) for p in event.processes if p.role == "worker"}):
        job = change.state.jobs.get(job_id)
        if job is None or (generation >= job.generation and job.status in ACTIVE):
            continue
        told = any(
            isinstance(action, StopGeneration)
            and (action.node, action.job, action.generation) == (event.node, job_id, generation)
            for action in change.state.outstanding.values()
        )
        if not told:
            reason = f"generation {generation} of {job_id} is over"
            change.act(StopGeneration, job, event.node, reason, generation=generation)


def link_lost(change: Change, event: LinkLost) -> bool:
    """A link broke; False if the news is of an older life or of a link that is known to be down."""
    node = change.state.nodes.get(event.node)
    if node is None or event.epoch != node.epoch or not node.linked:
        return False
    unlink(change, event.node, change.now)
    return True


def unlink(change: Change, name: str, lost_at: float) -> None:
    """The node's link is down; it counts as lost from `lost_at` (seconds since 1970) on."""
    node = change.node(name)
    node.linked, node.lost_at = False, lost_at
    if node.state not in OUT:
        enter(change, name, UNKNOWN, "its link is down, which says nothing about its health")


def active(change: Change) -> list[Job]:
    """The jobs that have not ended, by id."""
    return [job for _, job in sorted(change.state.jobs.items()) if job.status in ACTIVE]


def prepare(change: Change, job: Job, node: Node) -> None:
    """Ask for a warm worker, unless the node is to get no more work."""
    if node.state not in OUT:
        reason = f"keep a warm worker of {job.id} on {node.name}"
        change.act(PrepareStandby, job, node.name, reason, spec=job.spec, seconds=change.policy.prepare_s)


Weigh = Callable[[Suspicion | None, float, Policy], Suspicion]


def accuse(change: Change, name: str, device: str, weigh: Weigh) -> float:
    """Note a verdict about a device (`suspicion.blamed`, `doubted` or `excused`) and say how far it is doubted now.

    A healthy node becomes SUSPECT once its device is doubted enough.
    """
    node = change.state.nodes.get(name)
    known = next((item for item in node.devices if item.uuid == device), None) if node is not None else None
    key = device if known is None else identity(change.state, known)
    change.state.suspicion[key] = weigh(change.state.suspicion.get(key), change.now, change.policy)
    level = mean(change.state.suspicion[key], change.now, change.policy)
    if node is not None and level >= change.policy.suspect_at:
        if node.state in (HEALTHY, ADMITTING):
            enter(change, name, SUSPECT, f"suspicion of {device} is {level:.2f}")
        elif node.state is UNKNOWN and node.before_unknown is HEALTHY:
            change.node(name).before_unknown = SUSPECT
    return level


def identity(state: State, device: Device) -> str:
    """What suspicion of a device is kept under: its serial, or its uuid if it has none of its own."""
    claim = state.serials.get(device.serial)
    return device.serial if claim is not None and claim.uuid == device.uuid else device.uuid


def _claim(change: Change, node: str, device: Device) -> None:
    """Let a serial stand for the device that shows it. What is held against the device goes along.

    A board that moved shows it on another host, maybe under another uuid. Two devices that show it at the same time
    have none of their own: a maker's blank, or a node that lies, which must not have others doubted.
    """
    if not device.serial:
        return
    serials = change.state.serials
    old = serials.get(device.serial)
    if old is None or old.uuid == device.uuid or (old.uuid and not _present(change.state, old)):
        serials[device.serial] = Claim(node, device.uuid)
        _rename(change, device.uuid, device.serial)
    elif old.uuid:
        serials[device.serial] = Claim("", "")
        _rename(change, device.serial, old.uuid)


def _present(state: State, claim: Claim) -> bool:
    node = state.nodes.get(claim.node)
    return node is not None and node.linked and any(device.uuid == claim.uuid for device in node.devices)


def _rename(change: Change, old: str, new: str) -> None:
    """Keep under `new` what was held against `old`, together with what is known under the new name."""
    held = change.state.suspicion.pop(old, None) if old != new else None
    if held is not None:
        known = change.state.suspicion.get(new)
        change.state.suspicion[new] = held if known is None else merged(known, held, change.now, change.policy)


def quarantine(change: Change, name: str, job: Job, reason: str, incident: str) -> None:
    """Take a node out of service. It drains first: QUARANTINED is reached when it holds no rank (`settle`)."""
    node = change.state.nodes.get(name)
    if node is None or node.state in OUT:
        return
    enter(change, name, DRAINING, reason)
    change.act(Quarantine, job, "", reason, incident=incident, target=name)


def settle(change: Change) -> None:
    """Nodes that drain and hold no rank of an active job are QUARANTINED."""
    for name, node in sorted(change.state.nodes.items()):
        if node.state is DRAINING and not any(job.holds(name) for job in active(change) if job.status in UNDER_WAY):
            enter(change, name, QUARANTINED, "drained")


def finding_raised(change: Change, event: FindingRaised) -> None:
    """A hardware check found something: kept with the node; a fatal one makes a suspect of it."""
    node = change.node(event.node)
    node.findings[event.finding] = f"{event.severity}: {event.check}: {event.detail}"
    if event.severity == "fatal" and node.state is HEALTHY:
        enter(change, event.node, SUSPECT, event.detail)


def finding_cleared(change: Change, event: FindingCleared) -> None:
    """A finding no longer holds."""
    change.node(event.node).findings.pop(event.finding, None)


def probe_result(change: Change, event: ProbeResult) -> None:
    """A passed probe clears a suspect, if nothing else speaks against it."""
    node = change.state.nodes.get(event.node)
    if node is None or node.state is not SUSPECT or not event.passed or node.findings:
        return
    if _doubts(change, node) < change.policy.suspect_at:
        enter(change, event.node, HEALTHY, f"probe {event.probe} passed and its devices are not doubted")
