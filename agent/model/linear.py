"""The one matrix product with a weight, so that every GEMM of the model looks the same to whoever watches it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T in a stated precision; where a configuration asks for a bias it is added after the product.

    The weight is an fp32 master [out, in]. Activation [tokens, in] and weight are cast explicitly (no autocast), and
    the product is one ``F.linear`` of two matrices: its autograd node is a plain ``MmBackward0``, and the module's name
    is the operation's name. Output [tokens, out] in ``compute_dtype``.
    """

    def __init__(self, in_features: int, out_features: int, compute_dtype: torch.dtype, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=torch.float32)
        self.compute_dtype = compute_dtype

    def reset_parameters(self) -> None:
        """Leave the weight as allocated: ``V3.initialise`` fills it, without touching the global generator."""

    def forward(self, input: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        y = F.linear(input.to(self.compute_dtype), self.weight.to(self.compute_dtype))
        return y if self.bias is None else y + self.bias.to(self.compute_dtype)
