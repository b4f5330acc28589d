"""Runs the families on clean data, trial by trial, so that every constant has met all that it must hold for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from diagnostics.calibration.gauge import Gauge
from diagnostics.calibration.operators import Family
from diagnostics.calibration.rules import RULES, Constant
from diagnostics.calibration.values import Draw
from diagnostics.sensors.tolerance import ToleranceTable

# Trials of each family and dtype.
TRIALS, QUICK_TRIALS = 400, 25


class DeviceUnusable(RuntimeError):
    """Nothing can be measured there; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and on how much.

    dtypes: float32 is measured before all others, whether it is among them or not: 16-bit kernels sum in fp32.
    table: constants that the checks need of kernels that are not measured.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    families: Mapping[str, Family]
    trials: int  # of each family and dtype
    seed: int
    table: ToleranceTable

    @property
    def kernels(self) -> tuple[str, ...]:
        """Whose constants the families measure."""
        return tuple(dict.fromkeys(kernel for family in self.families.values() for kernel in family.kernels))


@dataclass(frozen=True, slots=True)
class Measured:
    """The constants, and why a kernel has none.

    skipped: what the device or the dtype does not have. refused: what clean readings did not allow; no rounding is so
    large. Both by (dtype, kernel).
    """

    plan: Plan
    constants: dict[tuple[str, str], Constant]
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    overflowed: int = 0  # calls left out, since their result was not finite


def check_device(device: torch.device) -> None:
    """Raises DeviceUnusable where a sum of two numbers cannot be made."""
    try:
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise DeviceUnusable(f"device {device} cannot be used: {_first_line(error)}") from error


def measure(plan: Plan, tell: Callable[[str], object]) -> Measured:
    """Run every trial; `tell` hears of each family as it begins. Raises DeviceUnusable."""
    check_device(plan.device)
    gauge = Gauge(plan.device, plan.kernels, plan.table)
    failed: dict[tuple[str, str], str] = {}
    wanted = (torch.float32, *(dtype for dtype in plan.dtypes if dtype != torch.float32))
    for dtype in wanted:
        for name, family in plan.families.items():
            if dtype in family.dtypes:
                tell(f"{named(dtype)} {name}")
                reason = _tried(plan, gauge, dtype, name, family)
                failed |= {(named(dtype), kernel): reason for kernel in family.kernels if reason}
    return _settled(plan, gauge, failed)


def named(dtype: torch.dtype) -> str:
    """As tables have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _tried(plan: Plan, gauge: Gauge, dtype: torch.dtype, name: str, family: Family) -> str:
    """Why the family does not run there, or nothing."""
    for trial in range(min(plan.trials, family.most or plan.trials)):
        draw = Draw(plan.device, plan.seed, name, named(dtype), trial)
        try:
            with gauge.reading(draw.key):
                made = family.run(draw, dtype)
            if family.check is not None:
                gauge.read(made, partial(family.check, made, gauge))
        except RuntimeError as error:  # torch's only error for a kernel that a device or dtype does not have
            return _first_line(error)
    return ""


def _settled(plan: Plan, gauge: Gauge, failed: dict[tuple[str, str], str]) -> Measured:
    done = Measured(plan, {}, overflowed=gauge.overflowed)
    for dtype in plan.dtypes:
        for kernel in plan.kernels:
            key, constant = (named(dtype), kernel), gauge.constants.get((dtype, kernel))
            if constant is not None and constant.refused:
                done.refused[key] = constant.refused
            elif constant is not None and constant.readings:
                done.constants[key] = constant
                _tie(constant, gauge.constants.get((torch.float32, kernel)))
            else:
                reason = RULES[kernel].lacks(dtype) or failed.get(key)
                done.skipped[key] = reason or "no kernel that the sensors know ran"
    return done


def _tie(constant: Constant, sums: Constant | None) -> None:
    """fp32 operators that ran among 16-bit ones may have raised the constant of fp32 sums after it was taken over."""
    if sums is not None:
        constant.accumulate = max(constant.accumulate, sums.accumulate)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
