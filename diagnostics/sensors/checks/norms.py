"""The checks of layer norm and RMS norm, forward and backward: each row against its signs, its statistics made again.

With x' = (x - m) s (layer norm) or x s (RMS norm, m = 0), s = (ms + eps)^-1/2, ms the mean of (x - m)^2, n the width:
    out = w x' + b
    dx = s (g - mean(g) - x' mean(g x'))      g = w dO; RMS norm without mean(g)
    dw = sum over rows of dO x'               db = sum over rows of dO

Forward. The saved mean and rstd are made again from x, then out r = s (x (w r)) - s m (w r) + b r for the step's
weights r. They are checked apart because backward uses the saved ones.
Backward. dx r = s (dO (w r) - mean(g) sum r - mean(g x') x' r), for each row; dw and db are summed once more, column by
column: the products dO x are made for dx in any case.
The norm's own identity, <x', dx> = s mean(g x') n (1 - mean(x'^2)) = s^3 eps n mean(g x'), about 1e-7 of the norms
where eps is small (and sum dx = 0 for layer norm), says that x' was projected out of g. It is not used: it weighs an
element's fault by x', and so is blind where x is small; the identity above contains it and weighs all elements alike.

Tolerances, per row, ||.|| of elementwise products made from the inputs:
out: z accumulate(n) s (||x w|| + |m| ||w||) + ||b|| alike, and z output of the same in bf16;
mean: z accumulate(n) rms(x); rstd: z accumulate(n) s (1 + m^2 s^2), and 2 roundings each where they are kept in bf16;
dx: z (accumulate(n) (1 + |m| s) + output) s ||dO w||, which also bounds ||dx||, a projection;
dw, db: z (accumulate(rows) + output sqrt(1 + rows / 64)) (root of the sum of the terms' squares + |sum|), where a
term's square includes (dO m s)^2, since x' is a difference of numbers of that size. torch's CPU kernel for bf16 adds
layer norm's dw and db row after row in bf16, whatever the weight's type: a sum that stands still tells nothing, so
there they have no constant ("norm_weight") and the operator is run again for them.

Sees: any element of any result above that. Does not see: wrong x, w, b, dO. Cost: 6 passes forward, 12 backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.sensors.checks import recompute
from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked
from diagnostics.sensors.checks.rows import argument, blocks, by_blocks, ratio, unit_roundoff, worst_element
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import LANE_TERMS, Kappa, UnknownTolerance, Z

SENSOR = "norm"

# Statistics that are kept in a low precision: the rounding of the value, and that of the expectation's own input.
_ROUNDINGS = 2.0


@dataclass(frozen=True, slots=True)
class Norm:
    """Rows to be normalised and what was done to them."""

    x: Tensor  # [rows, n]
    weight: Tensor  # fp32 [n]; ones where there is none
    bias: Tensor | None  # fp32 [n]
    mean: Tensor  # fp32 [rows]; zeros for RMS norm
    rstd: Tensor  # fp32 [rows]

    @classmethod
    def of(
        cls, x: Tensor, width: int, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor
    ) -> Norm:
        """Bring a call's operands into rows of `width`."""
        rows = x.reshape(x.numel() // width if width else 0, width)
        given = x.new_ones(width, dtype=torch.float32) if weight is None else weight.reshape(-1).float()
        rstd = rstd.reshape(-1).float()
        centre = torch.zeros_like(rstd) if mean is None else mean.reshape(-1).float()
        return cls(rows, given, None if bias is None else bias.reshape(-1).float(), centre, rstd)

    def blocks(self) -> Iterable[slice]:
        """Blocks of rows whose temporaries stay small."""
        return blocks(self.x)


def rms_statistics(x: Tensor, eps: float) -> Tensor:
    """rstd fp32 [rows] of rows [rows, n]: (mean of x^2 + eps)^-1/2."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    rstd: Tensor = (norms.square() / x.shape[-1] + eps).rsqrt()
    return rstd


def output_readings(norm: Norm, out: Tensor, signs: Signs, kappa: Kappa) -> Tensor:
    """Readings fp32 [rows] of out [rows, n]: w x' + b."""
    n, found = out.shape[1], []
    r = signs.vector(n)
    weighted, bias = norm.weight * r, norm.bias
    heavy = torch.linalg.vector_norm(norm.weight)
    for block in norm.blocks():
        x, mean, rstd = norm.x[block].float(), norm.mean[block], norm.rstd[block]
        expected = (torch.mv(x, weighted) - mean * weighted.sum()) * rstd
        size = (torch.mv(x.square(), norm.weight.square()).sqrt() + mean.abs() * heavy) * rstd
        if bias is not None:
            expected = expected + torch.dot(bias, r)
            size = size + torch.linalg.vector_norm(bias)
        limit = size * (Z * (kappa.accumulate_at(n) + kappa.output))
        found.append(ratio(torch.mv(out[block].float(), r) - expected, limit))
    return by_blocks(found, out)


def statistics_readings(norm: Norm, eps: float, kept: torch.dtype, kappa: Kappa) -> tuple[Tensor, Tensor]:
    """Readings fp32 [rows] of the mean and of rstd, which were kept in the type `kept`."""
    n = norm.x.shape[1]
    noise = Z * kappa.accumulate_at(n) + _ROUNDINGS * unit_roundoff(kept)
    means, rstds = [], []
    for block in norm.blocks():
        x, mean, rstd = norm.x[block].float(), norm.mean[block], norm.rstd[block]
        variance, centre = torch.var_mean(x, dim=-1, correction=0)
        size = (variance + centre.square()).sqrt()
        expected = (variance + eps).rsqrt()
        means.append(ratio(mean - centre, size * noise))
        rstds.append(ratio(rstd - expected, expected * (1 + (centre * expected).square()) * noise))
    return by_blocks(means, norm.x), by_blocks(rstds, norm.x)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Readings of a norm's three gradients."""

    dx: Tensor | None  # fp32 [rows]
    dw: Tensor | None  # fp32 [1]
    db: Tensor | None  # fp32 [1]


def gradient_readings(
    norm: Norm,
    grad: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    signs: Signs,
    kappa: Kappa,
    of_sums: Kappa,
    centred: bool,
) -> Gradients:
    """Readings of dx [rows, n], dw [n] and db [n] for grad [rows, n].

    kappa, of_sums: the constants of dx's rows, and of the sums that are dw and db; centred: layer norm.
    """
    rows, n = norm.x.shape
    r, found = signs.vector(n), []
    sums = torch.zeros(4, n, dtype=torch.float32, device=grad.device)  # dw, db, and the squares of what they sum
    for block in norm.blocks():
        given, x = grad[block].float(), norm.x[block].float()
        mean, rstd = norm.mean[block], norm.rstd[block]
        product = given * (x - mean[:, None] if centred else x)
        squares = given.square()
        if dx is not None:
            along = torch.mv(product, norm.weight) * rstd / n
            size = torch.mv(squares, norm.weight.square()).sqrt() * rstd
            found.append(_row_of_dx(norm, block, dx[block].float(), given, x, along, size, r, kappa, centred))
        # x' is a difference of two numbers of the size of m s: its rounding is theirs
        rounded = torch.mv(squares.t(), (mean * rstd).square())
        sums[0] += torch.mv(product.t(), rstd)
        sums[1] += given.sum(0)
        sums[2] += torch.mv(product.square_().t(), rstd.square()) + rounded
        sums[3] += squares.sum(0)
    of_w, of_b = (
        None if d is None else _column_reading(d.reshape(-1), sums[i], sums[i + 2].sqrt(), rows, of_sums)
        for i, d in enumerate((dw, db))
    )
    return Gradients(by_blocks(found, grad) if dx is not None else None, of_w, of_b)


def _column_reading(d: Tensor, expected: Tensor, size: Tensor, rows: int, kappa: Kappa) -> Tensor:
    """Reading fp32 [1] of a gradient [n] that sums rows; size: fp32 [n], the root of the sum of their squares."""
    noise = kappa.accumulate_at(rows) + kappa.output * (1 + rows / LANE_TERMS) ** 0.5
    limit = (size + expected.abs()) * (Z * noise)
    return worst_element(d.float()[None], expected[None], limit[None])


def _row_of_dx(
    norm: Norm,
    block: slice,
    dx: Tensor,
    given: Tensor,
    x: Tensor,
    along: Tensor,
    size: Tensor,
    r: Tensor,
    kappa: Kappa,
    centred: bool,
) -> Tensor:
    """Readings fp32 [rows] of one block; along, size: fp32 [rows], the mean of g x' and s ||g||."""
    n, mean, rstd = dx.shape[1], norm.mean[block], norm.rstd[block]
    unit = (torch.mv(x, r) - mean * r.sum()) * rstd
    expected = torch.mv(given, norm.weight * r) - along * unit
    if centred:
        expected = expected - torch.mv(given, norm.weight) * (r.sum() / n)
    limit = size * (Z * (kappa.accumulate_at(n) * (1 + mean.abs() * rstd) + kappa.output))
    return ratio(torch.mv(dx, r) - expected * rstd, limit)


def rms_norm_readings(
    x: Tensor, weight: Tensor | None, eps: float, grad: Tensor, dx: Tensor, signs: Signs, kappa: Kappa
) -> Tensor:
    """Readings fp32 [rows] of an RMSNorm module's dx, whatever operators it is made of.

    Args:
        x: [..., n], the module's input; dx, of the same shape, its gradient.
        weight: [n] or None.
        eps: added to the mean of x^2.
        grad: [..., n], the gradient of the module's output.
        signs, kappa: the step's signs; the constants of "rms_norm" for dx's dtype.
    """
    n = x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), n)
    norm = Norm.of(rows, n, weight, None, None, rms_statistics(rows, eps))
    found = gradient_readings(
        norm, grad.reshape(rows.shape), dx.reshape(rows.shape), None, None, signs, kappa, kappa, False
    )
    assert found.dx is not None
    return found.dx


