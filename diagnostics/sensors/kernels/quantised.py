"""FP8 quantisation whose own pass gives a product's check: A v, the norms of A, and s W where it is the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from diagnostics.sensors.kernels import programs

#: Values that share a scale; a tile of 128 x 128 shares one, or each of its rows has one (1 x 128).
BLOCK = 128
#: Rows a program takes when each has a scale of its own: 16 x 128 values are 16 a thread in four warps.
_ROWS = 16
#: Warps a program has: 8 hold a tile of 128 x 128 with 64 values a thread (4 took ptxas a minute for 128). On an H200
#: 32768 x 4096 take 0.33 ms so, 0.52 with 16; without the sums 16 are quicker, 0.17 to 0.21.
_WARPS = {False: 4, True: 8}


@dataclass(frozen=True)
class Scaling:
    """How a block's scale follows from its largest magnitude; the defaults are those of DeepSeek-V3's recipe.

    scale = max(amax, least_amax) / largest, rounded up to a power of two if `power_of_two`; a block that reaches
    `not_below`, or has a NaN, is NaN as a whole.
    """

    largest: float = 448.0  # E4M3's largest value
    least_amax: float = 1e-4
    not_below: float = 2.0**100
    power_of_two: bool = True


@dataclass(frozen=True)
class Quantised:
    """E4M3 codes [rows, k] with scales, and fp32 sums over what they stand for, value = code * scale of its block.

    scales: fp32 [rows / height, k / 128], rounded up. along: [rows], the values times the vector over k. squares:
    [rows]. down: [k], the vector over rows times the values, where one was given.
    """

    codes: Tensor
    scales: Tensor
    height: int
    along: Tensor
    squares: Tensor
    down: Tensor | None

    @property
    def row_norms(self) -> Tensor:
        """fp32 [rows]."""
        return self.squares.sqrt()

    @property
    def norm(self) -> Tensor:
        """Frobenius, fp32 []."""
        return self.squares.sum().sqrt()


def quantise(
    x: Tensor, along: Tensor, down: Tensor | None = None, tiled: bool = False, scaling: Scaling | None = None
) -> Quantised:
    """Quantise x [rows, k] (fp32 or bf16, any strides) in blocks of 1x128, or 128x128 if `tiled`, with its sums.

    along: fp32 [k], random signs or the vector that predicts a product's row sums. down: fp32 [rows], or None. Sums
    are made tile by tile and then over tiles, in one order. Raises ValueError, naming what does not fit.
    """
    rows, k = x.shape
    if along.shape != (k,):
        raise ValueError(f"along has shape {tuple(along.shape)}, must be ({k},) for x {tuple(x.shape)}")
    if down is not None and down.shape != (rows,):
        raise ValueError(f"down has shape {tuple(down.shape)}, must be ({rows},) for x {tuple(x.shape)}")
    scaling = scaling or Scaling()
    tall = BLOCK if tiled else _ROWS
    grid = (triton.cdiv(rows, tall), triton.cdiv(k, BLOCK))
    codes = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(grid[0] if tiled else rows, grid[1], dtype=torch.float32, device=x.device)
    row_sums = torch.empty(2, rows, grid[1], dtype=torch.float32, device=x.device)
    column_sums = torch.empty(0 if down is None else grid[0], k, dtype=torch.float32, device=x.device)
    if x.numel():
        programs.quantise_and_sum[grid](
            x,
            along.float().contiguous(),
            along if down is None else down.float().contiguous(),
            codes,
            scales,
            row_sums,
            column_sums,
            rows,
            k,
            x.stride(0),
            x.stride(1),
            scaling.largest,
            scaling.least_amax,
            scaling.not_below,
            HEIGHT=tall,
            SHARED=tiled,
            POWER_OF_TWO=scaling.power_of_two,
            DOWN=down is not None,
            num_warps=_WARPS[tiled],
        )
    along_sums, squares = row_sums.sum(2)
    height = BLOCK if tiled else 1
    return Quantised(codes, scales, height, along_sums, squares, column_sums.sum(0) if down is not None else None)
