"""Robust statistics of a step's scalars against the steps before: evidence beside an alarm, never proof by itself.

Identity: none. A scalar of one step (loss, the norm of a tensor's gradient, an expert load's entropy, FP8's amax and
shares) is compared with the same scalar's values in up to WINDOW - 1 other steps: z = (value - median) / spread, the
spread being MAD / 0.6745, as wide as a Gaussian's standard deviation. Where more than half of the values are the same,
MAD is 0, and the mean absolute deviation times 1.2533 takes its place; where all are, any other value has an infinite
z. What is a share has a least spread, or the first values of 1 in 10,000 after none would be the most unusual of all.

Tolerance: none either. These are no Gaussians: a clean run sees |z| above 10 now and then, since data differ and
training moves. So no z alarms, holds a step or accuses anybody; what is not finite alarms by another check.

Sees: a step that is unlike its neighbours, whatever made it so, and in which tensor. Does not see: what changes little
(one flipped bit seldom moves a norm); what is wrong in every step, or drifts; any of the first FEWEST steps. The
history lives with its guard: a restarted rank begins a new one; a step redone, after an alarm or a roll-back, replaces
its values.

Cost: one pass over what the scalar is made of, one transfer of all scalars of a step, and two sorts of at most WINDOW
numbers for each scalar. Memory: 8 WINDOW bytes for each name that was ever observed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# 64 steps: long enough for a stable median, short enough to follow a falling loss.
WINDOW = 64
# Fewer values than this have no meaningful spread.
FEWEST = 8
# The median absolute deviation of a Gaussian is 0.6745 standard deviations, the mean one 1 / 1.2533.
MAD_TO_SIGMA = 0.6745
MEAN_TO_SIGMA = 1.2533

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Statistic:
    """One scalar of one step, the median of the steps before and its robust z against them.

    Both are NaN after too few steps; z is where the value is not finite.
    """

    name: str
    value: float
    median: float
    z: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A step's scalars against those of the steps before: float64 [names] each."""

    names: tuple[str, ...]
    values: Values
    medians: Values
    z: Values

    def all(self) -> list[Statistic]:
        """Every scalar, as they were observed."""
        return [self._statistic(i) for i in range(len(self.names))]

    def largest(self, count: int) -> list[Statistic]:
        """The `count` most unusual: what is not finite first, then by |z|; what had no history is left out."""
        finite = np.isfinite(self.values)
        known = np.flatnonzero(~np.isnan(self.z) | ~finite)
        away = np.abs(self.values - self.medians)
        order = np.lexsort((-away[known], -np.abs(self.z[known]), finite[known]))
        return [self._statistic(int(i)) for i in known[order[:count]]]

    def _statistic(self, i: int) -> Statistic:
        return Statistic(self.names[i], float(self.values[i]), float(self.medians[i]), float(self.z[i]))


#: Of a step that was told nothing.
NOTHING = Comparison((), *(np.empty(0) for _ in range(3)))


class Histories:
    """The last WINDOW steps' values of each name, by the step's key: a step redone replaces its values.

    Invariants: at most WINDOW steps, all values finite but for NaN where a step had no finite value; `_rows` is
    [names, WINDOW], so that a name's values lie side by side.
    """

    def __init__(self) -> None:
        self._columns: dict[str, int] = {}
        self._rows: Values = np.empty((0, WINDOW))
        self._slots: OrderedDict[int, int] = OrderedDict()  # from the key to its place in a row, the oldest first

    def add(self, key: int, names: Sequence[str], values: Values, least: Values | float = 0.0) -> Comparison:
        """Compare a step's values (float64 [names]) with those of other steps, then remember those that are finite.

        `least` (one number, or float64 [names]) is the smallest spread that a value is measured by.
        """
        place = self._place(key)
        for name in names:
            self._columns.setdefault(name, len(self._columns))
        if len(self._columns) > len(self._rows):
            more = np.full((len(self._columns) - len(self._rows), WINDOW), math.nan)
            self._rows = np.concatenate([self._rows, more])
        columns = [self._columns[name] for name in names]
        self._rows[:, place] = math.nan
        found = _compared(tuple(names), values, self._rows[columns], least)
        self._rows[columns, place] = np.where(np.isfinite(values), values, math.nan)
        return found

    def _place(self, key: int) -> int:
        """Where the step's values go: where they are already, a free place, or that of the oldest step."""
        place = self._slots.pop(key, None)
        if place is None and len(self._slots) == WINDOW:
            place = self._slots.popitem(last=False)[1]
        if place is None:
            place = len(self._slots)
        self._slots[key] = place
        return place


def _compared(names: tuple[str, ...], values: Values, others: Values, least: Values | float) -> Comparison:
    """`values` [names] against the steps of `others` [names, WINDOW], NaN where there is none."""
    counts = (~np.isnan(others)).sum(1)
    with np.errstate(all="ignore"):  # 0 / 0 is NaN, which is what it should be
        medians = _medians(others, counts)
        away = np.abs(others - medians[:, None])
        spread = _medians(away, counts) / MAD_TO_SIGMA
        spread = np.where(spread > 0, spread, np.nansum(away, axis=1) / counts * MEAN_TO_SIGMA)
        z = (values - medians) / np.maximum(spread, least)
    z = np.where(values == medians, 0.0, z)  # 0 / 0 where all values ever were the same
    few = counts < FEWEST
    return Comparison(
        names, values, np.where(few, math.nan, medians), np.where(few | ~np.isfinite(values), math.nan, z)
    )


def _medians(rows: Values, counts: NDArray[np.int64]) -> Values:
    """Of the first `counts` numbers of each row once they are sorted, NaN last; NaN where there are none."""
    ordered = np.sort(rows, axis=1)
    at = np.arange(len(rows))
    low, high = np.maximum(counts - 1, 0) // 2, counts // 2
    middle: Values = (ordered[at, low] + ordered[at, np.minimum(high, rows.shape[1] - 1)]) / 2
    return middle
