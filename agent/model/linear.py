"""The one matrix product with a weight, so that every GEMM of the model looks the same to whoever watches it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.model.fp8 import Fp8


class Linear(nn.Linear):
    """y = x W^T in a stated precision; where a configuration asks for a bias it is added after the product.

    The weight is an fp32 master [out, in]. Activation [tokens, in] and weight are cast explicitly (no autocast), and
    the product is one ``F.linear`` of two matrices: its autograd node is a plain ``MmBackward0``, and the module's name
    is the operation's name. Output [tokens, out] in ``compute_dtype``.

    With ``torch.float8_e4m3fn`` both operands of all three products are quantised instead (``agent.model.fp8``), and
    the output is bf16; ``fp8`` holds the back end and the statistics.
    """

    def __init__(self, in_features: int, out_features: int, compute_dtype: torch.dtype, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=torch.float32)
        self.compute_dtype = compute_dtype
        self.fp8 = Fp8() if compute_dtype == torch.float8_e4m3fn else None

    def reset_parameters(self) -> None:
        """Leave the weight as allocated: ``V3.initialise`` fills it, without touching the global generator."""

    def forward(self, input: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        y = self._product(input)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, input: Tensor) -> Tensor:
        if self.fp8 is not None:
            return self.fp8(input, self.weight)
        return F.linear(input.to(self.compute_dtype), self.weight.to(self.compute_dtype))
