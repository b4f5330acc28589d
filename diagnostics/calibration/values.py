"""Clean data of many kinds, the same for a seed on every device: a constant holds for what it was measured on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

KINDS = (
    "normal",
    "ones",
    "positive",
    "biased",
    "outlier channels",
    "outlier rows",
    "lognormal",
    "sparse",
    "zero rows",
    "equal rows",
    "equal channels",
)
SCALES = (1.0, 1e4, 1e-4)

_T = TypeVar("_T")


class Draw:
    """One trial's random choices. Values are made on the CPU, so that devices are given the same ones."""

    def __init__(self, device: torch.device, seed: int, *trial: object) -> None:
        self.device = device
        self.key = zlib.crc32(repr((seed, *trial)).encode())  # of the signs as well
        self._generator = torch.Generator().manual_seed(self.key)

    def below(self, n: int) -> int:
        """A whole number in 0..n-1."""
        return int(torch.randint(n, (), generator=self._generator))

    def pick(self, choices: Sequence[_T]) -> _T:
        """One of them."""
        return choices[self.below(len(choices))]

    def size(self, most: int) -> int:
        """1..most, small ones as often as large ones: uniform in the logarithm."""
        return max(1, int(most ** float(torch.rand((), generator=self._generator))))

    def index(self, below: int, *shape: int) -> Tensor:
        """int64 of `shape` in 0..below-1."""
        return torch.randint(below, shape, generator=self._generator).to(self.device)

    def values(self, *shape: int, dtype: torch.dtype, scale: float = 1.0, kind: str | None = None) -> Tensor:
        """Values of a kind in KINDS (None: a random one), [..., rows, channels], times `scale`."""
        kind = kind or self.pick(KINDS)
        x = torch.ones(shape) if kind == "ones" else torch.randn(shape, generator=self._generator)
        if kind == "equal rows":
            x = x[..., :1, :].expand(shape)
        elif kind == "equal channels":
            x = x[..., :1].expand(shape)
        elif kind == "positive":
            x = x.abs()
        elif kind == "biased":
            x = x + 2.0
        elif kind == "outlier channels":
            x[..., self.below(7) :: 7] *= 100
        elif kind == "outlier rows":
            x[..., self.below(5) :: 5, :] *= 1000
        elif kind == "lognormal":
            x = x * torch.exp(3 * torch.randn(shape, generator=self._generator))
        elif kind == "sparse":
            x = x * (torch.rand(shape, generator=self._generator) < 0.03)
        elif kind == "zero rows":
            x[..., ::2, :] = 0
        return (x * scale).to(self.device, dtype)
