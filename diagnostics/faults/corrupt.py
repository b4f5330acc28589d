"""What each kind of drill does to one result matrix, in place: the models, at a place that a sensor must see."""

from __future__ import annotations

import random
from typing import TypedDict

import torch
from torch import Tensor

from diagnostics.faults.bits import flipped
from diagnostics.faults.places import TILE, tile_at
from diagnostics.faults.spec import FaultSpec

# Values of stuck lanes and wrong tiles, in units of the result's root mean square: far above the floor of the row
# check in fp32 (1e-3 rms) and in bf16 (0.02 sqrt(columns) rms, which 16 wrong values exceed up to 10^6 columns).
STRENGTH = 4.0


class Corruption(TypedDict):
    """What was changed: the first element's index, its value before and after, and how many elements changed."""

    element: list[int]
    old: float
    new: float
    changed: int


def corrupt(result: Tensor, spec: FaultSpec, rng: random.Random) -> Corruption:
    """Corrupt a 2-D fp32 or bf16 result in place. Raises TypeError for other dtypes."""
    if result.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"cannot corrupt {result.dtype}: only float32 and bfloat16")
    before = result.clone()
    row, column = _visible_element(before.float(), rng)
    tile = result[tile_at(row, column)]
    if spec.fault == "bitflip":
        result[row, column] = flipped(result[row, column], 1 << _bit(result, spec.bit))
    elif spec.fault == "stuck":
        result[:, column % TILE :: TILE] = _strength(before)
    elif spec.fault == "scale":
        tile.mul_(STRENGTH)
    else:
        signs = torch.tensor([rng.choice((-1.0, 1.0)) for _ in range(tile.numel())], device=tile.device)
        tile.copy_(signs.reshape(tile.shape) * _strength(before))
    return _difference(before, result, row, column)


def _visible_element(values: Tensor, rng: random.Random) -> tuple[int, int]:
    """An element, by the seed, of at least the rms of the tensor and of its own row.

    A flip of bit 20 or above changes such an element by 1/16 of it or more, which is above the fp32 floor. In a
    smaller element the same flip may be rounding noise: that is below the floor, not a miss. The row with the largest
    rms always holds such an element, so there is one unless values are not finite.
    """
    rows = values.square().mean(dim=1, keepdim=True).sqrt()
    least = torch.maximum(rows, values.square().mean().sqrt())
    candidates = (values.abs() >= least * (1 - 1e-6)).nonzero()  # 1e-6: the rms itself is rounded
    if not len(candidates):
        return rng.randrange(values.shape[0]), rng.randrange(values.shape[1])
    row, column = candidates[rng.randrange(len(candidates))].tolist()
    return row, column


def _bit(result: Tensor, bit: int) -> int:
    """The bit of the result's own type: bf16 has the upper 16 of fp32's."""
    return bit - 16 if result.dtype == torch.bfloat16 and bit >= 16 else bit


def _strength(result: Tensor) -> float:
    """STRENGTH times the rms; STRENGTH itself when the result is all zeros."""
    rms = float(result.float().square().mean().sqrt())
    return STRENGTH * (rms or 1.0)


def _difference(before: Tensor, after: Tensor, row: int, column: int) -> Corruption:
    changed = torch.logical_not(before == after).nonzero()
    if len(changed) and not bool((changed == torch.tensor([row, column], device=changed.device)).all(1).any()):
        row, column = changed[0].tolist()
    old, new = float(before[row, column]), float(after[row, column])
    return Corruption(element=[row, column], old=old, new=new, changed=len(changed))
