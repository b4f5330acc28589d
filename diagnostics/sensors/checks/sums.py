"""The checks of sums at chosen places: index_add, scatter_add, index_put with accumulation, the embedding's gradient.

Identity. Row v of the result is what was there plus the rows that were sent to v. Taken to the right by the step's
weights r, each row becomes one number, and the numbers are added the same way: out r = before r + sum over i of
alpha (source_i r) at index_i. One reading for each row of the result. scatter_add sends elements, not rows: there the
signs go by place, out r = before r + sum over k of source_k r[index_k], one reading for each row; for integers the
signs are hashes mod 2^64 and the check is exact.

Tolerance of a row, for c rows that were sent to it: z (accumulate(max(n, sent)) + output sqrt(1 + c)) times the sum of
their norms and its own before: each addition in bf16 rounds a partial sum, which is at most that sum. In fp32 equal
rows (one token repeated) are added one by one, and their roundings are alike: (1 + c) 2^-24 ||out|| more, a bound of
those of the result and of the check. scatter_add: the same with sizes of elements.

Sees: a row that was lost, sent to another place, added twice or altered, above 4e-6 of what its row received in fp32.
Does not see: wrong indices or sources; one lost of 4,000 equal rows; below that floor in bf16 (0.075 of what a row
received, and more for rows that received many). All but the integers' are run again as well (`thin`). Integers other
than scatter_add's, and index_put with several index tensors, are run again (`recompute`); the embedding's gradient
scaled by frequency is refused.
Cost: one pass over the source, three over the result and one over what was there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diagnostics.sensors.checks import recompute
from diagnostics.sensors.checks.moves import keep_target, single_index, slabs, target_before
from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked, Unsupported
from diagnostics.sensors.checks.router import hashed
from diagnostics.sensors.checks.rows import PER_DIFFERENCE, alike, argument, ratio, rows_of
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import Kappa, Z

SENSOR = "sums"

# The most that one addition and the one of the check stray by, relative to the sum, when all of a row stray alike.
_EACH = 2.0**-24

aten = torch.ops.aten


def added_readings(
    before: Tensor | None, index: Tensor, source: Tensor, out: Tensor, alpha: float, signs: Signs, kappa: Kappa
) -> Tensor:
    """Readings fp32 [n] of out [n, rest]: before [n, rest] (None: zeros) plus alpha source [k, rest] at index [k]."""
    n, width = out.shape
    r = signs.vector(width)
    sent = source.float()
    rows = torch.mv(sent, r), torch.linalg.vector_norm(sent, dim=1), r.new_ones(len(index))
    expected, sizes, counts = (r.new_zeros(n).index_add_(0, index, row) for row in rows)
    expected, sizes = expected * alpha, sizes * abs(alpha)
    if before is not None:
        expected = expected + torch.mv(before.float(), r)
        sizes = sizes + torch.linalg.vector_norm(before, dim=1, dtype=torch.float32)
    noise = kappa.accumulate_at(max(width, len(index))) + kappa.output * (1 + counts).sqrt()
    limit = sizes * noise * Z
    if not kappa.output:
        limit += (1 + counts) * _EACH * alike(out, sizes)
    return ratio(torch.mv(out.float(), r) - expected, limit)


def scattered_sum_readings(
    before: Tensor, index: Tensor, source: Tensor, out: Tensor, signs: Signs, kappa: Kappa
) -> Tensor:
    """Readings fp32 [rows] of out [rows, n]: before [rows, n] plus source [rows, k] at index int64 [rows, k]."""
    n, sent, there = out.shape[1], source.float(), before.float()
    r = signs.vector(n)
    expected = torch.mv(there, r) + (sent * r[index]).sum(1)
    sizes = torch.linalg.vector_norm(there, dim=1) + sent.abs().sum(1)
    noise = kappa.accumulate_at(max(n, index.shape[1])) + kappa.output * (1 + index.shape[1]) ** 0.5
    limit = sizes * (noise * Z)
    if not kappa.output:
        limit += alike(out, sizes) * ((1 + index.shape[1]) * _EACH)
    return ratio(torch.mv(out.float(), r) - expected, limit)


def scattered_count_readings(before: Tensor, index: Tensor, source: Tensor, out: Tensor) -> Tensor:
    """The same for integers, exactly."""
    weights = hashed(torch.arange(out.shape[1], device=out.device))
    moved = ((out.long() - before.long()) * weights).sum(1)
    return (moved != (source.long() * weights[index]).sum(1)).float() * PER_DIFFERENCE


def _add_rows(
    call: Call, bench: Bench, before: Tensor | None, dim: int, index: Tensor, source: Tensor, alpha: float
) -> Iterable[Checked]:
    kappa = bench.kappa("sums", call.out)
    rows = slabs(call.out, dim)
    if rows.numel() == 0:
        return []
    there = None if before is None else slabs(before, dim)
    source = source.reshape(len(index), rows.shape[1])
    readings = added_readings(there, index, source, rows, alpha, bench.signs, kappa)
    return [Checked(SENSOR, "out", readings, tuple(call.out.shape))]


def _index_add(call: Call, bench: Bench) -> Iterable[Checked]:
    if not call.out.is_floating_point():
        return recompute.check_target(call, bench)
    dim, index, source = (argument(call, name) for name in ("dim", "index", "source"))
    alpha = float(argument(call, "alpha"))
    return _add_rows(call, bench, target_before(call), dim, index.reshape(-1), slabs(source, dim), alpha)


def _index_put(call: Call, bench: Bench) -> Iterable[Checked]:
    found, values = single_index(argument(call, "indices")), argument(call, "values")
    if not argument(call, "accumulate") or found is None or found[0] != 0 or not call.out.is_floating_point():
        return recompute.check_target(call, bench)
    index = found[1]
    flat = torch.where(index < 0, index + call.out.shape[0], index).reshape(-1)
    source = values.expand(*index.shape, *call.out.shape[1:])
    return _add_rows(call, bench, target_before(call), 0, flat, source, 1.0)


def _embedding_backward(call: Call, bench: Bench) -> Iterable[Checked]:
    if argument(call, "scale_grad_by_freq"):
        raise Unsupported("the embedding's gradient scaled by frequency")
    grad, index = argument(call, "grad_output"), argument(call, "indices").reshape(-1)
    padding = argument(call, "padding_idx")
    if padding >= 0:
        grad = torch.where((index == padding).view(*grad.shape[:-1], 1), 0.0, grad)
    return _add_rows(call, bench, None, 0, index, grad, 1.0)


def _scatter_add(call: Call, bench: Bench) -> Iterable[Checked]:
    out, before, dim = call.out, target_before(call), argument(call, "dim")
    index, source = argument(call, "index").long(), argument(call, "src")  # an empty one is of any type
    wide = 0 < out.dim() == index.dim() and all(
        index.shape[d] == out.shape[d] for d in range(out.dim()) if d != dim % out.dim()
    )
    if not wide:
        return recompute.check_target(call, bench)
    source = source[tuple(slice(0, size) for size in index.shape)]
    if out.numel() == 0:
        return []
    there, places, sent, rows = (rows_of(t, dim) for t in (before, index, source, out))
    if out.is_floating_point():
        kappa = bench.kappa("sums", out)
        readings = scattered_sum_readings(there, places, sent, rows, bench.signs, kappa)
    else:
        readings = scattered_count_readings(there, places, sent, rows)
    return [Checked(SENSOR, "out", readings, tuple(out.shape), exact=not out.is_floating_point())]


CHECKS: dict[torch._ops.OpOverloadPacket, Check] = {
    aten.index_add: _index_add,
    aten.index_add_: _index_add,
    aten.index_put: _index_put,
    aten.index_put_: _index_put,
    aten._index_put_impl_: _index_put,
    aten.embedding_dense_backward: _embedding_backward,
    aten.scatter_add: _scatter_add,
    aten.scatter_add_: _scatter_add,
}
BEFORE: dict[torch._ops.OpOverloadPacket, Before] = {
    aten.index_add_: keep_target,
    aten.index_put_: keep_target,
    aten._index_put_impl_: keep_target,
    aten.scatter_add_: keep_target,
}
