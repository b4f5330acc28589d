"""Faults by coordinates: which operator's result is corrupted, and how, reproducible from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Op = Literal["fprop", "dgrad", "wgrad"]
Kind = Literal["bitflip", "stuck", "tile", "scale"]

OPS: tuple[Op, ...] = get_args(Op)
KINDS: tuple[Kind, ...] = get_args(Kind)


class FaultSpecError(ValueError):
    """A fault's coordinates make no sense; the message names the key and what it may be."""


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """One fault in one product of one step.

    layer: index of `layers.N`, or None to let the seed choose. op: the product's pass. fault: bitflip (one bit of one
    element), stuck (every 16th column at one value), tile (16 x 16 wrong values), scale (a tile times 4). bit: 0 is the
    lowest mantissa bit and 31 the sign of an fp32 value; in a bf16 result bits 16..31 mean the same bit of the value
    (bit - 16 of its 16) and bits below 16 are taken as they are. Raises FaultSpecError.
    """

    layer: int | None = None
    op: Op = "fprop"
    fault: Kind = "bitflip"
    bit: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layer is not None and self.layer < 0:
            raise FaultSpecError(f"layer is {self.layer}: must be 0 or more")
        if self.op not in OPS:
            raise FaultSpecError(f"op is {self.op!r}: must be one of {', '.join(OPS)}")
        if self.fault not in KINDS:
            raise FaultSpecError(f"fault is {self.fault!r}: must be one of {', '.join(KINDS)}")
        if not 0 <= self.bit <= 31:
            raise FaultSpecError(f"bit is {self.bit}: must be in 0..31")
