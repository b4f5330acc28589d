"""A small mixture-of-experts stack with explicit casts, for tests of the sensors without the real model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """F.linear in a stated precision on an fp32 master weight."""

    def __init__(self, inner: int, outer: int, dtype: torch.dtype) -> None:
        super().__init__(inner, outer, bias=False)
        self.compute = dtype

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(self.compute), self.weight.to(self.compute))


class Expert(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = CastLinear(width, 2 * width, dtype)
        self.down = CastLinear(2 * width, width, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x).float())).float()


class Layer(nn.Module):
    """A dense linear, then experts of which the last never gets a token."""

    def __init__(self, width: int, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.mix = CastLinear(width, width, dtype)
        self.experts = nn.ModuleList(Expert(width, dtype) for _ in range(experts))
        self.close = CastLinear(width, width, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).float()
        parts = x.split([len(x) // 2, len(x) - len(x) // 2])
        x = x + torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=False)])
        return x + self.close(x).float()


class Sample(nn.Module):
    """[tokens, width] -> scalar loss."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 48, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Layer(width, 3, dtype) for _ in range(layers))
        self.head = nn.Linear(width, 40)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x), torch.arange(len(x)) % 40)


def batch(seed: int, tokens: int = 96, width: int = 48) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]
