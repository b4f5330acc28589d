"""The checks of softmax and log-softmax, forward and backward: what a row sums to, whatever its scores were.

softmax, p = exp(x - max) / sum. Identity in fp32: each row sums to 1 and no element is negative. Tolerance of the sum:
z accumulate(n); each element's own error is relative to the element, and those sum to 1. In bf16 and fp16 the rounding
of p would hide most faults of a sum, so the row is computed once more from its scores in fp32, and each element may
differ by its rounding (by three along another dimension than the last, on a CPU). A row that is masked throughout sums
to 0 in `_safe_softmax`; in `_softmax` it is NaN, and reads NaN, which a second run decides (`undecided`).

softmax backward, dx = p (g - s), s = sum p g. Identity, with the step's weights r and, in fp32, again with ones:
dx r = (p g) r - s (p r). With ones it says that the row sums to s (1 - sum p), zero but for the rounding of p.
Tolerance: z accumulate(n) (||p g|| + |s|), and for bf16 results z output (||p g|| + |s| ||p||), a bound of ||dx||.

log-softmax, y = x - logsumexp(x). Computed again, element by element: the row's exp sums to 1, but that sum is blind to
every improbable class, and a label's class is improbable early in training. Tolerance of an element:
z (accumulate(n) + accumulate (|lse| + |y|)); in bf16 and fp16 also the rounding of y, of lse and of the sum, which
torch's CPU kernel keeps in y's type (measured: y = -0.0028 came out as 0).
On a CPU a bound of these readings comes first, in fp32: with d = y - x, each y strays by at most
max d - min d + |log sum exp(y)| from where it belongs. A row whose bound is below a half is not computed again.

log-softmax backward, dx = g - p s, p = exp(y), s = sum g. Identity, with r and, in fp32, ones: dx r = g r - s (p r).
With ones, under cross entropy, the row of dlogits sums to 0 but for the rounding of p. Tolerance: z accumulate(n)
(||g|| + |s|), and z output (||g|| + |s| ||p||) for bf16 results.

Sees: in fp32 a change of p above z accumulate(n) = 9e-7 sqrt(1 + n / 64); of dx above the same times the norms;
of y, and of any low-precision p, a few units in its last place. Does not see: wrong scores, which both sides share; a
wrong score that exp and sum both use, since the row is then stochastic all the same (recomputation sees that); opposite
changes under ones and under r.
Cost in passes over the operands, of which the operator itself takes about 4: softmax 2 in fp32, 10 else; log-softmax
10, 6 where the bound suffices; backwards 8. All but softmax in fp32 are made in blocks that stay in the caches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked
from diagnostics.sensors.checks.rows import (
    PER_DIFFERENCE,
    argument,
    blocks,
    by_blocks,
    ratio,
    rounding,
    rows_of,
    unit_roundoff,
    worst_element,
)
from diagnostics.sensors.tolerance import Kappa, Z

SENSOR = "softmax"

# A bound of a reading stands for it below this: its own roundings are below a quarter. Calibration leaves readings of
# fp32 sums below a half, so the constants that it finds are the same.
_SURE = 0.5


def row_sums(p: Tensor, kappa: Kappa) -> Tensor:
    """Readings fp32 [rows] of probabilities fp32 [rows, n]: the sum is 1. One pass."""
    return _sums_to(p, p.new_ones((), dtype=torch.float32), kappa)


def negatives(p: Tensor) -> Tensor:
    """Readings fp32 [rows] of probabilities [rows, n], exact: none is negative. One pass."""
    if p.shape[1] == 0:
        return p.new_zeros(p.shape[0], dtype=torch.float32)
    return (p.amin(-1) < 0).float() * PER_DIFFERENCE


def probabilities(p: Tensor, x: Tensor, kappa: Kappa, roundings: int = 1) -> Tensor:
    """Readings fp32 [rows] of probabilities [rows, n] against the softmax of scores [rows, n], element by element.

    roundings: how often the kernel rounds to p's type.
    """
    found = []
    for block in blocks(p):
        expected = torch.softmax(x[block].float(), dim=-1)
        limit = rounding(expected, p.dtype).mul_(roundings).add_(expected, alpha=Z * kappa.accumulate_at(p.shape[1]))
        found.append(worst_element(p[block].float(), expected, limit))
    return by_blocks(found, p)


def log_probabilities(y: Tensor, x: Tensor, kappa: Kappa) -> Tensor:
    """Readings fp32 [rows] of log-probabilities [rows, n] against scores [rows, n], element by element."""
    found = []
    for block in blocks(y):
        if y.dtype == torch.float32 and y.device.type == "cpu" and y.shape[1]:
            bound = _log_bound(y[block], x[block].float(), kappa)
            if bool((bound <= _SURE).all()):
                found.append(bound)
                continue
        scores = x[block].float()
        total = torch.logsumexp(scores, dim=-1, keepdim=True)
        expected = scores - total
        limit = (expected.abs() + total.abs()).mul_(Z * kappa.accumulate).add_(Z * kappa.accumulate_at(y.shape[1]))
        if y.dtype != torch.float32:
            limit += rounding(expected, y.dtype) + rounding(total, y.dtype) + unit_roundoff(y.dtype)
        found.append(worst_element(y[block].float(), expected, limit))
    return by_blocks(found, y)


def _log_bound(y: Tensor, x: Tensor, kappa: Kappa) -> Tensor:
    """At least the readings fp32 [rows] of log-probabilities fp32 [rows, n], n > 0; NaN where one is not finite."""
    gaps = y - x
    low, high = gaps.amin(-1), gaps.amax(-1)
    stray = (high - low).add_(y.exp().sum(-1).log_().abs_())
    size = torch.minimum(low.abs(), high.abs())  # of the logsumexp; y's own size widens a limit besides
    return stray.div_(size.mul_(Z * kappa.accumulate).add_(Z * kappa.accumulate_at(y.shape[1])))


def softmax_gradient(dx: Tensor, grad: Tensor, p: Tensor, bench: Bench, kappa: Kappa) -> Tensor:
    """Readings fp32 [rows] of dx [rows, n], the softmax's gradient for grad [rows, n] at p [rows, n]."""
    found = []
    signs = bench.signs.vector(dx.shape[1])
    for block in blocks(dx):
        weights = p[block].float()
        product = weights * grad[block].float()
        found.append(_gradient_readings(dx[block].float(), product, weights, signs, kappa))
    return by_blocks(found, dx)


