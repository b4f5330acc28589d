"""What ranks that share their gradients agree on before any of them commits a step: whether it is clean on all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

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


_agreed: WeakKeyDictionary[GuardedStep, dict[dist.ProcessGroup | None, Agreement]] = WeakKeyDictionary()


def clean_everywhere(step: GuardedStep, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the step is clean on every rank of the group (None: the default one): the same answer on all of them.

    Where gradients are averaged over ranks a wrong one is everybody's, and only the rank that made it has an alarm. So
    every rank asks this, after the step's block and before it lets the optimizer step: it waits for the others, as any
    collective does. Without torch.distributed, or alone in the group, it is `step.clean`.
    Raises RuntimeError within the step's block, when the step was never entered, and when another rank could not read
    its step.
    """
    dirty = agree(step, group).dirty
    if dirty is not None and step.clean:
        _log.warning("step not clean: it alarmed on rank %d, not on this one", dirty)
    return dirty is None


def corrupted_anywhere(step: GuardedStep, group: dist.ProcessGroup | None = None) -> bool:
    """Whether `step.corrupted` is true on any rank of the group (None: the default one): the same answer on all.

    Then dropping the step does not help, and all ranks end their loop, with none left that waits for another. Of a step
    the ranks speak once, whichever of this and `clean_everywhere` they ask first. It raises as that does.
    """
    corrupted = agree(step, group).corrupted
    if corrupted is not None and not step.corrupted:
        _log.critical("the state itself is corrupted on rank %d, not on this one", corrupted)
    return corrupted is not None


def agree(step: GuardedStep, group: dist.ProcessGroup | None = None) -> Agreement:
    """One collective of the group, a maximum, in which every rank must take part. Ranks are those of the world.

    After the step's block it always comes out the same, so only the first call is a collective. A rank that cannot
    read its step takes part before it raises, and so all raise.
    """
    if step.under_way:
        raise RuntimeError("the step is under way: ask whether ranks agree after its `with` block, on every rank")
    known = _agreed.setdefault(step, {})
    if group not in known:
        known[group] = _alone(step) if _is_alone(group) else _exchanged(step, group)
    return known[group]


def _alone(step: GuardedStep) -> Agreement:
    return Agreement(None if step.clean else 0, 0 if step.corrupted else None)


def _is_alone(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) < 2


def _exchanged(step: GuardedStep, group: dist.ProcessGroup | None) -> Agreement:
    try:
        mine = (False, not step.clean, step.corrupted)
    except Exception:
        _first_ranks(step, group, (True, True, False))  # the others wait for this one, which raises
        raise
    failed, dirty, corrupted = _first_ranks(step, group, mine)
    if failed is not None:
        raise RuntimeError(f"rank {failed} could not read whether its step is clean: its own error says why")
    return Agreement(dirty, corrupted)


def _first_ranks(step: GuardedStep, group: dist.ProcessGroup | None, mine: tuple[bool, ...]) -> list[int | None]:
    """Of each fact the first rank on which it is true."""
    ranks = dist.get_process_group_ranks(group)
    first = len(ranks) - dist.get_rank(group)  # the first rank's is the largest
    with quiet():
        found = torch.tensor([first * fact for fact in mine], dtype=torch.int32, device=_device(step.device, group))
        dist.all_reduce(found, dist.ReduceOp.MAX, group)
        return [ranks[-value] if value else None for value in found.tolist()]


def _device(near: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend takes tensors: near the model, if it can."""
    kinds = [each.split(":")[0] for each in dist.get_backend_config(group).split(",")]
    return near if near.type in kinds else torch.device(kinds[0])
