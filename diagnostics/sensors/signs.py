"""The random signs a step's checks are made with: drawn from the step's key, so that a replay draws the same."""

from __future__ import annotations

import torch
from torch import Tensor

from diagnostics.sensors.multilinear import MASK, splitmix64

# Probes estimate ||C_row||^2 from A and W alone. With m probes the estimate is chi-square with m degrees of freedom;
# at 32 the chance that it is low enough for 7 sigma to be crossed is below 1e-8 a row even without the floor in
# `gemm` (m = 16: 1e-6), and 32 columns are two AMX tiles.
PROBES = 32


class Signs:
    """Vectors of +-1 by length, counter-based: f(key, length, kind of device). Redrawn each step (a fixed vector, ones
    above all, would miss the faults that happen to cancel under it)."""

    def __init__(self, key: int, device: torch.device) -> None:
        self._key = key & MASK
        self._device = device
        self._drawn: dict[int, Tensor] = {}
        self._probes: dict[tuple[int, torch.dtype], Tensor] = {}

    def vector(self, n: int) -> Tensor:
        """The check's signs, fp32 [n]."""
        found = self._drawn.get(n)
        if found is None:
            found = self._drawn[n] = self._draw((n,), salt=1)
        return found

    def probes(self, n: int, dtype: torch.dtype) -> Tensor:
        """Independent signs for the estimate of row norms, [n, PROBES] in the operands' dtype (+-1 is exact in any)."""
        found = self._probes.get((n, dtype))
        if found is None:
            found = self._probes[(n, dtype)] = self._draw((n, PROBES), salt=2).to(dtype)
        return found

    def _draw(self, shape: tuple[int, ...], salt: int) -> Tensor:
        seed = splitmix64(self._key ^ splitmix64(shape[0] * 4 + salt))
        # Drawn where they are used: a copy from the host would wait for all that a GPU has still to do.
        generator = torch.Generator(self._device).manual_seed(seed)
        bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.float32, device=self._device)
        return bits.mul_(2).sub_(1)
