"""The published FP8 weights made whole: E4M3 numbers with one scale for each block of 128 x 128."""

from __future__ import annotations

import torch
from torch import Tensor

#: Edge of a block, section 3.3.2 and ``weight_block_size`` in the published config.json.
BLOCK = 128
#: A quantised weight's scales lie beside it, under its own key and this ending.
SUFFIX = "_scale_inv"


def dequantised(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """weight * scale_inv, block by block.

    Args:
        weight: float8_e4m3fn [rows, columns].
        scale_inv: fp32 [ceil(rows / 128), ceil(columns / 128)]; the published name means the inverse of the factor that
            was applied when quantising, so it multiplies.

    Returns:
        fp32 [rows, columns].
    """
    rows, columns = weight.shape
    by_row = scale_inv.float().repeat_interleave(BLOCK, 0)[:rows]
    return weight.to(torch.float32) * by_row.repeat_interleave(BLOCK, 1)[:, :columns]


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight; blocks at the edges may be smaller than 128."""
    return tuple(-(-size // BLOCK) for size in shape)