def _layer_norm(call: Call, bench: Bench) -> Iterable[Checked]:
    out, mean, rstd = call.out
    kappa = bench.kappa("layer_norm", out)
    norm = _norm(call, mean, rstd)
    if out.numel() == 0:
        return
    shape = tuple(out.shape)
    yield Checked(SENSOR, "out", output_readings(norm, out.reshape(norm.x.shape), bench.signs, kappa), shape)
    of_mean, of_rstd = statistics_readings(norm, argument(call, "eps"), mean.dtype, kappa)
    yield Checked(SENSOR, "mean", of_mean, tuple(mean.shape))
    yield Checked(SENSOR, "rstd", of_rstd, tuple(rstd.shape))


def _rms_norm(call: Call, bench: Bench) -> Iterable[Checked]:
    out, rstd = call.out
    kappa = bench.kappa("rms_norm", out)
    norm = _norm(call, None, rstd)
    if out.numel() == 0:
        return
    eps = argument(call, "eps")
    expected = rms_statistics(norm.x, torch.finfo(torch.float32).eps if eps is None else eps)  # torch's own default
    noise = Z * kappa.accumulate_at(norm.x.shape[1]) + _ROUNDINGS * unit_roundoff(rstd.dtype)
    out_rows = out.reshape(norm.x.shape)
    yield Checked(SENSOR, "out", output_readings(norm, out_rows, bench.signs, kappa), tuple(out.shape))
    yield Checked(SENSOR, "rstd", ratio(norm.rstd - expected, expected * noise), tuple(rstd.shape))