def log_softmax_gradient(dx: Tensor, grad: Tensor, y: Tensor, bench: Bench, kappa: Kappa) -> Tensor:
    """Readings fp32 [rows] of dx [rows, n], the log-softmax's gradient for grad [rows, n] at y [rows, n]."""
    found = []
    signs = bench.signs.vector(dx.shape[1])
    for block in blocks(dx):
        weights, given = y[block].float().exp(), grad[block].float()
        found.append(_gradient_readings(dx[block].float(), given, weights, signs, kappa))
    return by_blocks(found, dx)


def _gradient_readings(dx: Tensor, terms: Tensor, weights: Tensor, signs: Tensor, kappa: Kappa) -> Tensor:
    """Readings fp32 [rows] of dx = terms - weights sum(terms), all fp32 [rows, n]."""
    total = terms.sum(-1)
    size = total.abs()
    norm = torch.linalg.vector_norm(terms, dim=-1)
    limit = (norm + size).mul_(Z * kappa.accumulate_at(dx.shape[1]))
    along = torch.mv(dx, signs) - (torch.mv(terms, signs) - total * torch.mv(weights, signs))
    if not kappa.output:
        # Not one product with [1, r]: MKL sums 6,497 equal terms to 2e-5 relative, a plain sum is good to 1e-7.
        plain = dx.sum(-1) - (total - total * weights.sum(-1))
        return torch.maximum(ratio(along, limit), ratio(plain, limit))
    # Where p s is below the rounding of g, all of a row round the same way: ones would add that up, signs do not.
    limit.add_(norm + size * torch.linalg.vector_norm(weights, dim=-1), alpha=Z * kappa.output)
    return ratio(along, limit)


