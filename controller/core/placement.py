"""Which node gets which rank in the next generation, or that it is better to wait."""

from controller.core.actions import Placement
from controller.core.change import Change
from controller.core.nodes import OUT, usable
from controller.core.state import Job, Node, NodeState, Restart, Standby


def ready(node: Node, job: Job) -> Standby | None:
    """A warm worker of `node` for `job`. Bits hold within one fingerprint, so another one's does not count."""
    if not usable(node):
        return None
    fits = (
        standby
        for _, standby in sorted(node.standbys.items())
        if standby.job == job.id and job.fingerprint in ("", standby.fingerprint)
    )
    return next(fits, None)


def first_plan(change: Change, job: Job) -> tuple[Placement, ...] | None:
    """Ranks for a job that starts: rank i on the i-th member by name; None while there are not enough warm workers.

    Spares help out when members are out of service, cannot make a worker, or are late by `spare_start_s`.
    """
    nodes = [node for _, node in sorted(change.state.nodes.items())]
    members = [node for node in nodes if not node.spare]
    in_service = [node for node in members if node.state not in OUT and not _failing(change, job, node)]
    chosen = [node for node in in_service if ready(node, job)][: job.world]
    short = len(members) >= job.world > len(in_service)
    late = change.now >= job.submitted_at + change.policy.spare_start_s
    if short or late:
        chosen += [node for node in nodes if node.spare and ready(node, job)][: job.world - len(chosen)]
    if len(chosen) < job.world:
        return None
    return tuple(
        _place(change, job, rank, node) for rank, node in enumerate(sorted(chosen, key=lambda n: (n.spare, n.name)))
    )


def next_plan(change: Change, job: Job, restart: Restart) -> tuple[Placement, ...] | None:
    """Ranks for the generation after an outage: each stays on its node where that is good, else goes to a spare.

    None while a node's next warm worker or link may still come, or while the holes cannot be filled.
    """
    keep: dict[int, Node] = {}
    holes: list[Placement] = []
    for place in job.placements:
        node = change.state.nodes[place.node]
        if place.node not in restart.avoid and ready(node, job):
            keep[place.rank] = node
        elif place.node not in restart.avoid and _worth_waiting(change, node, restart):
            return None
        else:
            holes.append(place)
    filled = _fill(change, job, restart, holes, {node.name for node in keep.values()})
    if filled is None:
        return None
    return tuple(_place(change, job, rank, node) for rank, node in sorted((keep | filled).items()))


def hopeless(change: Change, job: Job) -> str:
    """Why no node will ever have a warm worker for `job`, in the words of the newest failures; "" while one may."""
    nodes = [node for _, node in sorted(change.state.nodes.items()) if node.linked and node.state not in OUT]
    if not nodes or not all(_failing(change, job, node) for node in nodes):
        return ""
    return f"no node can prepare a worker: {told(job)}"


def _failing(change: Change, job: Job, node: Node) -> bool:
    """Whether the node has tried often enough, and in vain, to make a worker for `job`."""
    failures = job.failures.get(node.name)
    return failures is not None and failures.count >= change.policy.standby_failures


def told(job: Job) -> str:
    """The failures of standbys by reason, each reason once with its nodes; "" if there are none."""
    nodes: dict[str, list[str]] = {}
    for name, item in sorted(job.failures.items()):
        nodes.setdefault(item.detail, []).append(name)
    return "; ".join(f"{', '.join(names)}: {detail}" for detail, names in nodes.items())


def spared(change: Change, job: Job, name: str) -> bool:
    """Whether there are nodes for all ranks if `name` goes, beside what a restart avoids: in service, or maybe back."""
    back = change.now - change.policy.node_return_s
    free = [
        node
        for node in change.state.nodes.values()
        if not job.holds(node.name)
        and node.name != name
        and node.state not in OUT
        and (node.linked or node.lost_at > back)
    ]
    leaving = {name, *(job.restart.avoid if job.restart is not None else ())}
    holes = [p for p in job.placements if p.node in leaving or change.state.nodes[p.node].state in OUT]
    return len(free) >= len(holes)


def waits(change: Change, job: Job, restart: Restart) -> list[float]:
    """When `next_plan` may say something else though nothing happened (seconds since 1970)."""
    grace = [
        node.lost_at + change.policy.link_grace_s
        for place in job.placements
        if not (node := change.state.nodes[place.node]).linked
    ]
    return [restart.since + change.policy.standby_wait_s, *grace]


def _worth_waiting(change: Change, node: Node, restart: Restart) -> bool:
    if usable(node):
        return change.now < restart.since + change.policy.standby_wait_s
    return node.state is NodeState.UNKNOWN and change.now < node.lost_at + change.policy.link_grace_s


def _fill(
    change: Change, job: Job, restart: Restart, holes: list[Placement], taken: set[str]
) -> dict[int, Node] | None:
    """Nodes for the ranks in `holes`: untouched ones first; nodes that came back help where those do not suffice."""
    free = [node for _, node in sorted(change.state.nodes.items()) if node.name not in taken and ready(node, job)]
    free.sort(key=lambda node: (node.state is NodeState.SUSPECT, not node.spare, node.name))
    fresh = [node for node in free if node.name not in restart.avoid]
    returned = {node.name: node for node in free if node.name in restart.avoid}
    filled: dict[int, Node] = {}
    missing = len(holes) - len(fresh)
    for place in holes:
        if missing > 0 and place.node in returned:
            filled[place.rank] = returned.pop(place.node)
            missing -= 1
    rest = [*fresh, *returned.values()]
    for place in holes:
        if place.rank not in filled:
            if not rest:
                return None
            filled[place.rank] = rest.pop(0)
    return filled


def _place(change: Change, job: Job, rank: int, node: Node) -> Placement:
    standby = ready(node, job)
    assert standby is not None, f"{node.name} was chosen for rank {rank} without a warm worker"
    return Placement(rank, node.name, standby.id, standby.device, standby.pid)
