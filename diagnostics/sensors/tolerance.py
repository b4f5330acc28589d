"""The rounding model: how far a clean product may stray from its checksum, as data with its provenance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

# Of the document that holds a table.
SCHEMA = "assay.tolerances/1"

# 2.6e-12 a row if rounding noise were Gaussian: 300 checks of 1,024 rows a step leave one false alarm in
# a million steps.
Z = 7.0

# A sensor may be widened after a false alarm, but never beyond this many times the shipped value: past it a fault
# would hide, and the sensor is broken rather than tight.
WIDEST = 4.0

# Sums of n terms in vector lanes stray by sqrt(n / lanes). kappa_accumulate is measured at short sums and grows from
# here: 64 is AVX-512's 16 fp32 lanes times the 4 accumulators that BLAS kernels keep.
LANE_TERMS = 64

# Norms are clamped here: squares of smaller fp32 values underflow, and a norm that lost its terms would be a
# tolerance of zero. Anything so small is inert (AdamW's eps is 1e-8).
NORM_FLOOR = 1e-18


@dataclass(frozen=True, slots=True)
class Kappa:
    """Relative rounding noise of one kind of product; both are standard deviations, dimensionless.

    output: of rounding each element to the output type, relative to ||C_row||.
    accumulate: of the fp32 sums, relative to ||A_row|| ||W||_F, for sums of up to LANE_TERMS terms.
    """

    output: float
    accumulate: float
    provenance: str

    def accumulate_at(self, terms: int) -> float:
        """`accumulate` for sums of `terms` terms (the longer of the product's inner and outer dimension)."""
        return self.accumulate * float((1 + terms / LANE_TERMS) ** 0.5)


class UnknownTolerance(LookupError):
    """No kappa for this device class, dtype and kernel: calibrate, or leave the operation unchecked."""


@dataclass(frozen=True, slots=True)
class ToleranceTable:
    """Kappas by (device class, dtype, kernel), e.g. ("cpu", "bfloat16", "mm")."""

    entries: dict[tuple[str, str, str], Kappa]

    def kappa(self, device_class: str, dtype: str, kernel: str = "mm") -> Kappa:
        """Look one up. Raises UnknownTolerance."""
        found = self.entries.get((device_class, dtype, kernel))
        if found is None:
            raise UnknownTolerance(f"no tolerance for {kernel} in {dtype} on {device_class}: calibrate it first")
        return found

    def over(self, other: ToleranceTable) -> ToleranceTable:
        """This table's entries, and the other's where this one has none."""
        return ToleranceTable(other.entries | self.entries)


class TableError(ValueError):
    """A document is no table of tolerances; the message names the entry and what is wrong with it."""


def parse_table(text: str) -> ToleranceTable:
    """Read the table from JSON. Raises TableError."""
    entries: dict[tuple[str, str, str], Kappa] = {}
    for number, row in enumerate(_rows(text)):
        key, kappa = _entry(number, row)
        if not (0 <= kappa.output < 1 and 0 < kappa.accumulate < 1):
            raise TableError(f"tolerance {key}: kappas {kappa.output}, {kappa.accumulate} are not in 0..1")
        if key in entries:
            raise TableError(f"tolerance {key} is given twice")
        entries[key] = kappa
    return ToleranceTable(entries)


def _rows(text: str) -> list[Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise TableError(f"not a table of tolerances: its schema is not {SCHEMA}")
    rows = document.get("kappas")
    if not isinstance(rows, list):
        raise TableError("kappas is not a list")
    return rows


def _entry(number: int, row: Any) -> tuple[tuple[str, str, str], Kappa]:
    if not isinstance(row, dict):
        raise TableError(f"kappas[{number}] is not an object")
    for name in ("device_class", "dtype", "kernel", "provenance"):
        if not isinstance(row.get(name), str):
            raise TableError(f"kappas[{number}].{name} is {row.get(name)!r}, must be text")
    for name in ("output", "accumulate"):
        if not isinstance(row.get(name), (int, float)) or isinstance(row[name], bool):
            raise TableError(f"kappas[{number}].{name} is {row.get(name)!r}, must be a number")
    key = row["device_class"], row["dtype"], row["kernel"]
    return key, Kappa(row["output"], row["accumulate"], row["provenance"])


def shipped_table() -> ToleranceTable:
    """The table that ships with the package."""
    return parse_table(resources.files("diagnostics.sensors").joinpath("tolerances.json").read_text("utf-8"))


class Widening:
    """How far each (sensor, pass) stands from the shipped tolerance; starts at `scale` and only ever grows to WIDEST.

    What has no tolerance is muted instead, place by place: an exact check that alarms wherever it is made is a broken
    sensor, and would hold every step. Invariant: scale <= factor <= max(scale, WIDEST).
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not 0 < scale < float("inf"):
            raise ValueError(f"tolerance scale is {scale}, must be a positive finite number")
        self._scale = scale
        self._factors: dict[tuple[str, str], float] = {}
        self._muted: set[tuple[str, str, str, str]] = set()
        self.count = 0  # widenings so far: recalibration is counted, never silent

    def factor(self, sensor: str, pass_: str) -> float:
        """What the shipped tolerance is multiplied by."""
        return self._factors.get((sensor, pass_), self._scale)

    def mute(self, sensor: str, module: str, operation: str, pass_: str) -> bool:
        """Hear no more of an exact check at one place; True if it was heard."""
        place = (sensor, module, operation, pass_)
        heard = place not in self._muted
        self._muted.add(place)
        self.count += heard
        return heard

    def is_muted(self, sensor: str, module: str, operation: str, pass_: str) -> bool:
        """Whether it is."""
        return bool(self._muted) and (sensor, module, operation, pass_) in self._muted

    def widen(self, sensor: str, pass_: str, reading: float) -> bool:
        """Make room for twice `reading`; True if the factor changed.

        A reading that is not finite widens nothing.
        """
        before = self.factor(sensor, pass_)
        wanted = 2.0 * reading * before
        if not wanted < float("inf"):
            return False
        after = max(before, min(wanted, WIDEST))
        self._factors[(sensor, pass_)] = after
        self.count += after > before
        return after > before
