"""What quantising did to a tensor: its largest magnitude, what saturated and what vanished; read once, at the gate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """One kind of tensor over a whole step: the worst of each statistic, and the module where it was.

    saturation: share of values stored as the largest code, +-448 (with a scale from the block's own largest value
    nothing is clipped beyond it). underflow: share of non-zero values that became zero. amax: largest magnitude.
    """

    tensor: str
    pass_: str
    amax: float
    amax_module: str
    saturation: float
    saturation_module: str
    underflow: float
    underflow_module: str


class Tally:
    """Statistics of one kind of tensor of one module, kept on its device until they are read.

    Invariant: `rows` holds fp32 [4] tensors (amax, saturated, vanished, non-zero), one per quantisation, and `size` the
    number of values in them all.
    """

    def __init__(self, tensor: str, pass_: str) -> None:
        self.tensor = tensor
        self.pass_ = pass_
        self.size = 0
        self.rows: list[Tensor] = []

    def add(self, row: Tensor, size: int) -> None:
        """Take fp32 [4]: amax, values at the largest code, non-zero values that became zero, non-zero values."""
        self.rows.append(row)
        self.size += size

    def clear(self) -> None:
        """Forget the step."""
        self.rows.clear()
        self.size = 0


class Found(NamedTuple):
    """One tally's statistics over a step: of one kind of tensor of one module. As in Summary."""

    module: str
    tensor: str
    pass_: str
    amax: float
    saturation: float
    underflow: float


def read(tallies: Iterable[tuple[str, Tally]]) -> list[Found]:
    """The statistics of each of (module, tally) pairs that quantised anything.

    Waits for the device, once: everything comes over in one tensor.
    """
    filled = [(module, tally) for module, tally in tallies if tally.rows]
    if not filled:
        return []
    values = iter(torch.stack([row for _, tally in filled for row in tally.rows]).tolist())
    return [_found(module, tally, list(islice(values, len(tally.rows)))) for module, tally in filled]


def summarise(found: Iterable[Found]) -> tuple[Summary, ...]:
    """The worst of each kind, in the order in which the kinds appear. NaN counts as the worst."""
    kinds: dict[tuple[str, str], list[Found]] = {}
    for one in found:
        kinds.setdefault((one.tensor, one.pass_), []).append(one)
    return tuple(_worst(tensor, pass_, ones) for (tensor, pass_), ones in kinds.items())


def _found(module: str, tally: Tally, rows: list[list[float]]) -> Found:
    saturated, vanished, filled = (sum(row[i] for row in rows) for i in (1, 2, 3))
    amax = max((row[0] for row in rows), key=_rank)
    return Found(module, tally.tensor, tally.pass_, amax, saturated / tally.size, vanished / max(filled, 1.0))


def _worst(tensor: str, pass_: str, found: list[Found]) -> Summary:
    amax = max(found, key=lambda entry: _rank(entry.amax))
    saturation = max(found, key=lambda entry: entry.saturation)
    underflow = max(found, key=lambda entry: entry.underflow)
    return Summary(
        tensor=tensor,
        pass_=pass_,
        amax=amax.amax,
        amax_module=amax.module,
        saturation=saturation.saturation,
        saturation_module=saturation.module,
        underflow=underflow.underflow,
        underflow_module=underflow.module,
    )


def _rank(value: float) -> tuple[bool, float]:
    """Orders numbers with NaN above all."""
    return math.isnan(value), value
