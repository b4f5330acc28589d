"""What one forward and backward gave, and what the checks between ranks add to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agent.model.crossing import Comparison
from agent.model.fp8 import Summary
from agent.training.lost import COVERED, Lost
from agent.training.reduction import Reduction, worst
from agent.training.seals import Garbled, alarm_of
from diagnostics.health import Alarm
from diagnostics.sensors.digest import digest
from diagnostics.sensors.multilinear import MASK
from diagnostics.sensors.statistics import Statistic


@dataclass(frozen=True, slots=True)
class Computation:
    """What one forward and backward gave. `alarm` is `not (reading <= 1)`; `counts` is int64 [MoE layers, experts];
    `fp8` has a summary for each kind of tensor that was quantised, and is empty in other precisions; `lost` is what the
    sensors should have seen and did not; `unusual` are the scalars that are least like those of the steps before, the
    most unusual first: evidence, on which nothing is decided.

    With a mesh, `clock` counts the exchanges with other ranks before the first alarm, and `crossing` is what the rank's
    tokens sent to other nodes. `deviation` stands for the gradients of a replay that had to stop, because it sent other
    rows than the run it repeats. `garbled` is a piece of an exchange that arrived otherwise than it was sent, if that
    came before whatever else alarmed; `astray` is 0, summed over the ranks that exchange tokens, if none went astray.
    """

    loss: float
    reading: float
    alarm: bool
    alarms: tuple[Alarm, ...]
    checks: int
    counts: Tensor
    tokens: int
    fp8: tuple[Summary, ...] = ()
    lost: Lost = COVERED
    unusual: tuple[Statistic, ...] = ()
    clock: int = 0
    crossing: Comparison | None = None
    deviation: str = ""
    garbled: Garbled | None = None
    astray: int = 0


def with_seals(computation: Computation, garbled: Sequence[Garbled], pieces: int) -> Computation:
    """The computation whose `pieces` were compared with what was sent, `garbled` among them, the earliest first."""
    computation = replace(computation, checks=computation.checks + pieces)
    if not garbled:
        return computation
    # What a check saw after that exchange may have come with it; what it saw before did not.
    clock = garbled[0].number + 1
    leads = not computation.alarm or clock <= computation.clock
    seen = tuple(alarm_of(piece) for piece in garbled)
    return replace(
        computation,
        reading=worst((computation.reading, *(alarm.reading for alarm in seen))),
        alarm=True,
        alarms=seen + computation.alarms if leads else computation.alarms + seen,
        clock=clock if leads else computation.clock,
        garbled=garbled[0] if leads else None,
    )


def with_sums(computation: Computation, reduction: Reduction, exchanges: int) -> Computation:
    """The computation with the checks of its sums; what alarms in them alone does so after all `exchanges`."""
    return replace(
        computation,
        reading=worst((computation.reading, reduction.reading)),
        alarm=computation.alarm or bool(reduction.strays),
        alarms=computation.alarms + reduction.alarms,
        checks=computation.checks + reduction.checks,
        clock=computation.clock if computation.alarm else exchanges,
    )


def astray(counts: Tensor, served: Sequence[Tensor], own: range) -> int:
    """Hash of what this rank's experts got, less that of what its router chose; 0 without other ranks' experts.

    The hash is linear, so over the ranks of a group they add up to 0 if each choice came to its expert. `counts` is
    int64 [MoE layers, experts], the router's; `served` has for each of these layers the numbers of `own` experts that
    rows came for, -1: none.
    """
    if not served:
        return 0
    got = torch.zeros_like(counts)
    for layer, numbers in zip(got, served, strict=True):
        layer[own.start : own.stop] = numbers[numbers >= 0].bincount(minlength=len(own))
    return (digest(got) - digest(counts)) & MASK
