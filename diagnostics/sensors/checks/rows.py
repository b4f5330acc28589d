"""What the sensors of single operations share: a result seen as rows, and readings made of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.tolerance import NORM_FLOOR

# Elements a block of rows holds at most: its fp32 temporaries are 1 MiB each, which stays in an L2 cache and bounds
# the memory of a check whatever the operation's size. One row is the smallest block.
BLOCK_ELEMENTS = 1 << 18
# On a GPU a block is a dozen launches, each of some 5 us, in which it reads 10 MB: blocks are as large as temporaries
# of 128 MiB in fp32 allow.
BLOCK_ELEMENTS_ON_GPU = 1 << 25

# Terms that a sum over rows adds one by one.
_PART = 128

# A residual that is a count of differences: the tolerance of none is half a difference.
PER_DIFFERENCE = 2.0

# Elements beyond which it pays to ask whether two tensors can be compared as 64-bit words.
_MANY = 1 << 14
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def argument(call: Call, name: str) -> Any:
    """The value of the schema's argument `name`, as the call or its default gives it."""
    for place, declared in enumerate(call.func._schema.arguments):
        if declared.name == name:
            if place < len(call.args):
                return call.args[place]
            return call.kwargs.get(name, declared.default_value)
    raise LookupError(f"{call.func} has no argument {name}")


def rows_of(t: Tensor, dim: int = -1) -> Tensor:
    """[rows, n] with dimension `dim` last; the rows in order of the other dimensions. A scalar is one row of one."""
    if t.dim() == 0:
        return t.reshape(1, 1)
    last = t.movedim(dim, -1)
    return last.reshape(math.prod(last.shape[:-1]), last.shape[-1])


def blocks(t: Tensor) -> Iterator[slice]:
    """Slices that cut the rows of t [rows, columns] into blocks of at most BLOCK_ELEMENTS (..._ON_GPU there)."""
    rows, columns = t.shape
    step = max(1, (BLOCK_ELEMENTS_ON_GPU if t.is_cuda else BLOCK_ELEMENTS) // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def by_blocks(readings: list[Tensor], like: Tensor) -> Tensor:
    """The readings of blocks as one fp32 [rows]; none is an empty one on the device of `like`."""
    return torch.cat(readings) if readings else like.new_zeros(0, dtype=torch.float32)


def ratio(residual: Tensor, limit: Tensor) -> Tensor:
    """|residual| / limit, fp32; the limit is never below NORM_FLOOR. NaN in either stays NaN."""
    return (residual.abs() / limit.clamp(min=NORM_FLOOR)).float()


def combined(weights: Tensor, rows: Tensor) -> Tensor:
    """The sum [..., d] of rows [..., n, d] times weights [..., n], all fp32, n at least 1, as a sum of shorter ones.

    On a CPU BLAS adds row by row: 2,048 equal terms, which a batch of one token repeated gives, to 3e-5 relative. In
    parts of _PART they are good to 1e-6, which a product is, and take no longer.
    """
    n = rows.shape[-2]
    whole = 0 if rows.is_cuda or n <= _PART else n - n % _PART
    if not whole:
        return torch.matmul(weights.unsqueeze(-2), rows).squeeze(-2)
    lead = rows.shape[:-2]
    first = weights[..., :whole].reshape(*lead, -1, 1, _PART)
    summed = torch.matmul(first, rows[..., :whole, :].reshape(*lead, -1, _PART, rows.shape[-1])).sum((-3, -2))
    return summed if whole == n else summed.add_(combined(weights[..., whole:], rows[..., whole:, :]))


def alike(c: Tensor, size: Tensor) -> Tensor:
    """fp32 [...]: ||C_i||, which equal terms add up to, and never more than what it can be, `size`.

    c [..., N]; size [...]. The one norm that is taken of C: a fault would have to be 1e4 times what it adds to its
    tolerance, and beyond that `size` bounds it. NaN where C has one.
    """
    return torch.minimum(torch.linalg.vector_norm(c, dim=-1, dtype=torch.float32), size)


def some_strange(readings: Tensor) -> bool:
    """Whether a reading is an infinity or NaN, none being negative; waits for the device."""
    return not math.isfinite(float(readings.sum()))


def bounded(limit: Tensor) -> Tensor:
    """On a CPU NaN, which is an alarm, for a limit that is infinite since squares overflowed; elsewhere as it is."""
    return limit if limit.is_cuda else limit.nan_to_num(nan=math.nan, posinf=math.nan)


def worst_element(out: Tensor, expected: Tensor, limit: Tensor) -> Tensor:
    """fp32 [rows]: the largest |out - expected| / limit of each row of [rows, n]; equal infinities do not differ.

    About five passes. NaN in out, expected or limit gives NaN.
    """
    if out.shape[-1] == 0:
        return out.new_zeros(out.shape[0], dtype=torch.float32)
    gap = torch.where(out == expected, 0.0, (out - expected).abs())
    return (gap / limit.clamp(min=NORM_FLOOR)).amax(-1).float()


def bits(t: Tensor) -> Tensor:
    """The tensor's bits as integers of the same size, so that NaN equals itself; complex numbers are two each.

    Of a value that torch keeps as the conjugate or the negative of another, the bits are those it stands for.
    """
    t = t.resolve_conj().resolve_neg()
    if t.is_complex():
        t = torch.view_as_real(t).flatten(max(-2, -1 - t.dim()))
    return t.view(_INTEGERS[t.element_size()])


def copy_of(t: Tensor) -> Tensor:
    """A copy whose elements lie as far apart: a loop over memory with gaps may give another last bit."""
    if t.layout is not torch.strided or t.is_conj() or t.is_neg() or 0 in t.stride():
        return t.clone()
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and type have the same bits; waits for the device."""
    if a.numel() > _MANY and _in_words(a) and _in_words(b):
        return torch.equal(a.view(torch.int64), b.view(torch.int64))  # half the comparisons, or fewer
    return torch.equal(bits(a), bits(b))


def differences(a: Tensor, b: Tensor) -> Tensor:
    """fp32 [rows]: PER_DIFFERENCE for each element of a row of [rows, n] whose bits differ, b being of a's shape.

    On a CPU one comparison without a temporary comes first: there the host waits for nobody.
    """
    if not a.is_cuda and same(a, b):
        return torch.zeros(a.shape[0], dtype=torch.float32)
    return torch.count_nonzero(bits(a) != bits(b), dim=-1).float().mul_(PER_DIFFERENCE)


def no_differences(t: Tensor) -> Tensor:
    """fp32 [rows] of zeros: what `differences` of `rows_of` says of a tensor that has none."""
    return torch.zeros(math.prod(t.shape[:-1]), dtype=torch.float32, device=t.device)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the spacing above 1: the most that rounding to nearest changes a normal number, relatively."""
    return torch.finfo(dtype).eps / 2


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a value that rounds to `expected` may stand from it in `dtype`, subnormals included; elementwise."""
    info = torch.finfo(dtype)
    return expected.abs().mul_(unit_roundoff(dtype)).add_(info.smallest_normal * info.eps)


def _in_words(t: Tensor) -> bool:
    """Whether it can be seen as 64-bit words."""
    ratio = 8 // t.element_size() if t.element_size() <= 8 else 0
    if not ratio or t.is_complex() or not t.dim() or t.stride(-1) != 1:
        return False
    places = (t.shape[-1], t.storage_offset(), *t.stride()[:-1])
    return all(place % ratio == 0 for place in places)
