"""A model whose blocks are checkpointed, a fault in one call of an operator of a region, and what was compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from diagnostics.sensors.guard import Guard
from diagnostics.sensors.regions import inside

INTEGERS = {2: torch.int16, 4: torch.int32}


class Block(nn.Module):
    """norm, SwiGLU, a sum in its middle, dropout, and the residual stream: 8 operators and the dropout's."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = F.silu(self.gate(h)) * self.up(h) + 0.5
        return x + self.down(F.dropout(h, self.dropout, training=self.dropout > 0))


class Stack(nn.Module):
    """Two such blocks; `options` are those of torch.utils.checkpoint.checkpoint."""

    def __init__(self, dtype: torch.dtype = torch.float32, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(24, dropout) for _ in range(2)).to(dtype)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, **self.options)
        return x.float().square().mean()


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(10, 24, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


class Flip(TorchDispatchMode):
    """Flips one bit of one element in the n-th result of an operator inside checkpointed regions; counts them."""

    def __init__(self, name: str, at: int, bit: int = 0) -> None:
        super().__init__()
        self.name, self.at, self.bit, self.count = name, at, bit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == self.name and inside():
            if self.count == self.at:
                out.detach().view(-1).view(INTEGERS[out.element_size()])[out.numel() // 3] ^= 1 << self.bit
            self.count += 1
        return out


def compared(guard: Guard) -> list[tuple[str, str]]:
    """Module and operation of every comparison of the guard's last step."""
    return [(site.module, site.operation) for site, _ in guard.log.by_site() if site.sensor == "fingerprint"]
