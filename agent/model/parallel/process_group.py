"""Expert parallelism over torch.distributed: gloo between CPUs. On NCCL it has not run yet."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from agent.model.config import ConfigError
from agent.model.parallel.transport import Echo, ExpertParallel, Transport


class ProcessGroup:
    """A hop whose ranks are those of a torch.distributed group. What a collective raises when a peer is lost passes."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.world = group.size()

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `Transport`."""
        arrived = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows, list(receive), list(send), group=self.group)
        return arrived


def groups(rank: int, world: int, ep: int, local: int, timeout: timedelta | None = None) -> ExpertParallel:
    """Divide the default group's ranks into expert groups, and these into nodes. Every rank calls it, alike.

    Expert group g is ranks [g * ep, (g + 1) * ep); each run of ``local`` of them is a node.

    Args:
        rank: of this process, in the default group.
        world: ranks of the default group.
        ep: ranks among which experts are divided.
        local: ranks of one node within an expert group.
        timeout: of each collective; None: torch's default.

    Raises:
        ConfigError: ``local`` does not divide ``ep``, or ``ep`` the world.
    """
    if ep < 1 or world % ep:
        raise ConfigError("ep", f"{world} ranks do not divide into expert groups of {ep}")
    if local < 1 or ep % local:
        raise ConfigError("local", f"{ep} ranks of an expert group do not divide into nodes of {local}")
    across = within = None
    for start in range(0, world, ep):
        group = range(start, start + ep)
        for i in range(local):
            across = _joined(group[i::local], rank, timeout) or across
        for node in range(0, ep, local):
            within = _joined(group[node : node + local], rank, timeout) or within
    if across is None or within is None:
        raise ConfigError("rank", f"{rank} is none of {world} ranks")
    return ExpertParallel(rank % ep, across, within)


def _joined(ranks: range, rank: int, timeout: timedelta | None) -> Transport | None:
    """The transport of these ranks if this one is among them. A group is made by all ranks of the world together."""
    if len(ranks) == 1:
        return Echo(1) if rank in ranks else None
    group = dist.new_group(list(ranks), timeout=timeout)
    return ProcessGroup(group) if rank in ranks else None
