"""The checks of routing and ordering: topk, sort, counts and running sums, and where a token's copies went.

topk. (1) values = input at the indices, bit for bit; (2) the indices of a row are distinct and within it; (3) as many
elements of the row lie beyond the least chosen as of the chosen, so nothing better was left out; (4) sorted when asked.
NaN is the largest, as torch has it.
sort. As (1) and (4), and the indices are a permutation: each falls within the row and the sum of hash(index) mod 2^64
is that of 0..n-1 (a plain sum would miss a pair of errors that cancel).
bincount. Counts sum to the number of elements, and sum over bins of count * hash(bin) = sum over elements of
hash(element) mod 2^64, so that a count in the wrong bin shows. With weights: the same with signs for the hash, and
z accumulate(elements) times the sum of the weights' sizes. histc: the counts sum to the elements within range.
cumsum. Each element less its predecessor is what was added: exact for integers; else within
z accumulate(n) times the row's sum of sizes, and the roundings of the two. From the first infinity or NaN that is added
on the sums are what the infinities and NaN alone add up to.

The whole router, as pure functions for whoever announces it: gates of a token sum to their constant; the experts'
counts sum to tokens times copies; of a token's copies each comes home once, its row unchanged (`home_readings`).

Exact checks have no tolerance: each difference reads PER_DIFFERENCE. Sees: any wrong value, index, order or count.
Does not see: wrong scores; which of equal elements was chosen; histc's bins, if their sum is right. Cost in passes over
the input: topk 2, sort 6, bincount 3, histc 3, cumsum 4.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked, Unsupported
from diagnostics.sensors.checks.rows import PER_DIFFERENCE, argument, bits, differences, ratio, rows_of, unit_roundoff
from diagnostics.sensors.tolerance import Kappa, Z

SENSOR = "router"

# splitmix64's constants as signed 64-bit integers: products of tensors wrap around, as the mixer wants.
_STEP, _MIX_A, _MIX_B = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_LOW = {30: (1 << 34) - 1, 27: (1 << 37) - 1, 31: (1 << 33) - 1}  # what a logical shift right leaves of 64 bits


def hashed(index: Tensor) -> Tensor:
    """int64 of the same shape: splitmix64 of each integer, on the device (see `multilinear.splitmix64`)."""
    x = index.long() + _STEP
    x = (x ^ ((x >> 30) & _LOW[30])) * _MIX_A
    x = (x ^ ((x >> 27) & _LOW[27])) * _MIX_B
    return x ^ ((x >> 31) & _LOW[31])


def gate_readings(gates: Tensor, total: float, kappa: Kappa) -> Tensor:
    """Readings fp32 [tokens] of gates [tokens, copies]: each row sums to `total`."""
    noise = kappa.accumulate_at(gates.shape[1]) + kappa.output
    return ratio(gates.float().sum(-1) - total, gates.new_full((), abs(total) * Z * noise, dtype=torch.float32))


def count_readings(counts: Tensor, tokens: int, copies: int) -> Tensor:
    """Reading fp32 [1] of the experts' counts [experts]: together they are tokens times copies."""
    return (counts.sum() - tokens * copies).abs().float().reshape(1) * PER_DIFFERENCE


def home_readings(sent: Tensor, home: Tensor, index: Tensor, copies: int) -> Tensor:
    """Readings fp32 [tokens]: each token was received `copies` times and each time with the row that was sent.

    sent: rows [tokens, n] as they left. home: rows [copies in all, n] as they arrived. index: int64 [copies in all],
    the token each of them says it is; one that is no token counts against token 0.
    """
    tokens = sent.shape[0]
    strays = (index < 0) | (index >= tokens)
    index = torch.where(strays, 0, index)
    weights = hashed(torch.arange(sent.shape[1], device=sent.device))
    left, arrived = ((bits(rows).long() * weights).sum(-1) for rows in (sent, home))
    wrong = ((arrived != left[index]) | strays).float()
    counts = wrong.new_zeros(tokens).index_add_(0, index, torch.ones_like(wrong))
    changed = wrong.new_zeros(tokens).index_add_(0, index, wrong)
    return ((counts - copies).abs() + changed) * PER_DIFFERENCE


