"""Robust statistics of a step's scalars (loss, gradient norms): evidence beside an alarm, never proof by itself."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from dataclasses import dataclass

# 64 steps: long enough for a stable median, short enough to follow a falling loss.
WINDOW = 64
# Fewer values than this have no meaningful spread.
FEWEST = 8
# The median absolute deviation of a Gaussian is 0.6745 standard deviations.
MAD_TO_SIGMA = 0.6745


@dataclass(frozen=True, slots=True)
class Statistic:
    """One scalar of one step: its value and its robust z against the steps before (NaN: too few, or not finite)."""

    name: str
    value: float
    z: float


class History:
    """The last WINDOW finite values of one scalar, one per key: a step redone replaces its value.

    Invariant: at most WINDOW values, all finite.
    """

    def __init__(self) -> None:
        self._values: OrderedDict[int, float] = OrderedDict()

    def z(self, key: int, value: float) -> float:
        """(value - median) / (MAD / 0.6745) over the other keys' values; NaN with fewer than FEWEST of them."""
        others = [v for k, v in self._values.items() if k != key]
        if len(others) < FEWEST or not math.isfinite(value):
            return math.nan
        middle = statistics.median(others)
        spread = statistics.median(abs(v - middle) for v in others) / MAD_TO_SIGMA
        if spread == 0:
            return 0.0 if value == middle else math.copysign(math.inf, value - middle)
        return (value - middle) / spread

    def add(self, key: int, value: float) -> None:
        """Remember the value under its key; one that is not finite is not remembered."""
        self._values.pop(key, None)
        if not math.isfinite(value):
            return
        self._values[key] = value
        while len(self._values) > WINDOW:
            self._values.popitem(last=False)
