"""The row check of a matrix product: C r = A (W r), for random weights r (`signs.py`).

Identity. C = alpha A W + beta D, so C r - alpha A (W r) - beta D r is rounding noise, row by row; thin products check a
whole GEMM. Forward, dgrad (G W^T) and wgrad (G^T A) are the same identity, and so are batched products, batch by batch.

Tolerance of row i, z = 7: z (kappa_output * norm_i + kappa_accumulate * (|alpha| ||A_i|| ||W||_F + |beta| ||D_i||)),
and for fp32 results z kappa_accumulate * 10 ||C_i|| more.
The first term is the rounding of each element of C to its type and exists for 16-bit outputs only; norm_i stands for
||C_i|| but is never computed from C, since a corrupted C would raise its own threshold. It comes from probes:
E[(C s)_i^2] = ||C_i||^2 for random signs s, with C s made from A, W and D. The estimate has m = 32 degrees of freedom;
to it is added ||A_i||^2 times the batch's mean gain (sum of estimates / sum of ||A_i||^2), so that one row's unlucky
draw cannot make its tolerance vanish. The second term is Cauchy-Schwarz on the fp32 sums, sqrt(K) looser than typical
noise, and still 1e-3 of an element or less. Roundings of K equal terms (one token repeated) are alike, and add up
instead of averaging out: the third term, which is as large as the second where all are equal, and 10 / sqrt(K) of it
where none are. On a CPU it is made only where a reading without it exceeds a half.

On a CPU, in fp32, a bound of the readings comes first where A's norms are not known: an eighth of A's and W's elements
gives norms that are at most theirs. Readings that are below a half of that tolerance need no other.

Operands that are not finite. An infinite D (a mask) makes C the same there, element by element; the rest of such a row,
and rows that an infinity or NaN of A or W reaches, read NaN, and are run again (`undecided`). On a GPU, where nobody
asks, rows whose prediction is not finite read 0, and so do rows of fp16 results with an infinity whose norm is about
that large. Where C or norms leave the range of their types though all operands are finite: `beyond`.

Sees: any change of C above the floor (a non-finite value where there should be none). Does not see: wrong A or W, which
both sides share; what happens to C after the check; changes below the floor. Cost: in fp32 one pass over each of A, W
and C, a quarter for the bound, and where it does not suffice the norms of A and W that no other product has measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from diagnostics.sensors.checks.beyond import all_finite, shrunk
from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked, Unsupported
from diagnostics.sensors.checks.rounded import energy_readings, mean_gain
from diagnostics.sensors.checks.rows import PER_DIFFERENCE, alike, bounded, combined, rows_of, some_strange
from diagnostics.sensors.checks.signs import PROBES, Signs
from diagnostics.sensors.tolerance import NORM_FLOOR, Kappa, Z

SENSOR = "gemm"
KERNEL = "mm"

#: How much larger the roundings of equal terms are than those of others, relative to the sum.
ALIKE = 10.0

# A bound of a reading stands for it below this. Calibration leaves readings of fp32 sums there, and so sees the same.
_SURE = 0.5

# Terms of a sum that one product of a matrix's rows with a vector may add, and one of a batch.
_PART, _PART_OF_BATCHES = 4096, 512

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Addend:
    """beta D of C = alpha A W + beta D, as the check needs it: D r, its rows' norms, and its probes for 16-bit results.

    Shapes are those of C's rows, or broadcast against them (a bias is one row).
    """

    along: Tensor
    norms: Tensor
    probed: Tensor | None

    @classmethod
    def of(cls, value: Tensor, beta: float, columns: int, signs: Signs, rounded: bool) -> Addend:
        """Measure D, which broadcasts to [..., m, columns]; rounded: whether C has a 16-bit type."""
        fp32 = value.float()
        if fp32.dim() == 0 or fp32.shape[-1] != columns:
            fp32 = fp32.expand(*fp32.shape[:-1], columns) if fp32.dim() else fp32.expand(columns)
        along = torch.matmul(fp32, signs.vector(columns)).mul_(beta)
        norms = torch.linalg.vector_norm(fp32, dim=-1).mul_(abs(beta))
        probed = torch.matmul(fp32, signs.probes(columns, torch.float32)).mul_(beta) if rounded else None
        return cls(along, norms, probed)


def row_readings(
    c: Tensor,
    left: Operand,
    right: Operand,
    signs: Signs,
    kappa: Kappa,
    alpha: float = 1.0,
    plus: Addend | None = None,
) -> Tensor:
    """Readings fp32 [..., M] of c [..., M, N] against left [..., M, K] times right [..., K, N]: |residual| / tolerance.

    Never negative; NaN where c, or the prediction, is not finite, or (on a CPU; a GPU reads 0) norms overflow; on a GPU
    0 where D is not.
    """
    if c.dtype == torch.bfloat16 and left.value.dtype == torch.bfloat16:
        return energy_readings(c, left, right, signs, kappa, alpha, None if plus is None else plus.probed)
    n = c.shape[-1]
    r = signs.vector(n)
    predicted = _along(left.fp32, torch.matmul(right.fp32, r))
    if alpha != 1.0:
        predicted = predicted.mul_(alpha)
    if plus is not None:
        predicted = predicted.add_(plus.along)
    judged = plus.along.isfinite() if plus is not None and c.is_cuda else None  # what a mask closes: see `_added`
    residual = predicted.sub_(torch.matmul(c.float(), r)).abs_()
    noise = Z * kappa.accumulate_at(max(n, left.value.shape[-1]))

    def of_sums(rows: Tensor, norm: Tensor) -> Tensor:
        """What the fp32 sums are relative to, for these norms of A's rows and of W."""
        size = rows.clamp(min=NORM_FLOOR).mul_(norm.clamp(min=NORM_FLOOR).unsqueeze(-1).mul(abs(alpha)))
        return size if plus is None else size.add_(plus.norms)

    if left.is_dear and not kappa.output:
        bound = residual / bounded(of_sums(left.least_row_norms, right.least_norm).mul_(noise))
        if bool((bound <= _SURE).all()):
            return bound
    size = bounded(of_sums(left.row_norms, right.norm))
    if kappa.output:
        norms = output_norms(left, right, signs, alpha, plus)
        limit = size.mul_(noise).add_(norms.clamp_(min=NORM_FLOOR).add_(subnormal_norm(c)), alpha=Z * kappa.output)
        readings = residual.div_(limit)
    else:
        readings = residual / (size * noise)
        if not c.is_cuda and bool((readings <= _SURE).all()):
            return readings
        readings = residual.div_(size.add_(alike(c, size), alpha=ALIKE).mul_(noise))
    return readings if judged is None else torch.where(judged, readings, 0.0)


