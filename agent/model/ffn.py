"""The SwiGLU feed-forward network (arXiv 2002.05202): a dense layer's whole, or one expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.model.fused import Weights
from agent.model.linear import Linear


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); operation names: gate, up, down."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, intermediate_size, dtype)
        self.up = Linear(hidden_size, intermediate_size, dtype)
        self.down = Linear(intermediate_size, hidden_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y

    @property
    def weights(self) -> Weights:
        """The masters, for whoever makes the products of many experts at once."""
        return Weights(self.gate.weight, self.up.weight, self.down.weight)
