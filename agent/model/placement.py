"""Where experts and their redundant copies go, from a measured load: a busy expert gets copies, devices equal work.

The scheme is DeepSeek's expert-parallelism load balancer (section 3.4.1 names its aim; the public EPLB has the rule):
whole groups of experts to nodes, so that node-limited routing stays within few nodes; then copies for the busiest
experts of each node; then copies to the node's devices. Every step is greedy and pure: the same load, the same
placement.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


class PlacementError(ValueError):
    """A placement that cannot be; the message names the argument."""


@dataclass(frozen=True, slots=True)
class Placement:
    """``devices[d]`` are the experts whose copies device d holds, equally many on each; devices of a node are adjacent.

    Invariants: every expert is somewhere; the tokens of an expert are divided equally among its copies.
    """

    devices: tuple[tuple[int, ...], ...]
    nodes: int

    @property
    def copies(self) -> dict[int, int]:
        """How many copies each expert has."""
        held = [expert for device in self.devices for expert in device]
        return {expert: held.count(expert) for expert in sorted(set(held))}

    def loads(self, load: Sequence[float]) -> list[float]:
        """Load of each device when experts have ``load``."""
        copies = self.copies
        return [sum(load[expert] / copies[expert] for expert in device) for device in self.devices]

    def balancedness(self, load: Sequence[float]) -> float:
        """Mean load of the devices over the largest: 1 when all have the same, and when there is no load."""
        loads = self.loads(load)
        return sum(loads) / len(loads) / max(loads) if max(loads) > 0 else 1.0

    def node_of(self, device: int) -> int:
        """The node that holds a device."""
        return device * self.nodes // len(self.devices)


def place(load: Sequence[float], copies: int, devices: int, nodes: int = 1, groups: int = 1) -> Placement:
    """Place ``copies`` copies of the experts of one layer.

    With groups that divide among the nodes, each group stays on one node; otherwise nodes and groups play no part in
    the choice. Where the experts of a node divide among its devices, no node's busiest device carries more than if they
    were packed without copies.

    Args:
        load: of each expert, >= 0; tokens of recent steps, say.
        copies: how many in all, at least one per expert.
        devices: how many; they divide the copies, and the nodes divide them.
        nodes: hosts of the devices.
        groups: of experts, as in ``n_group``; they divide the experts.

    Raises:
        PlacementError: an argument is out of range or does not divide; it is named.
    """
    experts = len(load)
    _check(load, copies, devices, nodes, groups)
    if groups % nodes:
        return Placement(tuple(map(tuple, _on_devices(list(range(experts)), load, copies, devices))), nodes)
    size = experts // groups
    weights = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    placed: list[tuple[int, ...]] = []
    for held in packed(weights, nodes):
        local = [g * size + i for g in held for i in range(size)]
        placed += map(tuple, _on_devices(local, load, copies // nodes, devices // nodes))
    return Placement(tuple(placed), nodes)


def packed(weights: Sequence[float], bins: int) -> list[list[int]]:
    """Items into bins of equally many: the heaviest first, each to the lightest bin that has room (LPT with a cap)."""
    room = len(weights) // bins
    held: list[list[int]] = [[] for _ in range(bins)]
    queue = [(0.0, b) for b in range(bins)]
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        carried, b = heapq.heappop(queue)
        held[b].append(item)
        if len(held[b]) < room:
            heapq.heappush(queue, (carried + weights[item], b))
    return held


def replicated(weights: Sequence[float], copies: int) -> list[int]:
    """Copies of each item, at least one: each further copy goes to the item whose copies carry most."""
    counts = [1] * len(weights)
    queue = [(-weight, item) for item, weight in enumerate(weights)]
    heapq.heapify(queue)
    for _ in range(copies - len(weights)):
        _, item = heapq.heappop(queue)
        counts[item] += 1
        heapq.heappush(queue, (-weights[item] / counts[item], item))
    return counts


def _on_devices(experts: list[int], load: Sequence[float], copies: int, devices: int) -> list[list[int]]:
    """Copies of these experts on devices.

    Greedy packing of the copies may, on rare loads, end above a packing without copies. Then that one is taken, and
    the room left on a device repeats experts it already has, which moves no load.
    """
    weights = [load[expert] for expert in experts]
    spread = _spread(weights, replicated(weights, copies), devices)
    if len(experts) % devices == 0:
        plain = packed(weights, devices)
        if max(map(sum, _carried(plain, weights))) < max(map(sum, _carried(spread, weights))):
            room = copies // devices
            spread = [(held * -(-room // len(held)))[:room] for held in plain]
    return [[experts[item] for item in sorted(held)] for held in spread]


def _spread(weights: Sequence[float], counts: Sequence[int], devices: int) -> list[list[int]]:
    items = [item for item, count in enumerate(counts) for _ in range(count)]
    return [[items[i] for i in held] for held in packed([weights[item] / counts[item] for item in items], devices)]


def _carried(held: Sequence[Sequence[int]], weights: Sequence[float]) -> list[list[float]]:
    """Load of each copy on each device."""
    everywhere = [item for device in held for item in device]
    counts = [everywhere.count(item) for item in range(len(weights))]
    return [[weights[item] / counts[item] for item in device] for device in held]


def _check(load: Sequence[float], copies: int, devices: int, nodes: int, groups: int) -> None:
    experts = len(load)
    faults = (
        (experts < 1, "load: no expert"),
        (any(not (math.isfinite(one) and one >= 0) for one in load), "load: must be finite and >= 0"),
        (min(devices, nodes, groups) < 1, f"devices, nodes, groups: must be >= 1, not {devices}, {nodes}, {groups}"),
        (copies < experts, f"copies: {copies} of {experts} experts; each needs one"),
        (devices > 0 and copies % devices, f"copies: {copies} do not divide among {devices} devices"),
        (nodes > 0 and devices % nodes, f"devices: {devices} do not divide among {nodes} nodes"),
        (groups > 0 and experts % groups, f"groups: {experts} experts do not divide into {groups} groups"),
    )
    for wrong, told in faults:
        if wrong:
            raise PlacementError(told)