def _backward(call: Call, bench: Bench, kernel: str) -> Iterable[Checked]:
    centred = kernel == "layer_norm"
    grad = argument(call, "grad_out")
    kappa = bench.kappa(kernel, grad)
    norm = _norm(call, argument(call, "mean") if centred else None, argument(call, "rstd"))
    if grad.numel() == 0:
        return
    dx, dw, db = call.out if centred else (*call.out, None)
    given, rows = grad.reshape(norm.x.shape), None if dx is None else dx.reshape(norm.x.shape)
    try:
        of_sums = bench.kappa("norm_weight", grad) if centred else kappa
        sums_again: list[Checked] = []
    except UnknownTolerance:
        of_sums, dw, db = kappa, None, None
        of_dx = "" if dx is None else "out"  # results are numbered without those that nobody asked for
        sums_again = [each for each in recompute.check(call, bench) if each.result != of_dx]
    found = gradient_readings(norm, given, rows, dw, db, bench.signs, kappa, of_sums, centred)
    for name, result, readings in (("dx", dx, found.dx), ("dw", dw, found.dw), ("db", db, found.db)):
        if result is not None and readings is not None:
            yield Checked(SENSOR, name, readings, tuple(result.shape))
    yield from sums_again


def _layer_norm_backward(call: Call, bench: Bench) -> Iterable[Checked]:
    return _backward(call, bench, "layer_norm")


def _rms_norm_backward(call: Call, bench: Bench) -> Iterable[Checked]:
    return _backward(call, bench, "rms_norm")


def _norm(call: Call, mean: Tensor | None, rstd: Tensor) -> Norm:
    width = math.prod(argument(call, "normalized_shape"))
    bias = argument(call, "bias") if any(a.name == "bias" for a in call.func._schema.arguments) else None
    return Norm.of(argument(call, "input"), width, argument(call, "weight"), bias, mean, rstd)


CHECKS: dict[torch._ops.OpOverloadPacket, Check] = {
    torch.ops.aten.native_layer_norm: _layer_norm,
    torch.ops.aten.native_layer_norm_backward: _layer_norm_backward,
    torch.ops.aten._fused_rms_norm: _rms_norm,
    torch.ops.aten._fused_rms_norm_backward: _rms_norm_backward,
}
BEFORE: dict[torch._ops.OpOverloadPacket, Before] = {}  # none of them writes to an argument
