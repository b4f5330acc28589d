"""A product that gives the row sums of its fp32 accumulator beside its rounded result, and the reading of them.

Identity. acc r = A (W r) for random weights r, acc the accumulator of C = A W. Tolerance of row i as in `checks.gemm`
with nothing for the output's rounding: z kappa_accumulate ||A_i|| ||W||_F. In units of the row's rms element the floor
is that of fp32 results, where the check of bf16 ones (`checks.rounded`) is blind below 0.0127 sqrt(N).

Sees: any change of the accumulator above the floor. Does not see: the rounding to bf16 and what happens to C after it;
wrong A or W. Cost: one multiplication an element in registers, M x N / 64 sums written; what predicts the sums comes
from `quantised` without a pass of its own, or takes one over each of A and W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.kernels import programs
from diagnostics.sensors.kernels.quantised import BLOCK, Quantised
from diagnostics.sensors.tolerance import NORM_FLOOR, Kappa, Z


@dataclass(frozen=True)
class Tiling:
    """How a product is divided: tiles of rows x columns, the terms a step of one sums, Triton's warps and stages."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int


#: The best of seven and of five on an H200 whose stages fit the 99 KiB of shared memory of compute capability 8.9 as
#: well: 8192 x 4096 x 11264 takes 1.19 ms in bf16, where 64 x 64 x 64 takes 2.29, and 1.21 in FP8.
PLAIN = Tiling(128, 128, 64, 4, 3)
SCALED = Tiling(64, 128, BLOCK, 4, 3)
#: Rows of tiles that share what they read of the right operand.
_TOGETHER = 8


@dataclass(frozen=True)
class Product:
    """C, bf16 [M, N], and the fp32 row sums [M] of its accumulator times the signs."""

    out: Tensor
    sums: Tensor


def multiply(left: Tensor, right: Tensor, signs: Tensor, tiling: Tiling = PLAIN, sums: bool = True) -> Product:
    """bf16 left [M, K] times right [K, N], any strides; signs fp32 [N]. Raises ValueError, naming what does not fit.

    `sums` False leaves the sums out (empty): the same kernel as it would be without them, to be timed beside it.
    """
    for name, value in (("left", left), ("right", right)):
        if value.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {value.dtype}, must be torch.bfloat16 (FP8: multiply_quantised)")
    return _product(left, right.t(), signs, None, None, False, tiling, sums)


def multiply_quantised(
    left: Quantised, right: Quantised, signs: Tensor, tiling: Tiling = SCALED, sums: bool = True
) -> Product:
    """left [M, K] in 1x128 blocks times the transpose of right [N, K] in 1x128 or 128x128; signs fp32 [N].

    Partial sums are promoted to fp32 every 128 terms. Raises ValueError, naming what does not fit.
    """
    if left.height != 1:
        raise ValueError(f"left has blocks of {left.height}x128, must be 1x128")
    tiled = right.height == BLOCK
    return _product(left.codes, right.codes, signs, left.scales, right.scales, tiled, tiling, sums)


def _product(
    left: Tensor,
    right: Tensor,
    signs: Tensor,
    scales_left: Tensor | None,
    scales_right: Tensor | None,
    tiled: bool,
    tiling: Tiling,
    summed: bool,
) -> Product:
    """left [M, K] times the transpose of right [N, K]."""
    (m, k), n = left.shape, right.shape[0]
    if right.shape[1] != k:
        raise ValueError(f"left sums over {k} terms, right over {right.shape[1]}")
    if signs.shape != (n,):
        raise ValueError(f"signs has shape {tuple(signs.shape)}, must be ({n},)")
    scaled = scales_left is not None
    alongs = triton.cdiv(n, tiling.columns)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=left.device)
    sums = torch.empty(m, alongs if summed else 0, dtype=torch.float32, device=left.device)
    if m and n:
        programs.multiply_and_sum[(triton.cdiv(m, tiling.rows) * alongs,)](
            left,
            right,
            signs if scales_left is None else scales_left,
            signs if scales_right is None else scales_right,
            signs.float().contiguous(),
            out,
            sums,
            m,
            n,
            k,
            left.stride(0),
            left.stride(1),
            right.stride(0),
            right.stride(1),
            SCALED=scaled,
            TILED=tiled,
            WIDEN=left.device.type == "cpu",
            SUM=summed,
            M=tiling.rows,
            N=tiling.columns,
            K=tiling.terms,
            TOGETHER=_TOGETHER,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    return Product(out, sums.sum(1))


def readings(sums: Tensor, predicted: Tensor, row_norms: Tensor, norm: Tensor, terms: int, kappa: Kappa) -> Tensor:
    """Readings fp32 [M] of accumulator sums [M] against A (W r) [M]: residual / tolerance, NaN where not finite.

    row_norms: of A, [M]. norm: of W, []. terms: the longer of the product's inner and outer dimension. Of kappa only
    `accumulate` counts: nothing has been rounded yet.
    """
    limit = row_norms.clamp(min=NORM_FLOOR) * norm.clamp(min=NORM_FLOOR) * (Z * kappa.accumulate_at(terms))
    return (sums - predicted).abs_().div_(limit)


def readings_of(sums: Tensor, left: Operand, right: Operand, signs: Signs, kappa: Kappa) -> Tensor:
    """The same from the operands, left [M, K] and right [K, N], and the signs that the sums were made with."""
    k, n = right.value.shape
    predicted = torch.mv(left.fp32, torch.mv(right.fp32, signs.vector(n)))
    return readings(sums, predicted, left.row_norms, right.norm, max(n, k), kappa)
