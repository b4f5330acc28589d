"""What summing a step's gradients over the ranks gave on one of them, and what the checks of it saw."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.training.strays import ADDED, Stray, alarm_of
from diagnostics.health import Alarm


@dataclass(frozen=True, slots=True)
class Reduction:
    """The rank's part of the sum's squared norm; how many comparisons were made, and the `strays`, which failed them.

    `copy` is a hash of the sums where all ranks hold the same, taken when the norm had been made of them; else 0.
    """

    squared_norm: float = 0.0
    checks: int = 0
    strays: tuple[Stray, ...] = ()
    copy: int = 0

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """One for each stray."""
        return tuple(map(alarm_of, self.strays))

    @property
    def reading(self) -> float:
        """Bits have no tolerance: 0.0, or infinite."""
        return math.inf if self.strays else 0.0


def squared_norm(parts: Sequence[Tensor], rank: int, checked: bool) -> tuple[float, tuple[Stray, ...]]:
    """Squared norm of the rank's parts of the sum, in float64; if `checked`, taken twice: a stray if it differs.

    Every rank clips by what all of them tell, so a wrong one would be in nobody's way.
    """
    first = _squared(parts)
    if not checked or struct.pack("d", first) == struct.pack("d", _squared(parts)):  # NaN is itself
        return first, ()
    return first, (Stray("norm", ADDED, rank, rank, 0, 0),)


def _squared(parts: Sequence[Tensor]) -> float:
    return math.fsum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts)


#: Nothing was summed.
UNCHECKED = Reduction()


def worst(readings: Sequence[float]) -> float:
    """The largest, NaN if any is, 0.0 of none."""
    return math.nan if any(math.isnan(reading) for reading in readings) else max(readings, default=0.0)
