"""The scalars that a step is told, wherever they lie; those on the device come over in one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diagnostics.sensors.statistics import NOTHING, Comparison, Histories


class _Told(NamedTuple):
    names: Sequence[str]
    values: Tensor | Sequence[float]
    least: float


class Observed:
    """Of one step. A name that is told twice has its last value."""

    def __init__(self) -> None:
        self._told: list[_Told] = []

    def add(self, names: Sequence[str], values: Tensor | Sequence[float], least: float = 0.0) -> None:
        """Values [names], and the smallest spread that they are measured by. No host sync."""
        self._told.append(_Told(names, values, least))

    def compared(self, histories: Histories, key: int, device: torch.device) -> Comparison:
        """With the steps before; waits for the device, if any lies there. Nothing of a step that was told nothing."""
        if not self._told:
            return NOTHING
        there = [told.values.detach().float().to(device) for told in self._told if isinstance(told.values, Tensor)]
        over = iter(torch.cat(there).tolist() if there else ())
        found: dict[str, tuple[float, float]] = {}
        for names, values, least in self._told:
            numbers = islice(over, len(names)) if isinstance(values, Tensor) else values
            found.update((name, (number, least)) for name, number in zip(names, numbers, strict=True))
        table = np.array([*found.values()]).reshape(-1, 2)
        return histories.add(key, tuple(found), table[:, 0], table[:, 1])
