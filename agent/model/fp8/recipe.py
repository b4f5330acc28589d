"""The recipe of section 3.3.2: which values share a scale, how the scale follows from them, and what a back end does.

A linear y[T, N] = x[T, K] w[N, K]^T has three products, each C[M, N] = A[M, K] B[N, K]^T with both operands quantised
along the dimension that is summed over:

    fprop  y  = x w^T         x in 1x128 along K, w in 128x128
    dgrad  dx = dy w          dy in 1x128 along N, w in 128x128 (the same values as in fprop)
    wgrad  dw = dy^T x        dy^T and x^T in 1x128 along T, the tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agent.model.fp8.blocks import Blocks
from agent.model.fp8.tally import Tally

#: Values that share a scale, along the dimension that is summed over (section 3.3.2).
BLOCK = 128
#: The largest E4M3 value: 1.75 * 2^8.
LARGEST = 448.0
#: Blocks whose largest magnitude is smaller are scaled as if it were this (the published kernels' guard against 0 / 0).
LEAST_AMAX = 1e-4
#: A block that reaches this is NaN as a whole, as one with an infinity is: 2^100 in a model is not a number to go on
#: with, and below it no intermediate value of any back end overflows fp32.
NOT_BELOW = 2.0**100
#: E4M3's smallest normal value, 2^-6; below it values are multiples of 2^-9.
LEAST_NORMAL = 2.0**-6


@dataclass(frozen=True)
class Recipe:
    """power_of_two: scales are rounded up to powers of two, which makes dequantised values exact in bf16."""

    power_of_two: bool = True

    def scales(self, amax: Tensor) -> Tensor:
        """Scales for blocks with these largest magnitudes (fp32, any shape): max(amax, 1e-4) / 448.

        NaN where amax is NaN, infinite or at least 2^100, so that the whole block is.
        """
        scale = amax.clamp(min=LEAST_AMAX) / LARGEST
        if self.power_of_two:
            # Adding all ones below the exponent carries into it unless the mantissa is zero: the next power of two.
            scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        return scale.masked_fill_(torch.logical_not(amax < NOT_BELOW), float("nan"))


class Backend(Protocol):
    """Quantises and multiplies on one kind of device. All inputs are fp32 or bf16 matrices; results are fp32.

    `tally`, where given, takes the statistics of what is quantised; it never waits for the device.
    """

    recipe: Recipe

    def along_rows(self, x: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] quantised in 1x128 blocks along k."""

    def along_columns(self, x: Tensor) -> Blocks:
        """The transpose of [k, columns], quantised in 1x128 blocks along k: a matrix [columns, k]."""

    def tiles(self, weight: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] quantised in 128x128 blocks."""

    def product(self, left: Blocks, right: Blocks) -> Tensor:
        """left [M, K] times the transpose of right [N, K]: fp32 [M, N], sums promoted to fp32 at least every 128."""
