"""torch's own block-scaled product on Hopper; quantising is Triton's. Tests compare the shapes and strides of the
arguments with those that torch 2.13 asks for; on an H200, under torch 2.11, `tiny` has trained with it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from agent.model.fp8.blocks import Blocks
from agent.model.fp8.recipe import BLOCK
from agent.model.fp8.triton import Triton

#: cuBLASLt reads FP8 rows and fp32 scales in 16-byte pieces.
_ALIGN = 16
#: Rows that torch's 128x128 scales are padded to, along k (2.13, aten/native/cuda/ScaledBlas.cpp).
_SCALE_ROWS = 4


class Native(Triton):
    """See `recipe.Backend`."""

    def product(self, left: Blocks, right: Blocks) -> Tensor:
        """left [M, K] times the transpose of right [N, K]: fp32 [M, N]."""
        made: Tensor = scaled_mm(**arguments(left, right))
        return made[: left.values.shape[0], : right.values.shape[0]]


def arguments(left: Blocks, right: Blocks) -> dict[str, Any]:
    """`scaled_mm`'s arguments: codes padded with zeros to whole blocks along k and to 16 rows, scales as it lays them.

    1x128 scales: [M, K / 128] with stride (1, M), rows beside each other. 128x128 scales: [K / 128 rounded up to a
    multiple of 4, N / 128 rounded up] with k running fastest.
    """
    a, b = _padded(left.values), _padded(right.values)
    tiled = right.height == BLOCK
    return {
        "mat_a": a,
        "mat_b": b.t(),
        "scale_a": _by_row(left.scales, a.shape[0]),
        "scale_recipe_a": ScalingType.BlockWise1x128,
        "scale_b": _by_tile(right.scales) if tiled else _by_row(right.scales, b.shape[0]),
        "scale_recipe_b": ScalingType.BlockWise128x128 if tiled else ScalingType.BlockWise1x128,
        "output_dtype": torch.float32,
        "use_fast_accum": False,  # fast accumulation keeps partial sums in the tensor core beyond 128
    }


def _padded(codes: Tensor) -> Tensor:
    rows, k = codes.shape
    extra = (0, -k % BLOCK, 0, -rows % _ALIGN)
    return F.pad(codes.view(torch.uint8), extra).view(codes.dtype) if any(extra) else codes


def _by_row(scales: Tensor | None, rows: int) -> Tensor:
    assert scales is not None, "codes come with their scales"
    laid = F.pad(scales.t(), (0, rows - scales.shape[0])).contiguous()
    return laid.as_strided((rows, scales.shape[1]), (1, rows))  # of one block too, whose stride torch would call 1


def _by_tile(scales: Tensor | None) -> Tensor:
    assert scales is not None, "codes come with their scales"
    return F.pad(scales, (0, -scales.shape[1] % _SCALE_ROWS)).contiguous().t()


BACKEND = Native