def product_check(kernel: str, left: Tensor, right: Tensor, out: Tensor, bench: Bench) -> Iterable[Checked]:
    """The check of out [..., M, N], whoever made it, against left [..., M, K] times right [..., K, N]."""
    readings = row_readings(out, bench.operand(left), bench.operand(right), bench.signs, bench.kappa(kernel, out))
    yield Checked(SENSOR, "out", readings, tuple(out.shape))


def output_norms(left: Operand, right: Operand, signs: Signs, alpha: float = 1.0, plus: Addend | None = None) -> Tensor:
    """Upper estimate fp32 [..., M] of the row norms of alpha left right + plus, made without the product itself.

    Runs in the operands' own type: signs are exact in it, and an estimate can bear its rounding. Not in fp16, whose
    range a sum soon leaves.
    """
    a, w = (left.fp32, right.fp32) if right.value.dtype == torch.float16 else (left.value, right.value)
    seen = a @ (w @ signs.probes(w.shape[-1], w.dtype))
    if alpha != 1.0 or (plus is not None and plus.probed is not None):
        seen = seen.float().mul_(alpha)
    if plus is not None and plus.probed is not None:
        seen = seen.add_(plus.probed)
    estimate: Tensor = torch.linalg.vector_norm(seen, dim=-1, dtype=torch.float32).square_().mul_(1 / PROBES)
    squares = left.row_norms.square()
    return estimate.add_(squares.mul_(mean_gain(estimate, squares))).sqrt_()


def subnormal_norm(c: Tensor) -> float:
    """What the rounding of a row of subnormals is relative to, in place of the row's norm; of note in fp16 alone.

    Their spacing is that of the least normal number, without the 0.72 that is the mean over mantissas of a normal one.
    """
    return float(c.shape[-1] ** 0.5 * torch.finfo(c.dtype).smallest_normal / 0.72)


