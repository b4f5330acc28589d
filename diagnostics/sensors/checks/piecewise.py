"""Compares whole tensors piece by piece, so that what an element-wise operator gives again never leaves the caches.

A second result of full size is memory that is asked for anew: on a CPU its page faults cost several passes over it,
writing and reading it back two more. A piece of PIECE_BYTES is computed, compared and forgotten in an L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import gcd
from typing import Any

import torch
from torch import Tensor

from diagnostics.sensors.checks.kinds import is_in_place, kind_of, name_of
from diagnostics.sensors.checks.rows import copy_of, same

# Half of a common L2 cache; a piece takes some 15 us besides, a few per cent of its passes.
PIECE_BYTES = 1 << 20

# Elements that a piece is a multiple of where it can be. torch's loops take two vectors at once, at most 64 elements,
# and compute what is left over at the end by other instructions, whose last bit may differ.
_WHOLE = 64

Piece = tuple[slice, ...]


def pieces(like: Tensor) -> Iterator[Piece]:
    """Cuts a tensor along its leading dimensions into pieces of at most PIECE_BYTES, or one row if that is larger.

    A tensor without dimensions is one piece.
    """
    shape, most = like.shape, max(1, PIECE_BYTES // like.element_size())
    if not shape:
        yield ()
        return
    at, inner = len(shape) - 1, 1
    while at > 0 and inner * shape[at] <= most:
        inner *= shape[at]
        at -= 1
    step, even = max(1, most // max(inner, 1)), _WHOLE // gcd(inner, _WHOLE)
    step -= step % even if step > even else 0
    for lead in product(*map(range, shape[: max(at, 0)])):
        before = tuple(slice(place, place + 1) for place in lead)
        for start in range(0, shape[at], step):
            yield (*before, slice(start, start + step))


def cut(t: Tensor, piece: Piece, dims: int) -> Tensor:
    """What belongs to the piece of a tensor of `dims` dimensions, of one that broadcasts against it."""
    missing = dims - t.dim()
    chosen = (slice(None) if t.shape[at - missing] == 1 else piece[at] for at in range(missing, len(piece)))
    return t[tuple(chosen)] if missing < len(piece) else t


def gives_again(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> bool:
    """Whether an element-wise operator gives `out` once more, on a CPU. What it writes to is copied piece by piece.

    False says nothing: a bit differs, or the operator cannot be cut, or it is not worth while. Then it is run whole.
    """
    if not isinstance(out, Tensor) or not _can_cut(func, args, kwargs, out):
        return False
    for piece in pieces(out):
        given = [cut(arg, piece, out.dim()) if isinstance(arg, Tensor) else arg for arg in args]
        if is_in_place(func):
            given[0] = copy_of(given[0])
        if not same(func(*given, **kwargs), out[piece]):
            return False
    return True


def _can_cut(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> bool:
    if out.is_cuda or out.nbytes <= PIECE_BYTES or kind_of(func) != "elementwise" or name_of(func) == "one_hot":
        return False
    others = [*kwargs.values(), *(arg for arg in args if not isinstance(arg, Tensor))]
    if any(isinstance(each, (Tensor, list, tuple)) for each in others):
        return False
    if is_in_place(func) and args[0].shape != out.shape:
        return False
    return all(_broadcasts(arg.shape, out.shape) for arg in args if isinstance(arg, Tensor))


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
