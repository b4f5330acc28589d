"""Fault models: where in a result values go wrong, and how; drills and campaigns share them.

A model is a region of one plane (the last two dimensions of a result) and a change of the values in it. What a model
leaves open, the seed draws, so that the same fault strikes the same result in the same way. Shapes are those seen on
GPUs (OSDI'26, AEGIS): single bits, lanes that are stuck, runs of four that repeat along both axes, whole tiles.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diagnostics.faults.bits import UnknownModel, as_signed, carried, flipped, integers, width_of
from diagnostics.faults.places import Region, column, element, lanes, row, runs, tile

# Bits that flip together in one value, at most: a burst on one wire.
MOST_BITS = 8

#: (values of the region, rms of the plane) -> the wrong values.
Change = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Fault:
    """A model with what a campaign varies.

    seed: draws the plane, the place and everything else. strength: how wrong random and scaled values are, in units of
    the plane's rms (scaled: of the value itself). bit: the bit of `bitflip`, counted from the lowest of the result's
    own type; None lets the seed draw it, uniform over the width.
    """

    model: str
    seed: int
    strength: float = 1.0
    bit: int | None = None


class Damage(NamedTuple):
    """What was changed: in which plane of the result, and that plane before and after.

    plane: leading indices of the result. before, after: [rows, columns] in the result's type (complex values as pairs).
    bit: of a flipped bit, else None.
    """

    plane: tuple[int, ...]
    before: Tensor
    after: Tensor
    bit: int | None

    @property
    def changed(self) -> Tensor:
        """bool [rows, columns]: where the bits differ."""
        return integers(self.before) != integers(self.after)


def noisy(strength: float, rng: random.Random) -> Change:
    """Each value wrong by its own Gaussian amount, `strength` times the rms (1 where the plane is all zeros)."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))

    def change(values: Tensor, rms: float) -> Tensor:
        noise = torch.randn(values.shape, generator=generator).to(values.device)
        return (values.float() + noise.mul_(strength * (rms or 1.0))).to(values.dtype)

    return change


def multiplied(strength: float, rng: random.Random) -> Change:
    """Each value times 1 + strength, or 1 - strength: larger, smaller, or of the other sign."""
    factor = 1.0 + rng.choice((-1.0, 1.0)) * strength
    return lambda values, _rms: (values.float() * factor).to(values.dtype)


def constant(strength: float, rng: random.Random) -> Change:
    """All values the same: zero, or +-strength times the rms (1 where the plane is all zeros)."""
    level = rng.choice((-1.0, 0.0, 1.0)) * strength
    return lambda values, rms: torch.full_like(values, level * (rms or 1.0))


_REGIONS: dict[str, Callable[[int, int, random.Random], Region]] = {
    "stuck": lanes,
    "runs": runs,
    "row": row,
    "column": column,
    "tile": tile,
    "value": element,
    "scaled": element,
    "scaled tile": tile,
}
_CHANGES: dict[str, Callable[[float, random.Random], Change]] = {
    "stuck": constant,
    "scaled": multiplied,
    "scaled tile": multiplied,
}
#: Models of bits fit every type; those of values floating-point ones; those of places any plane of several rows.
OF_BITS = ("bitflip", "multibit", "carry")
OF_VALUES = tuple(_REGIONS)
OF_INDICES = ("index",)
OF_ROWS = ("lost", "misdirected")
MODELS = OF_BITS + OF_VALUES + OF_INDICES + OF_ROWS


def models_for(dtype: torch.dtype, rows: int) -> tuple[str, ...]:
    """Models that can change a result of this type whose planes have so many rows."""
    if dtype == torch.bool:
        return ("bitflip",)
    places = OF_ROWS if rows > 1 else ()
    if dtype.is_floating_point:
        return OF_BITS + OF_VALUES + places
    return OF_BITS if dtype.is_complex else OF_BITS + OF_INDICES + places


