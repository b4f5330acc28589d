"""What ranks that share their gradients agree on before any of them commits a step: whether it is clean on all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from diagnostics.sensors.quiet import quiet

if TYPE_CHECKING:
    from diagnostics.sensors.guarded_step import GuardedStep

_log = logging.getLogger("assay")


class Agreement(NamedTuple):
    """dirty: the first rank on which the step is not clean; corrupted: the first whose state itself was found wrong.

    None where there is none.
    """

    dirty: int | None
    corrupted: int | None


def clean_everywhere(step: GuardedStep, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the step is clean on every rank of the group (None: the default one): the same answer on all of them.

    Where gradients are averaged over ranks a wrong one is everybody's, and only the rank that made it has an alarm. So
    every rank asks this, once a step and after its block, before it lets the optimizer step: it waits for the others,
    as any collective does. Without torch.distributed, or alone in the group, it is `step.clean`.
    Raises RuntimeError within the step's block, and when the step was never entered.
    """
    if step.under_way:
        raise RuntimeError("the step is under way: ask clean_everywhere after its `with` block, on every rank")
    dirty = agree(step, group).dirty
    if dirty is not None and step.clean:
        _log.warning("step not clean: it alarmed on rank %d, not on this one", dirty)
    return dirty is None


def agree(step: GuardedStep, group: dist.ProcessGroup | None = None) -> Agreement:
    """One collective of the group, a maximum, in which every rank must take part. Ranks are those of the world."""
    dirty, corrupted = not step.clean, step.corrupted
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) < 2:
        return Agreement(0 if dirty else None, 0 if corrupted else None)
    ranks = dist.get_process_group_ranks(group)
    first = len(ranks) - dist.get_rank(group)  # the first rank's is the largest
    with quiet():
        mine = [dirty * first, corrupted * first]
        found = torch.tensor(mine, dtype=torch.int32, device=_device(step.device, group))
        dist.all_reduce(found, dist.ReduceOp.MAX, group)
        return Agreement(*(ranks[-value] if value else None for value in found.tolist()))


def _device(near: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend takes tensors: near the model, if it can."""
    kinds = [each.split(":")[0] for each in dist.get_backend_config(group).split(",")]
    return near if near.type in kinds else torch.device(kinds[0])
