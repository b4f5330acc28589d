"""The checks of what only moves: gathers, copies, concatenations, conversions and writes to chosen places.

Identity. What arrived is what should have moved, bit for bit. Each check fetches the moved values by another operator
than the one under test (rows of `embedding` and `index_select` by indexing, elements of `gather` by pairs of indices,
what `index_copy` and `scatter` wrote by reading it back), in blocks that stay in a cache, and compares bits as
integers. A hash of both sides would say the same, but for collisions, and costs 2.4 times as much (8,192 rows of 1,024
from 4,096, one thread, in blocks alike): eager torch writes its 64-bit products out.

Writes, besides: places that nothing was written to are as they were. In-place operators are given a copy of their
target from before (BEFORE). A place that is written to twice has no one right value and is left out.

Shapes that no check here has a form for (several index tensors, reductions) are run again (`recompute`).
Exact: each difference reads PER_DIFFERENCE. Sees: a wrong, lost, swapped or displaced value, to the bit. Does not see:
wrong indices or sources, which both sides share; copies between devices, which are refused.
Cost: copies, compared where they lie, two passes; else the move once more and a pass over its result, three where a
bit differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diagnostics.sensors.checks import recompute
from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked, Unsupported
from diagnostics.sensors.checks.piecewise import pieces
from diagnostics.sensors.checks.rows import (
    PER_DIFFERENCE,
    argument,
    bits,
    blocks,
    by_blocks,
    copy_of,
    differences,
    no_differences,
    rows_of,
    same,
)

SENSOR = "moves"

aten = torch.ops.aten


def slabs(t: Tensor, dim: int) -> Tensor:
    """[n, rest]: what lies at each place of dimension `dim`; a scalar is one place."""
    if t.dim() == 0:
        return t.reshape(1, 1)
    first = t.movedim(dim, 0)
    return first.reshape(first.shape[0], math.prod(first.shape[1:]))


def taken_readings(source: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Readings fp32 [k] of out [k, rest]: the rows of source [n, rest] at index int64 [k]."""
    found = [differences(out[block], source[index[block]]) for block in blocks(out)]
    return by_blocks(found, out)