def chosen_readings(x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """Readings fp32 [rows]: values [rows, k] are those of x [rows, n] at index int64 [rows, k], all within the row."""
    outside = (index < 0) | (index >= x.shape[1])
    picked = x.gather(1, index.clamp(0, max(x.shape[1] - 1, 0)))
    wrong = differences(values, picked)
    if values.is_floating_point() and (values.is_cuda or bool(wrong.any())):  # in bf16 torch gives NaN other bits
        wrong = differences(values, torch.where(values.isnan() & picked.isnan(), values, picked))
    return wrong + torch.count_nonzero(outside, dim=1).float() * PER_DIFFERENCE


def order_readings(values: Tensor, descending: bool) -> Tensor:
    """Readings fp32 [rows] of values [rows, n] that must be in torch's order, in which NaN is the largest."""
    small, large = (values[:, 1:], values[:, :-1]) if descending else (values[:, :-1], values[:, 1:])
    wrong = ~((small <= large) | large.isnan())
    return torch.count_nonzero(wrong, dim=1).float() * PER_DIFFERENCE


def best_readings(x: Tensor, values: Tensor, index: Tensor, largest: bool) -> Tensor:
    """Readings fp32 [rows]: index int64 [rows, k] are distinct places of x [rows, n], and none is better elsewhere."""
    n = x.shape[1]
    seen = torch.zeros(x.shape[0], n, dtype=torch.bool, device=x.device)
    distinct = seen.scatter_(1, index.clamp(0, n - 1), True).sum(1)
    if largest:
        least = values.amin(-1, keepdim=True)
        if x.is_floating_point():  # NaN is the least only where all are NaN
            nan = values.isnan()
            least = torch.where(nan, torch.inf, values).amin(-1, keepdim=True)
            least = torch.where(nan.all(-1, keepdim=True), torch.nan, least)
        better, chosen = ((t > least) | (t.isnan() & ~least.isnan()) for t in (x, values))
    else:
        most = values.amax(-1, keepdim=True)
        better, chosen = ((t < most) | (~t.isnan() & most.isnan()) for t in (x, values))
    missed = torch.count_nonzero(better, dim=1) - torch.count_nonzero(chosen, dim=1)
    return ((index.shape[1] - distinct).abs() + missed.abs()).float() * PER_DIFFERENCE


def permutation_readings(index: Tensor) -> Tensor:
    """Readings fp32 [rows] of index int64 [rows, n]: each row holds every integer 0..n-1 once."""
    every = hashed(torch.arange(index.shape[1], device=index.device)).sum()
    return (hashed(index).sum(1) != every).float() * PER_DIFFERENCE


def running_readings(x: Tensor, sums: Tensor, kappa: Kappa | None) -> Tensor:
    """Readings fp32 [rows] of running sums [rows, n] of x [rows, n]; kappa None: integers, exact."""
    if kappa is None:
        steps = torch.diff(sums, dim=1, prepend=torch.zeros_like(sums[:, :1]))
        return torch.count_nonzero(steps != x.to(sums.dtype), dim=1).float() * PER_DIFFERENCE
    wide, given = sums.float(), x.float()
    gaps = torch.diff(wide, dim=1, prepend=torch.zeros_like(wide[:, :1])) - given
    noise = Z * kappa.accumulate_at(x.shape[1])
    if sums.dtype != torch.float32:
        noise += 2 * unit_roundoff(sums.dtype)
    readings = ratio(gaps, given.abs().sum(1, keepdim=True) * noise).amax(-1)
    if not x.is_cuda and not bool(readings.isnan().any()):
        return readings
    finite = given.isfinite()
    spoilt = torch.cumsum(torch.where(finite, 0.0, given), 1)  # 0, and from the first infinity or NaN on what it leaves
    as_it_must = (wide == spoilt) | (wide.isnan() & spoilt.isnan())
    of_steps = ratio(gaps, torch.where(finite, given.abs(), 0.0).sum(1, keepdim=True) * noise)
    return torch.where(spoilt == 0, of_steps, torch.where(as_it_must, 0.0, torch.inf)).amax(-1)


def _topk(call: Call, bench: Bench) -> Iterable[Checked]:
    values, index = call.out
    x, dim = call.args[0], argument(call, "dim")
    if values.numel() == 0:
        return
    rows, top, places = rows_of(x, dim), rows_of(values, dim), rows_of(index, dim)
    largest = argument(call, "largest")
    readings = chosen_readings(rows, top, places) + best_readings(rows, top, places, largest)
    if argument(call, "sorted"):
        readings = readings + order_readings(top, largest)
    yield Checked(SENSOR, "out", readings.float(), tuple(values.shape), exact=True)


def _sort(call: Call, bench: Bench) -> Iterable[Checked]:
    if "Tensor" not in str(call.func._schema.arguments[0].type):
        raise Unsupported("a sort of a Python list")
    values, index = call.out
    if values.numel() == 0:
        return
    dim = argument(call, "dim")
    rows, order, places = rows_of(call.args[0], dim), rows_of(values, dim), rows_of(index, dim)
    readings = chosen_readings(rows, order, places) + permutation_readings(places)
    readings = readings + order_readings(order, argument(call, "descending"))
    yield Checked(SENSOR, "out", readings.float(), tuple(values.shape), exact=True)


def _cumsum(call: Call, bench: Bench) -> Iterable[Checked]:
    out = call.out
    kappa = bench.kappa("cumsum", out) if out.is_floating_point() else None
    if out.numel() == 0:
        return
    dim = argument(call, "dim")
    readings = running_readings(rows_of(call.args[0], dim), rows_of(out, dim), kappa)
    yield Checked(SENSOR, "out", readings.float(), tuple(out.shape), exact=kappa is None)


def _bincount(call: Call, bench: Bench) -> Iterable[Checked]:
    x, weights, out = call.args[0], argument(call, "weights"), call.out
    bins = torch.arange(len(out), device=out.device)
    if weights is None:
        wrong = (out.sum() != len(x)) | ((out * hashed(bins)).sum() != hashed(x).sum())
        yield Checked(SENSOR, "out", wrong.float().reshape(1) * PER_DIFFERENCE, tuple(out.shape), exact=True)
        return
    kappa = bench.kappa("sums", out)
    signs = bench.signs.vector(max(len(out), 1)).to(out.dtype)
    expected = (signs[x.long()] * weights).sum()
    size = weights.abs().sum()
    reading = ratio((out * signs).sum() - expected, size * (Z * kappa.accumulate_at(len(x))))
    yield Checked(SENSOR, "out", reading.reshape(1), tuple(out.shape))


def _histc(call: Call, bench: Bench) -> Iterable[Checked]:
    x, low, high = call.args[0], argument(call, "min"), argument(call, "max")
    if low == high:
        raise Unsupported("a histogram over its own range")
    within = torch.count_nonzero((x >= low) & (x <= high))
    wrong = (call.out.double().sum() - within).abs().float() * PER_DIFFERENCE
    yield Checked(SENSOR, "out", wrong.reshape(1), tuple(call.out.shape), exact=True)


CHECKS: dict[torch._ops.OpOverloadPacket, Check] = {
    torch.ops.aten.topk: _topk,
    torch.ops.aten.sort: _sort,
    torch.ops.aten.cumsum: _cumsum,
    torch.ops.aten.bincount: _bincount,
    torch.ops.aten.histc: _histc,
}
BEFORE: dict[torch._ops.OpOverloadPacket, Before] = {}  # none of them writes to an argument