def _sums_to(p: Tensor, expected: Tensor, kappa: Kappa) -> Tensor:
    if p.shape[1] == 0:
        return p.new_zeros(p.shape[0], dtype=torch.float32)
    return ratio(p.sum(-1) - expected, expected.new_tensor(Z * kappa.accumulate_at(p.shape[1])))


def _softmax(call: Call, bench: Bench) -> Iterable[Checked]:
    dim = call.args[1]
    kappa = bench.kappa("softmax", call.out)
    p = rows_of(call.out, dim)
    if call.out.dtype == torch.float32:
        yield Checked(SENSOR, "out", row_sums(p, kappa), tuple(call.out.shape))
        yield Checked(SENSOR, "out", negatives(p), tuple(call.out.shape), exact=True)
    else:
        readings = probabilities(p, rows_of(call.args[0], dim), kappa, _roundings(call.out, dim))
        yield Checked(SENSOR, "out", readings, tuple(call.out.shape))


def _roundings(p: Tensor, dim: int) -> int:
    """Along another dimension than the last torch's CPU kernel keeps exp in p's type, and adds what it rounded."""
    last = p.dim() < 2 or dim % p.dim() == p.dim() - 1
    return 1 if last or p.device.type != "cpu" else 3


def _safe_softmax(call: Call, bench: Bench) -> Iterable[Checked]:
    dim = call.args[1]
    kappa = bench.kappa("softmax", call.out)
    p, x = rows_of(call.out, dim), rows_of(call.args[0], dim)
    if p.numel() == 0:
        return
    seen = x.amax(-1) != -torch.inf  # a row masked throughout is all zeros
    if call.out.dtype == torch.float32:
        readings, wrong = _sums_to(p, seen.float(), kappa), negatives(p)
    else:
        masked = (p.float() != 0).any(-1).float() * PER_DIFFERENCE
        readings, wrong = (
            torch.where(seen, probabilities(p, x, kappa, _roundings(call.out, dim)), 0.0),
            torch.where(seen, 0.0, masked),
        )
    yield Checked(SENSOR, "out", readings, tuple(call.out.shape))
    yield Checked(SENSOR, "out", wrong, tuple(call.out.shape), exact=True)


def _log_softmax(call: Call, bench: Bench) -> Iterable[Checked]:
    dim = call.args[1]
    kappa = bench.kappa("log_softmax", call.out)
    readings = log_probabilities(rows_of(call.out, dim), rows_of(call.args[0], dim), kappa)
    yield Checked(SENSOR, "out", readings, tuple(call.out.shape))


def _softmax_backward(call: Call, bench: Bench) -> Iterable[Checked]:
    kappa = bench.kappa("softmax_backward", call.out)
    dim = argument(call, "dim")
    grad, p = rows_of(argument(call, "grad_output"), dim), rows_of(argument(call, "output"), dim)
    readings = softmax_gradient(rows_of(call.out, dim), grad, p, bench, kappa)
    yield Checked(SENSOR, "dx", readings, tuple(call.out.shape))


def _log_softmax_backward(call: Call, bench: Bench) -> Iterable[Checked]:
    kappa = bench.kappa("softmax_backward", call.out)
    dim = argument(call, "dim")
    grad, y = rows_of(argument(call, "grad_output"), dim), rows_of(argument(call, "output"), dim)
    readings = log_softmax_gradient(rows_of(call.out, dim), grad, y, bench, kappa)
    yield Checked(SENSOR, "dx", readings, tuple(call.out.shape))


CHECKS: dict[torch._ops.OpOverloadPacket, Check] = {
    torch.ops.aten._softmax: _softmax,
    torch.ops.aten._safe_softmax: _safe_softmax,
    torch.ops.aten._log_softmax: _log_softmax,
    torch.ops.aten._softmax_backward_data: _softmax_backward,
    torch.ops.aten._log_softmax_backward_data: _log_softmax_backward,
}
BEFORE: dict[torch._ops.OpOverloadPacket, Before] = {}  # none of them writes to an argument
