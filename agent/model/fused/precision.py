"""In which type the fused operations compute."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 (gradients are checked in it)."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """``x`` in fp32 (fp64 stays); not a copy where it is already."""
    return x.to(wide(x.dtype))
