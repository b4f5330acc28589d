"""The checks of fused attention, backward: three identities over every element of dQ, dK and dV, and sampled rows.

With P = softmax(scale Q K^T + mask), dP = dO V^T, D = rowsum(dO O), dS = P (dP - D):
    dV = P^T dO        dQ = scale dS K        dK = scale dS^T Q
A row of P sums to 1, and a row of dS to 0, because D = sum over keys of P dP. Hence for each key head, sums over its
query heads included:
1. sum over keys of dV = sum over queries of dO;
2. sum over keys of dK = 0;
3. Q^T dQ = scale Q^T dS K = dK^T K, taken once to the right by the step's weights r: Q^T (dQ r) = dK^T (K r).
All three cost a few passes over the operands, none the size of S. A wrong element of P shows in 1 (its row no longer
sums to 1, lse being the forward's), one of dP or D in 2, one of dQ in 3. Rows that are masked throughout are left out
of the sum of dO.

Tolerances, per column j, with n the longer of the lengths T and S, u the unit roundoff, e the score noise of
`attention`, and eta_t = (accumulate(Dv) + accumulate(S) + e_t) ||dO_t|| max ||V_s|| the noise of a row sum of dS:
1. z accumulate(n) (||dO_j|| + |sum dO_j|) + ||(exp(z e) - 1) dO_j|| + 2 u sqrt(1 + n / 64) |sum dO_j|; bf16:
   z output (||dV_j|| + ||dO_j||);
2. scale ||z eta Q_j|| + z accumulate(n) ||dK_j||; bf16: z output (||dK_j|| + scale || ||dO_t O_t|| Q_tj ||), the
   latter because D is made from an O that was rounded;
3. z (accumulate(n) + output) (|| ||dQ_t|| Q_tj || + || ||K_s|| dK_sj ||); bf16: z output scale ||z eta Q_j|| max
   ||K_s|| more, for sums of blocks that cancel where all values of a head are equal and dS is nothing but its noise.
torch's CPU kernel adds blocks of dK and dV in bf16: output is 5.8e-3 there, not the 1.6e-3 of one rounding.
Here norms of results enter, against the rule of the other sensors: nothing made of q, k, v, dO alone is near enough to
||dK_j|| without the products themselves. They cannot hide a fault: with theta = z kappa and N the norm without it, a
fault d of one element raises the tolerance to at most theta sqrt(N^2 + d^2), and is seen from d = theta N /
sqrt(1 - theta^2) on; theta is 0.041 in bf16 and 1e-5 and less in fp32. A norm whose squares overflow reads NaN.

Sampled rows of dQ (the forward's choice) are made again from q, k, v, dO and lse, element by element, with
scale (z eta + z output ||dS||) max |K_j| and the rounding of dQ.

Does not see: wrong q, k, v, dO; an O and lse that are wrong together; faults that cancel in a column of dK or dV; those
of a dQ row whose q is zero. A stuck dS that both products read shows in 2 only. Cost: about 30 passes over q's size,
on a CPU head by head in the caches: eight over memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.sensors.checks.attention import SENSOR, Attention, Part, amplified, lse_of, packed, sampled_rows
from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked
from diagnostics.sensors.checks.rows import argument, combined, ratio, rounding, unit_roundoff, worst_element
from diagnostics.sensors.tolerance import LANE_TERMS, Kappa, Z

# Where attention is uniform, as at the start of training, the weights of a row are equal and round the same way, and so
# do the rows of dV, block after block: roundings of the two that add up instead of averaging out.
_ALIKE = 2.0


@dataclass(frozen=True, slots=True)
class Backward:
    """One part of a backward call: what came in, grouped by key head (Q = G T queries each), in fp32."""

    attention: Attention
    query: Tensor  # [B, H / G, Q, D]
    grad: Tensor  # [B, H / G, Q, Dv]; 0 where a row is masked throughout
    lse: Tensor  # [B, H / G, Q, 1]
    key: Tensor  # [B, H / G, S, D]
    value: Tensor  # [B, H / G, S, Dv]
    out: Tensor  # [B, H, T, Dv], as it was given
    score_noise: Tensor  # [B, H / G, Q, 1]
    dot_noise: Tensor  # [B, H / G, Q, 1]: z eta, the noise of one row's dP - D
    kappa: Kappa  # of the results
    inner: Kappa  # of the products that P and dP come from, as in the forward

    @classmethod
    def of(cls, call: Call, whole: Attention, part: Part, grad: Tensor, kappa: Kappa, inner: Kappa) -> Backward:
        """Read a part of a call's operands."""
        attention, rows = whole.at(part), whole.query.shape[2]
        query = attention.grouped(attention.query)
        attention = replace(attention, query=query.reshape(attention.query.shape))
        lse = part.of_queries(lse_of(argument(call, "logsumexp")))
        lse = attention.grouped(lse[..., :rows, None])  # some kernels pad it
        seeing, grad = attention.seeing(), attention.grouped(part.of_queries(grad))
        if seeing is not None:
            grad = torch.where(attention.grouped(seeing[..., None]) != 0, grad, 0.0)
        noise = attention.grouped(attention.score_noise(inner)[..., None])
        sums = Z * (inner.accumulate_at(attention.value.shape[3]) + inner.accumulate_at(attention.key.shape[2]))
        dots = (amplified(noise) + sums) * _lengths(grad) * _lengths(attention.value).amax(2, keepdim=True)
        out = part.of_queries(argument(call, "out"))
        key, value = attention.key, attention.value
        return cls(attention, query, grad, lse, key, value, out, noise, dots, kappa, inner)

    @property
    def terms(self) -> int:
        """The longest sum: over a head's queries or keys."""
        return max(self.query.shape[2], self.key.shape[2])