def picked_readings(source: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Readings fp32 [rows] of out [rows, k]: elements of source [rows, n] at index int64 [rows, k]."""
    found = []
    for block in blocks(out):
        rows = torch.arange(block.start, block.stop, device=out.device)[:, None]
        found.append(differences(out[block], source[rows, index[block]]))
    return by_blocks(found, out)


def placed_readings(before: Tensor, index: Tensor, source: Tensor, out: Tensor) -> Tensor:
    """Readings fp32 [n] of out [n, rest]: source [k, rest] at index int64 [k], elsewhere before [n, rest]."""
    counts = torch.zeros(len(out), device=out.device).index_add_(0, index, torch.ones_like(index, dtype=torch.float32))
    strays = differences(out, before) * (counts == 0)
    landed = differences(out[index], source) * (counts[index] == 1)
    return strays.index_add_(0, index, landed)


def scattered_readings(before: Tensor, index: Tensor, source: Tensor, out: Tensor) -> Tensor:
    """Readings fp32 [rows] of out [rows, n]: source [rows, k] at index int64 [rows, k], elsewhere before [rows, n]."""
    ones = torch.ones_like(index, dtype=torch.int32)
    counts = torch.zeros(out.shape, dtype=torch.int32, device=out.device).scatter_add_(1, index, ones)
    strays = (bits(out) != bits(before)) & (counts == 0)
    landed = (bits(out.gather(1, index)) != bits(source)) & (counts.gather(1, index) == 1)
    wrong = torch.count_nonzero(strays, dim=1) + torch.count_nonzero(landed, dim=1)
    return wrong.float() * PER_DIFFERENCE


def copied_readings(source: Tensor, out: Tensor) -> Tensor:
    """Readings fp32 [rows] of out, a copy in its own type of source, of the same shape; rows of the last dimension."""
    if not out.is_cuda and all(same(out[piece], source[piece].to(out.dtype)) for piece in pieces(out)):
        return no_differences(out)
    rows, given = rows_of(out), rows_of(source)
    found = [differences(rows[block], given[block].to(out.dtype)) for block in blocks(rows)]
    return by_blocks(found, out)


def target_before(call: Call) -> Tensor:
    """What an operator's first argument was before it ran. Raises Unsupported if it was written over and not kept."""
    if not call.func._schema.is_mutable:
        first: Tensor = call.args[0]
        return first
    if not isinstance(call.before, Tensor):
        raise Unsupported(f"{call.func} wrote over its target, of which no copy was kept")
    return call.before


def keep_target(args: tuple[Any, ...], kwargs: dict[str, Any], bench: Bench) -> Tensor:
    """A copy of the first argument, as `Call.before`. One pass."""
    return copy_of(args[0])


def single_index(indices: Iterable[Tensor | None]) -> tuple[int, Tensor] | None:
    """The dimension and the index int64 [...] of a list that has one tensor of integers, else None."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype in (torch.bool, torch.uint8):
        return None
    return given[0]


def _checked(call: Call, readings: Tensor) -> Iterable[Checked]:
    return [Checked(SENSOR, "out", readings.float(), tuple(call.out.shape), exact=True)]


def _embedding(call: Call, bench: Bench) -> Iterable[Checked]:
    weight, index = argument(call, "weight"), argument(call, "indices").reshape(-1)
    return _checked(call, taken_readings(weight, index, call.out.reshape(len(index), weight.shape[1])))


def _index_select(call: Call, bench: Bench) -> Iterable[Checked]:
    dim, index = argument(call, "dim"), argument(call, "index").reshape(-1)
    return _checked(call, taken_readings(slabs(call.args[0], dim), index, slabs(call.out, dim)))


def _index(call: Call, bench: Bench) -> Iterable[Checked]:
    x, found = call.args[0], single_index(argument(call, "indices"))
    if found is None:
        return recompute.check_target(call, bench)
    dim, index = found
    out = call.out.flatten(dim, dim + index.dim() - 1) if index.dim() else call.out.unsqueeze(dim)
    flat = torch.where(index < 0, index + x.shape[dim], index).reshape(-1)
    return _checked(call, taken_readings(slabs(x, dim), flat, slabs(out, dim)))


def _gather(call: Call, bench: Bench) -> Iterable[Checked]:
    x, index, dim = call.args[0], argument(call, "index").long(), argument(call, "dim")  # an empty one is of any type
    if not x.dim() or x.dim() != index.dim():
        return recompute.check_target(call, bench)
    source = rows_of(_narrowed(x, index, dim), dim)
    return _checked(call, picked_readings(source, rows_of(index, dim), rows_of(call.out, dim)))


def _copy(call: Call, bench: Bench) -> Iterable[Checked]:
    """clone, conversions, and copy_: the argument that is read is the last of the tensors."""
    source: Tensor = [arg for arg in call.args if isinstance(arg, Tensor)][-1]
    if source.device != call.out.device:
        raise Unsupported("a copy between devices: comparing it would be another one")
    return _checked(call, copied_readings(source.expand_as(call.out), call.out))


def _cat(call: Call, bench: Bench) -> Iterable[Checked]:
    out, parts = call.out, [t for t in call.args[0] if t.shape != (0,)]
    if out.numel() == 0:
        return []
    dim, counts, start = argument(call, "dim") % out.dim(), [], 0
    for part in parts:
        arrived = out.narrow(dim, start, part.shape[dim])
        counts.append(copied_readings(part, arrived).view(part.shape[:-1]))
        start += part.shape[dim]
    whole = torch.stack(counts).sum(0) if dim == out.dim() - 1 else torch.cat(counts, dim)
    return _checked(call, whole.flatten())


def _index_copy(call: Call, bench: Bench) -> Iterable[Checked]:
    dim, index, source = (argument(call, name) for name in ("dim", "index", "source"))
    places = (slabs(target_before(call), dim), index.reshape(-1), slabs(source, dim), slabs(call.out, dim))
    return _checked(call, placed_readings(*places))


def _scatter(call: Call, bench: Bench) -> Iterable[Checked]:
    before, index, dim = target_before(call), argument(call, "index"), argument(call, "dim")
    if "reduce" in call.func._overloadname or index.dim() == 0 or not _as_wide(index, call.out, dim):
        return recompute.check_target(call, bench)
    if "value" in call.func._overloadname:
        source = torch.full_like(index, argument(call, "value"), dtype=call.out.dtype)
    else:
        source = argument(call, "src")[tuple(slice(0, size) for size in index.shape)]
    return _checked(call, scattered_readings(*(rows_of(t, dim) for t in (before, index, source, call.out))))


def _narrowed(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """x cut to the sizes of index in every dimension but `dim`: gather reads no more of it."""
    dim %= x.dim()
    return x[tuple(slice(0, x.shape[d] if d == dim else size) for d, size in enumerate(index.shape))]


def _as_wide(index: Tensor, out: Tensor, dim: int) -> bool:
    return all(index.shape[d] == out.shape[d] for d in range(out.dim()) if d != dim % out.dim())


CHECKS: dict[torch._ops.OpOverloadPacket, Check] = {
    aten.embedding: _embedding,
    aten.index_select: _index_select,
    aten.index: _index,
    aten.gather: _gather,
    aten.clone: _copy,
    aten._to_copy: _copy,
    aten.copy_: _copy,
    aten.cat: _cat,
    aten.index_copy: _index_copy,
    aten.index_copy_: _index_copy,
    aten.scatter: _scatter,
    aten.scatter_: _scatter,
}
BEFORE: dict[torch._ops.OpOverloadPacket, Before] = {aten.index_copy_: keep_target, aten.scatter_: keep_target}
