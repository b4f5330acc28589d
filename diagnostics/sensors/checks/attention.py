"""The checks of fused attention, forward: every output inside the hull of its values, sampled rows made once more.

O = P V, P = softmax(scale Q K^T + mask), which the kernel never writes down; it gives O and lse, the rows' logsumexp.

Hull, every row. P is non-negative and its rows sum to 1, so each column of O lies between the least and the largest
value of that column of V (0 included: a row that is masked throughout is 0). Tolerance: z (output + accumulate(S)) of
the column's largest size. Sees what leaves the hull: wrong exponents, stuck high bits.

Sampled rows. ROWS rows of every head, evenly spaced from an offset that the step's signs draw, are computed again in
fp32 from q, k, v: lse, then O element by element. Tolerance of lse: z (accumulate(S) + accumulate |lse| + e + exp),
where e = accumulate(D) scale ||q|| max ||k|| + accumulate max |mask| is the rounding of a score and exp, a constant of
its own ("sdpa_exp"), that of the kernel's exponential, which torch's CPU kernel for bf16 makes with a polynomial good
to 6e-5 (measured). max |mask| is over the keys whose mask is less than _CLOSED below the row's largest: others have no
weight. Where that largest is -1e4 or less, as in the rows of padding, the row's scores are rounded by as much; from
-1e6 on the tolerance admits anything, and the hull alone says something of the row.
Tolerance of O: z (accumulate(S) + e) of the column's largest size; for bf16 also the rounding of O, and z output ||P||
of that size, since kernels round P before the product.
Every row is drawn with probability ROWS / T a step, and a run of ceil(T / ROWS) wrong rows is met in every step.

Does not see: wrong q, k, v or mask; inside the hull, what the sample leaves out. Scores are where faults last longest
and show least: a wrong score leaves P stochastic, so nothing but making it again can see it in the forward. Nothing is
said of scores so large (|scale q k| above 1e5 in fp32) that their own rounding moves P.
Cost: two passes over O and four over K and V, and ROWS / T of the forward's two products; on a CPU head by head, in
the caches (`Attention.parts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked, Unsupported
from diagnostics.sensors.checks.rows import BLOCK_ELEMENTS, argument, ratio, rounding, worst_element
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import Kappa, Z

SENSOR = "attention"

# Query rows of each head that are computed again: a 64th of the forward's products at 1,024 positions.
ROWS = 16

# A mask this far below the row's largest closes its key, as models have it that write -1e4 or the least number instead
# of -inf: the key's probability is 0 however the score is rounded.
_CLOSED = 1e4

# exp of more than this is infinity in fp32: a tolerance that has grown so far says nothing, and must not become NaN.
_SATURATED = 80.0


class Part(NamedTuple):
    """Some entries of the batch, some key heads, and the query heads that share those."""

    batch: slice
    keys: slice
    queries: slice

    def of_queries(self, t: Tensor) -> Tensor:
        """Its share of a tensor [B, H, ...]."""
        return t[self.batch, self.queries]

    def of_keys(self, t: Tensor) -> Tensor:
        """Its share of a tensor [B, H / G, ...]."""
        return t[self.batch, self.keys]


@dataclass(frozen=True, slots=True)
class Attention:
    """What one call was given; G query heads share a key head."""

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, H / G, S, D]
    value: Tensor  # [B, H / G, S, Dv]
    scale: float
    causal: bool  # query t sees keys 0..t
    mask: Tensor | None  # added to the scores, broadcast to [B, H, T, S]

    @classmethod
    def of(cls, call: Call) -> Attention:
        """Read a call. Raises Unsupported for dropout and for causal masks of unequal lengths on GPUs."""
        query, key, value = (argument(call, name) for name in ("query", "key", "value"))
        if argument(call, "dropout_p") > 0:
            raise Unsupported("attention with dropout: its mask of kept weights is not given back")
        causal = bool(argument(call, "is_causal"))
        if causal and query.shape[2] != key.shape[2] and query.device.type != "cpu":
            raise Unsupported("causal attention with other numbers of queries than of keys, on a GPU")
        names = {declared.name for declared in call.func._schema.arguments}
        mask = next((argument(call, name) for name in ("attn_mask", "attn_bias") if name in names), None)
        scale = argument(call, "scale")
        return cls(query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale), causal, mask)

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def parts(self) -> Iterator[Part]:
        """Cuts the call, in the order of its heads, into parts whose operands stay in the caches of a CPU.

        A mask keeps an entry's heads together: they share it. Elsewhere than on CPUs all is one part.
        """
        (batch, heads), groups = self.key.shape[:2], self.groups
        each = max(1, max(self.query.shape[2] * groups, self.key.shape[2]) * self.query.shape[3])
        entries, some = batch, heads
        if self.key.device.type == "cpu":
            entries = max(1, BLOCK_ELEMENTS // (each * heads))
            some = max(1, BLOCK_ELEMENTS // each) if entries == 1 and self.mask is None else heads
        for b in range(0, batch, entries):
            for h in range(0, heads, some):
                yield Part(slice(b, b + entries), slice(h, h + some), slice(h * groups, (h + some) * groups))

    def at(self, part: Part) -> Attention:
        """One part of the call, with keys and values in fp32."""
        key, value = (packed(part.of_keys(t)).float() for t in (self.key, self.value))
        mask = self.mask
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[part.batch]
        return replace(self, query=part.of_queries(self.query), key=key, value=value, mask=mask)

    def grouped(self, rows: Tensor) -> Tensor:
        """fp32 [B, H / G, G m, n] of rows [B, H, m, n]: those that meet the same keys beside each other."""
        batch, _, m, n = rows.shape
        return packed(rows).float().reshape(batch, self.key.shape[1], self.groups * m, n)

    def scores(self, index: Tensor) -> Tensor:
        """fp32 [B, H / G, G m, S]: the scores of query rows `index` int64 [m], masked ones -inf."""
        batch, heads, m = self.query.shape[0], self.query.shape[1], len(index)
        keys = self.key.float()
        scores = torch.matmul(self.grouped(self.query.index_select(2, index)), keys.transpose(-1, -2))
        scores = scores.mul_(self.scale).view(batch, heads, m, -1)
        if self.mask is not None:
            mask = self.mask.expand(batch, heads, self.query.shape[2], keys.shape[2])
            scores += mask.index_select(2, index)
        if self.causal:
            future = torch.arange(keys.shape[2], device=index.device) > index[:, None]
            scores.masked_fill_(future, -torch.inf)
        return scores.view(batch, keys.shape[1], self.groups * m, -1)

    def seeing(self) -> Tensor | None:
        """bool [B, H, T]: the rows that see a key at all; None when there is no mask and all do."""
        return None if self.mask is None else (self._visible().amax(-1) != -torch.inf).expand(self.query.shape[:3])

    def _visible(self) -> Tensor:
        """The mask, -inf where a causal row sees no key."""
        assert self.mask is not None
        if not self.causal:
            return self.mask
        shape = (self.query.shape[2], self.key.shape[2])
        mask = self.mask.expand(*self.mask.shape[:-2], *shape)
        return mask.masked_fill(torch.ones(shape, dtype=torch.bool, device=mask.device).triu_(1), -torch.inf)

    def score_noise(self, kappa: Kappa, index: Tensor | None = None) -> Tensor:
        """fp32 [B, H, T], or [B, H, m] of rows `index` int64 [m]: e, one standard deviation of a row's scores (the
        largest key's), without z."""
        query = self.query if index is None else self.query.index_select(2, index)
        longest = torch.linalg.vector_norm(self.key, dim=-1, dtype=torch.float32).amax(-1)
        lengths = torch.linalg.vector_norm(query, dim=-1, dtype=torch.float32)
        largest: Tensor = lengths * longest.repeat_interleave(self.groups, dim=1)[..., None]
        noise = largest * (abs(self.scale) * kappa.accumulate_at(query.shape[-1]))
        if self.mask is None:
            return noise
        mask = self._visible()
        open_ = mask - mask.amax(-1, keepdim=True) > -_CLOSED  # not of a row that is -inf throughout: NaN
        added = torch.where(open_, mask.abs(), 0.0).amax(-1)
        if index is not None and added.shape[-1] > 1:
            added = added.index_select(-1, index)
        return noise + added.float() * kappa.accumulate