def _along(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[..., m, n] times [..., n]: [..., m], long sums in parts for what `combined` says, on a CPU."""
    inner = matrices.shape[-1]
    if matrices.dim() == 2 and matrices.stride(0) == 1 and matrices.stride(1) != 1 and not matrices.is_cuda:
        return combined(vectors, matrices.t())
    part = _PART if matrices.dim() == 2 else _PART_OF_BATCHES
    if inner <= part or matrices.is_cuda:
        return _once_along(matrices, vectors)
    starts = range(0, inner, part)
    found = [_once_along(matrices[..., at : at + part], vectors[..., at : at + part]) for at in starts]
    return torch.stack(found).sum(0)


def _once_along(matrices: Tensor, vectors: Tensor) -> Tensor:
    if matrices.dim() == 2:
        return torch.mv(matrices, vectors)
    return torch.bmm(matrices, vectors.unsqueeze(-1)).squeeze(-1)


def _product(call: Call, bench: Bench) -> Iterable[Checked]:
    left, right = call.args[0], call.args[1]
    yield _checked(call.out, left, right, bench, None)


def _added(call: Call, bench: Bench) -> Iterable[Checked]:
    added, left, right = call.args[:3]
    beta, alpha = _factors(call.kwargs)
    plus, there = call.before, None  # what was written over is no longer there
    if plus is None and beta != 0:
        plus = Addend.of(added, beta, right.shape[-1], bench.signs, _rounded(call.out))
        there = added
    checked = _checked(call.out, left, right, bench, there, beta, alpha, plus)
    yield checked
    closes = there is not None and there.dim() > 1 and there.shape[-2] > 1  # a mask does, no bias
    if there is not None and closes and (call.out.is_cuda or some_strange(checked.readings)):
        yield Checked(SENSOR, "out", infinite_readings(call.out, there, beta), tuple(call.out.shape), exact=True)


def _before_in_place(args: tuple[Any, ...], kwargs: dict[str, Any], bench: Bench) -> Addend | None:
    """D is written over by the product: it is measured before."""
    added, right = args[0], args[2]
    beta, _ = _factors(kwargs)
    return Addend.of(added, beta, right.shape[-1], bench.signs, _rounded(added)) if beta != 0 else None


def _before_out(args: tuple[Any, ...], kwargs: dict[str, Any], bench: Bench) -> Addend | None:
    """The same where the result is to be written to D's memory."""
    out: Tensor | None = kwargs.get("out")
    return _before_in_place(args, kwargs, bench) if out is not None and out.data_ptr() == args[0].data_ptr() else None


def _checked(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    bench: Bench,
    added: Tensor | None,
    beta: float = 0.0,
    alpha: float = 1.0,
    plus: Addend | None = None,
) -> Checked:
    """The check of out = alpha left right + plus; added: what `plus` measures, where it is still there."""
    if left.dtype != right.dtype or not left.is_floating_point():
        raise Unsupported(f"a product of {left.dtype} and {right.dtype}")
    layouts = {left.layout, right.layout} - {torch.strided}
    if layouts:
        raise Unsupported(f"a product with a tensor of layout {layouts.pop()}")
    kappa = bench.kappa(KERNEL, out)
    if out.numel() == 0:
        return Checked(SENSOR, "out", out.new_zeros(0, dtype=torch.float32), tuple(out.shape))
    readings = row_readings(out, bench.operand(left), bench.operand(right), bench.signs, kappa, alpha, plus)
    if out.device.type == "cpu" and some_strange(readings) and (plus is None or added is not None):
        given = [t for t in (left, right, added) if t is not None]
        if all(all_finite(t) for t in given):
            readings = _beyond(out, left, right, bench.signs, kappa, added, alpha, beta)
    return Checked(SENSOR, "out", readings.flatten(), tuple(out.shape))


def _beyond(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    signs: Signs,
    kappa: Kappa,
    added: Tensor | None,
    alpha: float,
    beta: float,
) -> Tensor:
    """Readings as of `row_readings`, of operands all of which are finite."""
    c, a, w, d = shrunk(out, left, right, added, alpha, beta)
    plus = Addend.of(d, 1.0, c.shape[-1], signs, _rounded(c))
    return row_readings(c, Operand(a), Operand(w), signs, kappa, alpha, plus)


def infinite_readings(c: Tensor, added: Tensor, beta: float) -> Tensor:
    """Readings fp32 [rows], exact: c [..., M, N] is beta times added, which broadcasts to it, where that is infinite.

    A NaN, which infinite operands would give, is left to the check of the row.
    """
    wrong = added.isinf() & (c != added * beta) & ~c.isnan()
    return torch.count_nonzero(rows_of(wrong), dim=1).float().mul_(PER_DIFFERENCE)


def _factors(kwargs: dict[str, Any]) -> tuple[float, float]:
    return cast(float, kwargs.get("beta", 1)), cast(float, kwargs.get("alpha", 1))


def _rounded(out: Tensor) -> bool:
    return out.element_size() < 4


CHECKS: dict[OpOverloadPacket, Check] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.addmm: _added,
    aten.addmm_: _added,
    aten.baddbmm: _added,
    aten.baddbmm_: _added,
}
BEFORE: dict[OpOverloadPacket, Before] = {
    aten.addmm: _before_out,
    aten.baddbmm: _before_out,
    aten.addmm_: _before_in_place,
    aten.baddbmm_: _before_in_place,
}


def fp32_precision(device: str) -> str:
    """In what torch computes fp32 products, as `torch.set_float32_matmul_precision` has it: ieee, tf32 or bf16."""
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    return str(backend.matmul.fp32_precision)
