"""Runs one aten operator and its check, and corrupts results the way devices do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.sensors.checks import recompute
from diagnostics.sensors.checks.operand import Operand, Operands
from diagnostics.sensors.checks.operation import Call, Check, Checked
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.tolerance import Kappa, ToleranceTable, shipped_table

aten = torch.ops.aten
CPU = torch.device("cpu")
SCALES = (1.0, 1e4, 1e-4)
_TABLE = shipped_table()


class CpuBench:
    """A bench with the shipped tolerances, widened by `loose` where a control needs a blind check."""

    def __init__(self, key: int = 0, loose: float = 1.0, table: ToleranceTable = _TABLE) -> None:
        self.signs = Signs(key, CPU)
        self._loose = loose
        self._table = table
        self._operands = Operands()

    def kappa(self, kernel: str, like: Tensor) -> Kappa:
        kappa = self._table.kappa("cpu", str(like.dtype).removeprefix("torch."), kernel)
        return Kappa(kappa.output * self._loose, kappa.accumulate * self._loose, kappa.provenance)

    def operand(self, value: Tensor) -> Operand:
        return self._operands.of(value)


def run(func: torch._ops.OpOverload, *args: Any, before: Any = None, **kwargs: Any) -> Call:
    """The operator's call, with what the sensor or the recomputation keeps of arguments that are written over."""
    with quiet():
        keep = (before or {}).get(func.overloadpacket) or recompute.keeper(func)
        kept = keep(args, kwargs, CpuBench())
        return Call(func, args, kwargs, func(*args, **kwargs), kept)


def checked(checks: dict[Any, Check], call: Call, bench: CpuBench | None = None) -> list[Checked]:
    """Every reading of one call; their form is checked here, once for all sensors."""
    with quiet():
        found = list(checks[call.func.overloadpacket](call, bench or CpuBench()))
    for each in found:
        assert each.readings.dtype == torch.float32
        assert each.readings.dim() == 1
        assert not bool((each.readings < 0).any())
        assert each.readings.numel() <= math.prod(max(1, size) for size in each.shape)
    return found


def by_row(checks: dict[Any, Check], call: Call, bench: CpuBench | None = None) -> Tensor:
    """The largest reading of each row, of one call whose checks all read the rows of one result."""
    return torch.stack([each.readings for each in checked(checks, call, bench)]).amax(0)


def worst(checks: dict[Any, Check], call: Call, bench: CpuBench | None = None) -> float:
    """The largest reading of one call, NaN if one is NaN, 0.0 without any."""
    readings = [each.readings for each in checked(checks, call, bench) if each.readings.numel()]
    return float(torch.cat(readings).amax()) if readings else 0.0


def alarms(checks: dict[Any, Check], call: Call, bench: CpuBench | None = None) -> bool:
    return not worst(checks, call, bench) <= 1.0


def outliers(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values; every seventh channel from a random one on is 30 times larger on half of the seeds."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * scale
    if seed % 2 and shape and shape[-1] > 1:
        x[..., seed % shape[-1] :: 7] *= 30
    return x.to(dtype)


def with_result(call: Call, out: Tensor, place: int | None = None) -> Call:
    """The call with its result, or the result at `place` of several, replaced."""
    if place is not None:
        out = (*call.out[:place], out, *call.out[place + 1 :])
    return replace(call, out=out)


def flipped(t: Tensor, element: int, bit: int) -> Tensor:
    """A copy with one bit of one element flipped (bit 31 is the sign; bf16 has bits 16 to 31)."""
    copy = t.clone(memory_format=torch.contiguous_format)
    if t.dtype == torch.bfloat16:
        words, bit = copy.view(-1).view(torch.int16), bit - 16
        words[element] ^= -(1 << 15) if bit == 15 else 1 << bit
    else:
        words = copy.view(-1).view(torch.int32)
        words[element] ^= -(1 << 31) if bit == 31 else 1 << bit
    return copy


def gross_faults(t: Tensor, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Runs of four at a period, stuck lanes, a scaled tile, NaN, infinity: copies of a result that is not all zeros.

    Sizes are of the order of the tensor's largest element, as a stuck exponent makes them.
    """
    size = float(t.abs().amax()) * 2
    flat = t.flatten()
    period = max(8, flat.numel() // 5)

    def changed(change: Callable[[Tensor], object]) -> Tensor:
        copy = flat.clone()
        change(copy)
        return copy.view(t.shape)

    lanes = (torch.arange(flat.numel()) - seed) % period
    yield "runs of four", changed(lambda c: c.masked_fill_(lanes < 4, size))
    yield "stuck lane", changed(lambda c: c.masked_fill_(lanes == 0, size))
    yield "NaN", changed(lambda c: c[seed % flat.numel()].fill_(math.nan))
    yield "infinity", changed(lambda c: c[seed % flat.numel()].fill_(math.inf))