def lse_of(given: Tensor) -> Tensor:
    """fp32 [B, H, T] of what a kernel gives: cuDNN's is [B, H, T, 1]."""
    return given.squeeze(-1) if given.dim() == 4 else given


def packed(t: Tensor) -> Tensor:
    """Without gaps on a CPU, where a few rows of each page would not stay in the caches from pass to pass."""
    return t.contiguous() if t.device.type == "cpu" else t


def sampled_rows(rows: int, signs: Signs, device: torch.device) -> Tensor:
    """int64 [min(ROWS, rows)]: evenly spaced rows from an offset drawn by the step's signs, without a host sync."""
    count = min(ROWS, rows)
    bits = (signs.vector(24) > 0).float()  # 24 bits fill fp32's mantissa
    offset = (bits * torch.exp2(-torch.arange(1, 25, dtype=torch.float32, device=device))).sum()
    places = (torch.arange(count, device=device) + offset) * (rows / count)
    return places.long().clamp_(max=rows - 1)


def amplified(noise: Tensor) -> Tensor:
    """exp(z noise) - 1: how far exp of a score may stray when the score does by `noise`, large ones saturating."""
    return torch.expm1((noise * Z).clamp_(max=_SATURATED))


def hull_readings(out: Tensor, value: Tensor, kappa: Kappa) -> Tensor:
    """Readings fp32 [B H T] of out [B, H, T, Dv] against the range of value [B, H / G, S, Dv], column by column.

    On a CPU, where the host waits for nobody, columns that lie inside altogether are not looked at row by row.
    """
    groups = out.shape[1] // value.shape[1]
    low, high = value.amin(2, keepdim=True).clamp(max=0), value.amax(2, keepdim=True).clamp(min=0)
    low, high = (t.float().repeat_interleave(groups, dim=1) for t in (low, high))
    if out.device.type == "cpu" and _inside(out, low, high):
        return low.new_zeros(out.shape[:3]).flatten()
    limit = torch.maximum(high, -low) * (Z * (kappa.output + kappa.accumulate_at(value.shape[2])))
    excess = torch.maximum(out.float() - high, low - out.float()).clamp_(min=0)
    return ratio(excess, limit).amax(-1).flatten()