def dv_readings(given: Backward, dv: Tensor) -> Tensor:
    """Readings fp32 [B H/G] of dv [B, H/G, S, Dv]: its sum over keys is dO's over queries."""
    kappa, alike = given.kappa, unit_roundoff(dv.dtype)
    dv = packed(dv).float()
    total = given.grad.sum(2)
    size = _column_norms(given.grad)
    drift = total.abs() * (_ALIKE * alike * (1 + given.terms / LANE_TERMS) ** 0.5)
    limit = (size + total.abs()) * (Z * kappa.accumulate_at(given.terms)) + drift
    limit += _column_norms(amplified(given.score_noise) * given.grad)
    limit += (_bounded(_column_norms(dv)) + size) * (Z * kappa.output)
    return ratio(dv.sum(2) - total, limit).amax(-1).flatten()


def dk_readings(given: Backward, dk: Tensor) -> Tensor:
    """Readings fp32 [B H/G] of dk [B, H/G, S, D]: its sum over keys is 0."""
    kappa, dk = given.kappa, dk.float()
    scale = abs(given.attention.scale)
    limit = _column_norms(given.dot_noise * given.query) * scale
    limit += _bounded(_column_norms(dk)) * (Z * (kappa.accumulate_at(given.terms) + kappa.output))
    if kappa.output:
        corrected = given.grad * given.attention.grouped(given.out)  # D is its row sum
        limit += _column_norms(_lengths(corrected) * given.query) * (Z * kappa.output * scale)
    return ratio(dk.sum(2), limit).amax(-1).flatten()


def dq_readings(given: Backward, dq: Tensor, dk: Tensor, r: Tensor) -> Tensor:
    """Readings fp32 [B H/G] of dq [B, H, T, D] and dk [B, H/G, S, D]: Q^T (dQ r) = dK^T (K r), signs r fp32 [D]."""
    dq, dk, kappa = given.attention.grouped(dq), dk.float(), given.kappa
    there = combined(torch.matmul(dq, r), given.query)
    back = combined(torch.matmul(given.key, r), dk)
    sizes = _column_norms(_lengths(dq) * given.query) + _column_norms(_lengths(given.key) * dk)
    limit = _bounded(sizes) * (Z * (kappa.accumulate_at(given.terms) + kappa.output))
    if kappa.output:
        longest = _lengths(given.key).amax(2) * abs(given.attention.scale)
        limit += _column_norms(given.dot_noise * given.query) * longest * (Z * kappa.output)
    return ratio(there - back, limit).amax(-1).flatten()


