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


class _Found(NamedTuple):
    """One tally's statistics."""

    module: str
    amax: float
    saturation: float
    underflow: float


def summarise(tallies: Iterable[tuple[str, Tally]]) -> tuple[Summary, ...]:
    """The worst of each kind over (module, tally) pairs, in the order in which the kinds appear.

    Waits for the device, once: everything comes over in one tensor. NaN counts as the worst.
    """
    filled = [(module, tally) for module, tally in tallies if tally.rows]
    if not filled:
        return ()
    values = iter(torch.stack([row for _, tally in filled for row in tally.rows]).tolist())
    kinds: dict[tuple[str, str], list[_Found]] = {}
    for module, tally in filled:
        rows = list(islice(values, len(tally.rows)))
        kinds.setdefault((tally.tensor, tally.pass_), []).append(_found(module, rows, tally.size))
    return tuple(_worst(tensor, pass_, found) for (tensor, pass_), found in kinds.items())


def _found(module: str, rows: list[list[float]], size: int) -> _Found:
    saturated, vanished, filled = (sum(row[i] for row in rows) for i in (1, 2, 3))
    return _Found(module, max((row[0] for row in rows), key=_rank), saturated / size, vanished / max(filled, 1.0))


def _worst(tensor: str, pass_: str, found: list[_Found]) -> Summary:
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
