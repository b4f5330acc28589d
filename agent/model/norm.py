"""RMSNorm (arXiv 1910.07467), which V3 puts before every sub-layer and on both compressed latents (section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agent.model.fp8 import activation_dtype
from agent.model.fused import rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Computed in fp32 whatever the input's dtype; the result is in ``out_dtype`` (bf16 before FP8 products).
    """

    def __init__(self, size: int, eps: float, out_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps
        self.out_dtype = activation_dtype(out_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps, self.out_dtype)