def dq_row_readings(given: Backward, dq: Tensor, index: Tensor) -> Tensor:
    """Readings fp32 [B H m] of dq [B, H, T, D] at query rows `index` int64 [m], made again element by element."""
    attention, kappa = given.attention, given.kappa
    batch, heads, m = dq.shape[0], given.key.shape[1], len(index)

    def picked(grouped: Tensor) -> Tensor:
        rows = grouped.view(batch, heads * attention.groups, dq.shape[2], -1).index_select(2, index)
        return rows.reshape(batch, heads, attention.groups * m, -1)

    weights = torch.exp(attention.scores(index) - picked(given.lse).clamp(min=torch.finfo(torch.float32).min))
    products = torch.matmul(picked(given.grad), given.value.transpose(-1, -2))
    corrected = picked(given.grad) * attention.grouped(given.out.index_select(2, index))
    slopes = weights * (products - corrected.sum(-1, keepdim=True))
    expected = torch.matmul(slopes, given.key) * attention.scale
    noise = picked(given.dot_noise) + _lengths(slopes) * (Z * kappa.output)
    limit = noise * given.key.abs().amax(2, keepdim=True) * abs(attention.scale)
    if kappa.output:
        limit += rounding(expected, dq.dtype)
    return worst_element(attention.grouped(dq.index_select(2, index)), expected, limit).flatten()


def _column_norms(t: Tensor) -> Tensor:
    """[B, H, n] of fp32 [B, H, rows, n]. On CPUs torch's norm over another dimension than the last takes six times as
    long as squares and their sum; on GPUs it writes no squares."""
    norms: Tensor = t.square().sum(2).sqrt_() if t.device.type == "cpu" else torch.linalg.vector_norm(t, dim=2)
    return norms


def _bounded(norms: Tensor) -> Tensor:
    """Norms of results: NaN, which is an alarm, for the infinity that squares from 1.8e19 on add up to."""
    return torch.where(norms == torch.inf, torch.nan, norms)


def _lengths(t: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    return lengths


def _backward(call: Call, bench: Bench) -> Iterable[Checked]:
    dq, dk, dv = call.out[:3]
    name = call.func._schema.arguments[0].name  # grad_out, or grad_out_ in the efficient kernel
    attention, grad = Attention.of(call), argument(call, name)
    if grad.numel() == 0 or attention.key.numel() == 0:
        return
    kappa, inner = bench.kappa("sdpa_backward", grad), bench.kappa("sdpa", grad)
    signs, index = bench.signs.vector(dq.shape[3]), sampled_rows(dq.shape[2], bench.signs, dq.device)
    found: dict[str, list[Tensor]] = {"dv": [], "dk": [], "dq": [], "dq rows": []}
    for part in attention.parts():
        given = Backward.of(call, attention, part, grad, kappa, inner)
        of_queries, of_keys = part.of_queries(dq), packed(part.of_keys(dk))
        found["dv"].append(dv_readings(given, part.of_keys(dv)))
        found["dk"].append(dk_readings(given, of_keys))
        found["dq"].append(dq_readings(given, of_queries, of_keys, signs))
        found["dq rows"].append(dq_row_readings(given, of_queries, index))
    rows = (*dq.shape[:2], len(index), dq.shape[3])
    for name, shape in (("dv", dv.shape), ("dk", dk.shape), ("dq", dk.shape), ("dq rows", rows)):
        yield Checked(SENSOR, name, torch.cat(found[name]), tuple(shape))


CHECKS: dict[torch._ops.OpOverloadPacket, Check] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _backward,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward: _backward,
}
BEFORE: dict[torch._ops.OpOverloadPacket, Before] = {}  # none of them writes to an argument
