"""What no check judges, and why; it is asked whether it is finite where infinities and NaN may pass (`undecided`).

Identity: none. An operator that draws random numbers, a recurrent network's kernel, one of another library, a gradient
that the eyes are kept from: what they make of finite operands is finite. Tolerance: none, a reading is 0 or NaN. Sees:
a result with an infinity or NaN though no operand has one. Does not see: any other wrong value; an infinity that is
meant (an operator of somebody else's that makes a mask of -inf) alarms. Cost: one pass over the result, and one over
the operands where it is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from diagnostics.sensors.checks.operation import Call, Checked

SENSOR = "finite"


def unlike(call: Call) -> str | None:
    """What about a call's tensors no check can bear: of a quantised one even a view of its bits ends the process."""
    results = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
    for value in (*results, *call.args):
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter):
                return f"a {type(value).__name__}, which is no plain tensor"
            if value.is_meta:
                return "a meta tensor, which has no values"
            if value.is_quantized:
                return "a quantised tensor"
            if value.is_nested:
                return "a nested tensor"
            if value._is_zerotensor():
                return "zeros without memory"
    layouts = {value.layout for value in results if isinstance(value, Tensor)} - {torch.strided}
    return f"a result of layout {layouts.pop()}" if layouts else None


def finite_readings(results: Iterable[Tensor], operands: Iterable[Tensor]) -> Iterator[Checked]:
    """A reading fp32 [1] for each result that has values of floating point; on its device, without waiting for it."""
    given = [t for t in operands if _has_values(t)]
    for result in results:
        if _has_values(result):
            reading = strays(result)
            for operand in given if result.is_cuda or bool(reading.isnan()) else ():
                reading = torch.where(strays(operand).isnan().to(reading.device), 0.0, reading)
            yield Checked(SENSOR, "out", reading, tuple(result.shape))


def parameter_readings(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """Readings fp32 [n], NaN or 0, on `device`: whether each of n parameters that have values is finite."""
    kept = [p.detach() for p in parameters if _has_values(p)]
    if not kept:
        return torch.zeros(0, dtype=torch.float32, device=device)
    if all(p.is_cpu for p in kept):
        return torch.cat([strays(p) for p in kept]).to(device)
    largest = torch.stack([norm.abs().float().to(device) for norm in torch._foreach_norm(kept, torch.inf)])
    return largest * 0


def strays(t: Tensor) -> Tensor:
    """fp32 [1] on its device: NaN if an element is not finite, of a complex one either part, else 0. t has elements."""
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    if t.is_cpu and math.isfinite(t.sum()):  # of an infinity or NaN no sum is; three times as fast on a CPU
        return torch.zeros(1, dtype=torch.float32)
    low, high = torch.aminmax(t)
    return (low * 0 + high * 0).float().reshape(1)


def _has_values(t: Tensor) -> bool:
    plain = t.layout is torch.strided and not (t.is_quantized or t.is_nested or t.is_meta or t._is_zerotensor())
    of_torch = type(t) in (Tensor, torch.nn.Parameter)
    return of_torch and plain and t.numel() > 0 and (t.is_floating_point() or t.is_complex()) and t.element_size() > 1
