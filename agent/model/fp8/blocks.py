"""A quantised matrix, as codes with their scales or as the values that these stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, k] that is summed over k.

    values: E4M3 codes, or fp32 values already dequantised where `scales` is None.
    scales: fp32 [rows / height, k / 128], both rounded up; value = code * scale of its block.
    height: rows that share a scale: 1 or 128.
    """

    values: Tensor
    scales: Tensor | None = None
    height: int = 1

    def t(self) -> Blocks:
        """The transpose of a matrix in 128x128 blocks; codes are copied, since kernels read them along k."""
        if self.scales is None:
            return Blocks(self.values.t())
        if self.height == 1:
            raise ValueError("height: only 128x128 blocks have a transpose, not 1x128")
        return Blocks(self.values.t().contiguous(), self.scales.t().contiguous(), self.height)

    def dequantised(self) -> Tensor:
        """fp32 [rows, k]: what the products are made of, rounded once to fp32 where scales are no powers of two."""
        if self.scales is None:
            return self.values
        rows, k = self.values.shape
        tall = self.scales.repeat_interleave(self.height, 0)[:rows] if self.height > 1 else self.scales
        return self.values.to(torch.float32) * tall.repeat_interleave(128, 1)[:, :k]
