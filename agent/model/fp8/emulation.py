"""Faithful FP8 on a CPU: values are rounded to E4M3 by arithmetic, and products are made of what they stand for.

Rounding to E4M3 keeps four significant bits, or multiples of 2^-9 below 2^-6. Adding and subtracting 1.5 * 2^20 times
a value's own power of two leaves it rounded there, ties to even, by the fp32 adder itself; four passes that need
neither division (with power-of-two scales) nor a cast. torch's cast from E4M3 back takes three times as long as all of
them.

With power-of-two scales a dequantised value has four significant bits, exact in bf16. The products then run with fp32
operands that oneDNN may convert to bf16 without loss, and with fp32 results: an FP8 product up to the order of its
sums. With other scales nothing may be converted: plain fp32 products of values rounded once to fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.model.fp8.blocks import Blocks
from agent.model.fp8.recipe import BLOCK, LEAST_NORMAL, Recipe
from agent.model.fp8.tally import Tally

#: fp32 has 23 bits below the leading one, E4M3 has 3: 2^20 times a value's power of two moves the last kept bit to
#: the end of the sum. 1.5 rather than 1 keeps the sum's exponent when the value is negative.
_SHIFT = 1.5 * 2.0**20
_EXPONENT = 0x7F800000
#: Magnitudes that round to 448: half-way from 416 and above (448 has the even mantissa).
_SATURATES = 432.0
#: Magnitudes that round to zero: up to half of 2^-9 (zero is even).
_VANISHES = 2.0**-10


class Emulation:
    """The back end for CPUs; see `recipe.Backend`."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()

    def along_rows(self, x: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] quantised in 1x128 blocks along k."""
        return Blocks(quantised(x, 1, BLOCK, self.recipe, tally))

    def along_columns(self, x: Tensor) -> Blocks:
        """The transpose of [k, columns], quantised in 1x128 blocks along k: a matrix [columns, k]."""
        return Blocks(quantised(x, BLOCK, 1, self.recipe).t())

    def tiles(self, weight: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] quantised in 128x128 blocks."""
        return Blocks(quantised(weight, BLOCK, BLOCK, self.recipe, tally))

    def product(self, left: Blocks, right: Blocks) -> Tensor:
        """left [M, K] times the transpose of right [N, K]: fp32 [M, N]."""
        with _through_bf16() if self.recipe.power_of_two else _untouched():
            return torch.mm(left.values, right.values.t())


def quantised(x: Tensor, height: int, width: int, recipe: Recipe, tally: Tally | None = None) -> Tensor:
    """fp32 or bf16 [rows, k] with each height x width block rounded to E4M3 under its scale, and scaled back: fp32.

    Blocks at the edges are as large as what is left. A block with a NaN, an infinity or 2^100 is NaN throughout.
    """
    rows, columns = x.shape
    if x.numel() == 0:
        return x.float()
    height, width = min(height, rows), min(width, columns)
    whole = x.float().contiguous()
    if rows % height or columns % width:
        whole = F.pad(whole, (0, -columns % width, 0, -rows % height))
    blocks = whole.view(whole.shape[0] // height, height, whole.shape[1] // width, width)
    magnitudes = blocks.abs()
    amax = _largest(magnitudes)
    scale = recipe.scales(amax)
    out = _rounded(blocks, scale) if recipe.power_of_two else _rounded(blocks / scale, None).mul_(scale)
    if tally is not None:
        tally.add(_counts(magnitudes, amax, scale), x.numel())
    return out.view_as(whole)[:rows, :columns]


def _largest(magnitudes: Tensor) -> Tensor:
    """The largest of each block of [rows, height, columns, width]: [rows, 1, columns, 1]; NaN where there is one."""
    if magnitudes.shape[3] > 1:
        magnitudes = magnitudes.amax(3, keepdim=True)
    return magnitudes.amax(1, keepdim=True) if magnitudes.shape[1] > 1 else magnitudes


def _rounded(x: Tensor, scale: Tensor | None) -> Tensor:
    """x rounded to E4M3 under power-of-two scales (None: under 1), as fp32. Nothing exceeds 448 scales beforehand."""
    step = (x.view(torch.int32) & _EXPONENT).view(torch.float32)  # each value's own power of two
    step = step.clamp_(min=LEAST_NORMAL) if scale is None else torch.maximum(step, scale * LEAST_NORMAL, out=step)
    return torch.add(x, step, alpha=_SHIFT).sub_(step, alpha=_SHIFT)


def _counts(magnitudes: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
    """A row for `Tally.add`. Comparisons go into floats and are summed: four times as fast as counting booleans."""
    flags = torch.empty_like(magnitudes)
    saturated = torch.ge(magnitudes, scale * _SATURATES, out=flags).sum()
    kept = torch.gt(magnitudes, scale * _VANISHES, out=flags).sum()
    filled = torch.gt(magnitudes, 0.0, out=flags).sum()
    return torch.stack([amax.amax(), saturated, filled - kept, filled])


@contextmanager
def _through_bf16() -> Iterator[None]:
    """Let oneDNN convert fp32 operands to bf16 for one product; what is exact in bf16 loses nothing.

    The setting is the process's, so it is put back at once: other fp32 products must keep their bits.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # the module is replaced when imported
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def _untouched() -> Iterator[None]:
    yield
