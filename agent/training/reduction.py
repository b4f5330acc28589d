"""A sum over ranks that is checked where it arrives: what its parts said of themselves against what came out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diagnostics.health import Alarm
from diagnostics.sensors.collectives import TOTAL, reduction_readings

SENSOR = "reduction"


@dataclass(frozen=True, slots=True)
class Reduction:
    """What the checks of a step's sums read on this rank; without any, the check was off or there was one part.

    `copy` is a hash of the sums where all ranks receive the same; 0 where each gets others.
    """

    readings: tuple[float, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    copy: int = 0

    @property
    def reading(self) -> float:
        """The worst one, NaN if any is; 0.0 without a check."""
        return worst(self.readings)

    def __add__(self, other: "Reduction") -> "Reduction":
        return Reduction(self.readings + other.readings, self.alarms + other.alarms, self.copy ^ other.copy)


#: Of one part, or with the sensors off.
UNCHECKED = Reduction()


@dataclass(frozen=True, slots=True)
class Label:
    """What an alarm calls a sum: the operation, and each segment's name."""

    operation: str
    segments: Sequence[str]


def judged(parts: Tensor, found: Tensor, label: Label, copy: int = 0) -> Reduction:
    """Compare sums with their parts: `parts` float64 [ranks, segments, 2], `found` [segments, 2], see `checksums`.

    `copy` is a hash of the sums, if all ranks receive them.
    """
    readings = reduction_readings(parts, found[:, TOTAL]).tolist()
    alarms = tuple(
        Alarm(SENSOR, name, label.operation, "step", reading, f"the sum of {parts.shape[0]} ranks")
        for name, reading in zip(label.segments, readings, strict=True)
        if not reading <= 1.0
    )
    return Reduction(tuple(readings), alarms, copy)


def worst(readings: Sequence[float]) -> float:
    """The largest, NaN if any is, 0.0 of none."""
    return math.nan if any(math.isnan(reading) for reading in readings) else max(readings, default=0.0)