def damage(result: Tensor, fault: Fault, at: int | None = None) -> Damage:
    """Corrupt one plane of a result in place, whatever its shape and strides; empty results cannot be corrupted.

    `at` fixes the place of a model of bits: the element's index in row-major order (of the pairs, if complex).

    Raises UnknownModel if the model is none, or does not fit the result's type.
    """
    if fault.model not in MODELS:
        raise UnknownModel(f"model is {fault.model!r}: must be one of {', '.join(MODELS)}")
    rng = random.Random(fault.seed)
    where, plane = _plane(result, rng, at)
    before = plane.clone()
    bit = None
    if fault.model in OF_BITS:
        inside = None if at is None else divmod(at % plane.numel(), plane.shape[1])
        bit = _bits(plane, fault, rng, inside)
    elif fault.model in OF_INDICES:
        _other_index(plane, rng)
    elif fault.model in OF_ROWS:
        _rows(plane, fault.model, rng)
    else:
        rms = float(plane.float().square().mean().sqrt())
        region = _REGIONS[fault.model](plane.shape[0], plane.shape[1], rng)
        change = _CHANGES.get(fault.model, noisy)(fault.strength, rng)
        plane[region] = change(plane[region], rms)
    return Damage(where, before, plane.clone(), bit)


def _plane(result: Tensor, rng: random.Random, at: int | None) -> tuple[tuple[int, ...], Tensor]:
    """A drawn plane of the result, or the one with element `at`, sharing its memory; and where it lies."""
    whole = torch.view_as_real(result) if result.is_complex() else result
    while whole.dim() < 2:
        whole = whole.unsqueeze(0)
    places = [rng.randrange(size) for size in whole.shape[:-2]]
    if at is not None:
        number = at // (whole.shape[-2] * whole.shape[-1])
        for axis in reversed(range(len(places))):
            number, places[axis] = divmod(number, whole.shape[axis])
    return tuple(places), whole[tuple(places)]


def _bits(plane: Tensor, fault: Fault, rng: random.Random, at: tuple[int, int] | None) -> int | None:
    """Flip one bit or several of one value, or carry into one; returns the bit if it is one."""
    region = element(plane.shape[0], plane.shape[1], rng)
    if at is not None:
        region = (slice(at[0], at[0] + 1), slice(at[1], at[1] + 1))
    width = width_of(plane.dtype)
    if fault.model == "multibit":
        chosen = rng.sample(range(width), rng.randint(2, min(MOST_BITS, width)))
        plane[region] = flipped(plane[region], sum(1 << bit for bit in chosen))
        return None
    bit = rng.randrange(width) if fault.bit is None else fault.bit
    if not 0 <= bit < width:
        raise UnknownModel(f"bit is {bit}: a {plane.dtype} value has bits 0..{width - 1}")
    if fault.model == "carry":
        amount = as_signed(1 << bit, integers(plane).dtype)
        plane[region] = carried(plane[region], rng.choice((-1, 1)) * amount if bit < width - 1 else amount)
    else:
        plane[region] = flipped(plane[region], 1 << bit)
    return bit


def _other_index(plane: Tensor, rng: random.Random) -> None:
    """One value becomes another that occurs between the plane's least and largest; nothing if all are equal."""
    region = element(plane.shape[0], plane.shape[1], rng)
    low, high = (int(end) for end in plane.aminmax())
    others = [value for value in (low, high, rng.randint(low, high)) if value != int(plane[region])]
    if others:
        plane[region] = others[-1]


def _rows(plane: Tensor, model: str, rng: random.Random) -> None:
    """A token lost: its row is zero. Misdirected: it changes places with another, as if sent to its expert."""
    first = rng.randrange(plane.shape[0])
    if model == "lost":
        plane[first] = 0
        return
    second = (first + rng.randrange(1, plane.shape[0])) % plane.shape[0]
    plane[[first, second]] = plane[[second, first]]
