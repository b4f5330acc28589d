"""A block of each rank's update, made once more by another rank and compared bit for bit.

Identity: an optimizer is element-wise and deterministic, so the same old parameter, moments and gradient give the same
new ones, on any device of the same fingerprint. No tolerance. The block is drawn by f(key, owner), so nobody knows it
before the step, and all know it in it.

Seen: with B blocks in an owner's share, a single wrong element with probability 1 / B in its step; one that is wrong in
every step for good after B steps on average; a fault that follows lanes, or any run of BLOCK elements, in the first
step, since a block has every lane many times. Not seen: a gradient that was wrong before (the reduction's check), old
state that was wrong on both ranks (its hash), a fault that both devices share.

Cost: the block's gradient travels (64 KiB), the update of a block and its comparison. All blocks would cost another
rank's whole update, and a gradient's worth of traffic more for each rank's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.sensors.multilinear import splitmix64

#: Elements of a block: whole cache lines, so that no kernel takes its scalar tail in a block where it did not in the
#: whole; 64 KiB, which a network takes in less time than the two messages' latency.
BLOCK = 16_384


@dataclass(frozen=True, slots=True)
class Block:
    """Elements `start`..`stop` of piece number `piece`."""

    piece: int
    start: int
    stop: int


def drawn(key: int, owner: int, sizes: Sequence[int]) -> Block:
    """The block of this step, of an owner's pieces of these sizes, each block as likely as any other.

    Raises ValueError if there is nothing to draw from.
    """
    counts = [-(-size // BLOCK) for size in sizes]
    if not sum(counts):
        raise ValueError(f"sizes are {list(sizes)}: there is no block to draw")
    number = splitmix64(key ^ splitmix64(owner)) % sum(counts)
    for piece, count in enumerate(counts):
        if number < count:
            return Block(piece, number * BLOCK, min((number + 1) * BLOCK, sizes[piece]))
        number -= count
    raise AssertionError("the number is below the sum of the counts")


def blocks(sizes: Sequence[int]) -> int:
    """How many there are to draw from: the inverse of the probability that a step's check sees one element."""
    return sum(-(-size // BLOCK) for size in sizes)


def differing(one: Sequence[Tensor], other: Sequence[Tensor]) -> int:
    """Bytes that differ between tensors of the same shapes and dtypes, NaN and signs of zero by their bits."""
    pairs = zip(one, other, strict=True)
    return sum(int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum()) for a, b in pairs)