def _inside(out: Tensor, low: Tensor, high: Tensor) -> bool:
    """Whether every element lies in a finite range of its column; NaN does not."""
    least, largest = out.amin(2, keepdim=True), out.amax(2, keepdim=True)
    return bool(((least >= low) & (largest <= high) & (high - low).isfinite()).all())


def row_readings(
    attention: Attention, out: Tensor, lse: Tensor, index: Tensor, kappa: Kappa, of_exp: Kappa
) -> tuple[Tensor, Tensor]:
    """Readings fp32 [B H m] of out [B, H, T, Dv] and of lse [B, H, T] at query rows `index` int64 [m].

    kappa: of the products; of_exp: of the kernel's exponential.
    """
    scores, keys = attention.scores(index), attention.key.shape[2]
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - total.clamp(min=torch.finfo(torch.float32).min))  # masked throughout: all zeros
    value = attention.value.float()
    noise = attention.grouped(attention.score_noise(kappa, index)[..., None])
    expected = torch.matmul(weights, value)
    largest = value.abs().amax(2, keepdim=True)
    limit = largest * (amplified(noise) + Z * kappa.accumulate_at(keys))
    if kappa.output:
        spread = torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
        limit += rounding(expected, out.dtype) + largest * spread * (Z * kappa.output)
    of_out = worst_element(attention.grouped(out.index_select(2, index)), expected, limit)
    given = attention.grouped(lse.index_select(2, index)[..., None])
    seen = total != -torch.inf  # the lse of a row that is masked throughout is a kernel's own affair
    lse_limit = (noise + kappa.accumulate_at(keys) + of_exp.accumulate + kappa.accumulate * total.abs()) * Z
    of_lse = torch.where(seen, ratio(given - total, lse_limit), 0.0)
    return of_out.flatten(), of_lse.flatten()


def _forward(call: Call, bench: Bench) -> Iterable[Checked]:
    out, lse = call.out[0], lse_of(call.out[1])
    attention = Attention.of(call)
    kappa = bench.kappa("sdpa", out)
    if out.numel() == 0 or attention.key.shape[2] == 0:
        return
    index = sampled_rows(out.shape[2], bench.signs, out.device)
    hull, of_out, of_lse = [], [], []
    for part in attention.parts():
        some, given = attention.at(part), part.of_queries(out)
        hull.append(hull_readings(given, some.value, kappa))
        if lse.numel():  # without it nobody will go backwards
            rows = row_readings(some, given, part.of_queries(lse), index, kappa, bench.kappa("sdpa_exp", out))
            of_out.append(rows[0])
            of_lse.append(rows[1])
    yield Checked(SENSOR, "out", torch.cat(hull), tuple(out.shape))
    if of_out:
        shape = (*out.shape[:2], len(index), out.shape[3])
        yield Checked(SENSOR, "out rows", torch.cat(of_out), shape)
        yield Checked(SENSOR, "lse", torch.cat(of_lse), shape[:3])


CHECKS: dict[torch._ops.OpOverloadPacket, Check] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention: _forward,
    torch.ops.aten._scaled_dot_product_efficient_attention: _forward,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _forward,
}
BEFORE: dict[torch._ops.OpOverloadPacket, Before] = {}  # none of them writes to an argument
