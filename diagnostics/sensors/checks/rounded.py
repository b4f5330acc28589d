"""The row check of products rounded to bf16: the energy of C S - A (W S) over 32 random sign vectors.

Identity. C = alpha A W + beta D, so for a matrix S of random signs R = C S - alpha A (W S) - beta D S is rounding
noise. A fault delta in one element of a row stands in every column of R, with the signs of S, and so do the roundings
of that row of C: the mean square of a row of R is the squared norm of all its errors, within the chance of 32 draws.
One random vector, as in `gemm`, would have to stand seven standard deviations of the rounding clear; this one stands
clear of the rounding itself. All products are thin, in the operands' own type: an fp32 copy of an operand costs ten
times as much.

Noise of a row, by its sources: the rounding of C, and those of C S and of A (W S), each kappa^2 ||C_i||^2; and the
rounding of W S, kappa^2 sum_k A_ik^2 ||W_k||^2. Tolerance:

    t kappa sqrt(1 + 4 / N) sqrt(p_i + ||A_i||^2 max(gain, mean_k ||W_k||^2)) + z kappa_accumulate |alpha| ||A_i|| ||W||

p_i is the mean square of the row of alpha A (W S) + beta D S, an estimate of ||C_i||^2 that never reads C; gain is the
batch's sum of p over its sum of ||A_i||^2, so that one row's unlucky draw cannot make its tolerance vanish. ||W_k||^2
comes from W S; its mean leaves out rows that are zero, with which an expert's tokens are filled up. Few columns have
few sign vectors, whose residuals repeat each other: hence 4 / N. t = 5.5: among 4,000 clean products of 64 pairs of
kinds of matrices (outliers, lognormal, sparse, all ones; inner dimension 1..600) the largest reading was 0.61, where
all elements of a row are equal and round alike; in 25 steps of `tiny` 0.68, in attention.

On a CPU a bound of the readings comes first where A's norms are not known: with p_i alone the tolerance is smaller, by
the root of two where A and W are alike. Readings that are below 0.75 of it need no other.

Where A and W, or they and D, cancel, the roundings of the check's own products are larger than that: what two outlier
channels leave, the residual of a fit (beta = -1). On a CPU readings above 0.75 are made again in fp32, under the same
tolerance. On a GPU p_i is at least the estimate of the product without D; outlier channels that cancel may alarm there.

Sees: a change of 7.8 kappa ||C_i||, 0.0127 sqrt(N) of the row's rms element; one vector sees 0.016 sqrt(N). Does not
see: wrong A or W, changes after the check, changes below the floor. Cost: two thin products over A and C, one over W.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.rows import bounded, some_strange
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import NORM_FLOOR, Kappa, Z

# A bound of a reading stands for it below this: what calibration leaves readings of rounded results.
_SURE = 0.75

# Of the root of the noise's energy, in units of kappa sqrt(2) ||C_i|| where A and W are alike.
TAIL = 5.5


@lru_cache
def on_device(device: torch.device) -> Any:
    """The module that makes these readings in three kernels; None on a CPU, and where Triton is missing."""
    if device.type != "cuda":
        return None
    try:  # Triton comes with CUDA builds of torch only, so its kernels are imported where they are needed
        return import_module("diagnostics.sensors.kernels.energy")
    except ModuleNotFoundError:
        return None


def mean_gain(estimate: Tensor, squares: Tensor) -> Tensor:
    """[..., 1]: the sum of estimates [..., M] of ||C_i||^2 over that of squares [..., M], ||A_i||^2, where finite."""
    kept, of = (each.sum(-1, keepdim=True) for each in (estimate, squares))
    if kept.is_cuda or some_strange(kept + of):
        finite = estimate.isfinite() & squares.isfinite()
        kept, of = (torch.where(finite, each, 0.0).sum(-1, keepdim=True) for each in (estimate, squares))
    # At most so much where A is all zeros and D is not: no infinity, whose product with 0 is NaN.
    return (kept / of.clamp(min=NORM_FLOOR**2)).clamp_(max=NORM_FLOOR**-2)


def energy_readings(
    c: Tensor, left: Operand, right: Operand, signs: Signs, kappa: Kappa, alpha: float, probed: Tensor | None
) -> Tensor:
    """Readings fp32 [..., M] of bf16 c [..., M, N] against alpha times left [..., M, K] times right [..., K, N].

    probed: beta D S, fp32, broadcast against [..., M, probes]; None without an addend. Never negative; NaN where c, or
    the prediction, is not finite, on a GPU 0 where the addend is not.
    """
    n, inner = c.shape[-1], left.value.shape[-1]
    fused = on_device(c.device) if probed is None else None
    if fused is not None and fused.can_read(c, left.value, right.value):
        found: Tensor = fused.readings(c, left.value, right.value, signs.probes(n, c.dtype), kappa, alpha, TAIL)
        return found
    probes = signs.probes(n, c.dtype)
    seen = right.along(probes)
    predicted = left.along(seen).float()
    if alpha != 1.0:
        predicted.mul_(alpha)
    of_product = None
    if probed is not None:
        of_product = torch.linalg.vector_norm(predicted, dim=-1) if c.is_cuda else None
        predicted.add_(probed)
    residual = torch.linalg.vector_norm((c @ probes).float().sub_(predicted), dim=-1)
    count = probes.shape[1]
    estimate = torch.linalg.vector_norm(predicted, dim=-1).square_().div_(count)
    if of_product is not None:  # a product that the addend cancels is rounded all the same
        estimate = torch.maximum(estimate, of_product.square_().div_(count))
    noise = TAIL * kappa.output * (1 + 4 / n) ** 0.5
    if left.is_dear:
        bound: Tensor = residual / bounded(estimate.sqrt()).clamp_(min=NORM_FLOOR).mul_(noise * count**0.5)
        if bool((bound <= _SURE).all()):
            return bound
    squares = left.row_norms.square()
    weights = torch.linalg.vector_norm(seen, dim=(-2, -1), dtype=torch.float32).square_().div_(count).unsqueeze(-1)
    heavy = (seen != 0).any(-1).sum(-1, keepdim=True).clamp_(min=1)
    typical = weights.mul(alpha * alpha) / heavy
    gain = mean_gain(estimate, squares)
    limit = bounded(estimate.add_(squares.mul_(torch.maximum(gain, typical))).sqrt_().clamp_(min=NORM_FLOOR))
    limit.mul_(noise)
    terms = left.row_norms.clamp(min=NORM_FLOOR) * weights.sqrt_().clamp_(min=NORM_FLOOR)
    limit.add_(terms, alpha=Z * abs(alpha) * kappa.accumulate_at(max(n, inner)))
    readings: Tensor = residual.div(limit).div_(count**0.5)
    if c.is_cuda:  # what a mask closes: see `gemm`
        return readings if probed is None else torch.where(probed.isfinite().all(-1), readings, 0.0)
    if bool((readings <= _SURE).all()):
        return readings
    wide = probes.float()
    exact = (left.fp32 @ (right.fp32 @ wide)).mul_(alpha)
    if probed is not None:
        exact.add_(probed)
    residual = torch.linalg.vector_norm((c.float() @ wide).sub_(exact), dim=-1)
    sharp: Tensor = residual.div_(limit).div_(count**0.5)
    return sharp
