"""The random signs and weights a step's checks are made with: drawn from its key, so that a replay draws the same."""

from __future__ import annotations

import torch
from torch import Tensor

from diagnostics.sensors.multilinear import MASK, splitmix64

# Probes estimate ||C_row||^2 from A and W alone. With m probes the estimate is chi-square with m degrees of freedom;
# at 32 the chance that it is low enough for 7 sigma to be crossed is below 1e-8 a row even without the floor in
# `gemm` (m = 16: 1e-6), and 32 columns are two AMX tiles.
PROBES = 32

#: The least size of a weight: one wrong element is seen from the floor over this on, whichever weight it meets.
LEAST = 0.75


class Signs:
    """Vectors by length, counter-based: f(key, length, kind of device). Redrawn each step (a fixed vector, ones above
    all, would miss the faults that happen to cancel under it)."""

    def __init__(self, key: int, device: torch.device) -> None:
        self._key = key & MASK
        self._device = device
        self._drawn: dict[int, Tensor] = {}
        self._probes: dict[tuple[int, torch.dtype], Tensor] = {}

    def vector(self, n: int) -> Tensor:
        """The check's weights, fp32 [n]: random signs times LEAST to 2 - LEAST, 3/4 to 5/4.

        Of signs alone two are equal half of the time, and then two elements that have changed places, or two lanes that
        stray by as much in opposite directions, cancel in every row. Weights differ: such a pair that is f times its
        floor is missed with a chance of 2 / f.
        """
        found = self._drawn.get(n)
        if found is None:
            generator = self._generator(n, salt=3)
            sizes = torch.rand(n, generator=generator, dtype=torch.float32, device=self._device)
            found = self._drawn[n] = self._draw((n,), salt=1).mul_(sizes.mul_(2 - 2 * LEAST).add_(LEAST))
        return found

    def probes(self, n: int, dtype: torch.dtype) -> Tensor:
        """Independent signs for the estimate of row norms, [n, PROBES] in the operands' dtype (+-1 is exact in any)."""
        found = self._probes.get((n, dtype))
        if found is None:
            found = self._probes[(n, dtype)] = self._draw((n, PROBES), salt=2).to(dtype)
        return found

    def _draw(self, shape: tuple[int, ...], salt: int) -> Tensor:
        generator = self._generator(shape[0], salt)
        bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.float32, device=self._device)
        return bits.mul_(2).sub_(1)

    def _generator(self, n: int, salt: int) -> torch.Generator:
        """Where its numbers are used: a copy from the host would wait for all that a GPU has still to do."""
        return torch.Generator(self._device).manual_seed(splitmix64(self._key ^ splitmix64(n * 4 + salt)))
