"""How far the struck result is from the right one, and from what on the check that covers it promises to see that.

Each check publishes its tolerance (the module named beside each function). Here it is taken from the operands and the
right result, of which the check has only estimates; the fault's size in a row is the L2 of its difference, which is
what random signs add up to on average. Where they are weights, the floor is that of the least of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from diagnostics.faults.bits import integers
from diagnostics.faults.models import Damage
from diagnostics.sensors.checks.gemm import ALIKE
from diagnostics.sensors.checks.registry import plan_of
from diagnostics.sensors.checks.rounded import TAIL
from diagnostics.sensors.checks.rows import rounding
from diagnostics.sensors.checks.signs import LEAST, PROBES
from diagnostics.sensors.tolerance import NORM_FLOOR, Kappa, ToleranceTable, UnknownTolerance, Z

aten = torch.ops.aten
#: What recall above the floor may miss (docs/campaign.md: at least 99 %).
MISSED = 0.01


@dataclass(frozen=True, slots=True)
class Deviation:
    """size: of the worst row's difference, L2, in units of the row's rms element; None if the result holds no numbers.

    floor: of that row in the same units, 0 for a check bit by bit; None where none is computed here. above: whether the
    check promises to see the fault: one wrong element of a row when it is above the floor, several when the chance that
    their sum under random signs is below it is less than MISSED in one row at least. That sum is about Gaussian; of
    bf16 products its mean square over PROBES draws is what counts.
    """

    size: float | None
    floor: float | None
    above: bool | None


@dataclass(frozen=True, slots=True)
class Struck:
    """An operator and one plane of its result. delta: what was added to it, fp64; infinite where it is not finite.

    func: None of what is hashed, or held against another rank's, where it lies: between operators, and in the update.
    kernels: names under which the table of tolerances may have a product of it.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    harm: Damage
    delta: Tensor
    table: ToleranceTable
    kernels: tuple[str, ...]

    def kappa(self, *kernels: str) -> Kappa | None:
        """The loosest of these kernels' constants for the result's type; None if the table has none of them."""
        found = [kappa for kernel in kernels if (kappa := self._kappa(kernel)) is not None]
        return max(found, key=lambda kappa: kappa.accumulate, default=None)

    def _kappa(self, kernel: str) -> Kappa | None:
        like = self.harm.before
        try:
            return self.table.kappa(like.device.type, str(like.dtype).removeprefix("torch."), kernel)
        except UnknownTolerance:
            return None


def deviation(struck: Struck) -> Deviation:
    """Of one blow."""
    harm = struck.harm
    limit = _limit_of(struck)
    if not harm.before.is_floating_point():
        excess = _bit_by_bit(struck)
        return Deviation(None, None, None) if excess is None else Deviation(None, 0.0, bool((excess > 0).any()))
    before = torch.nan_to_num(harm.before.double(), 0.0, 0.0, 0.0)
    rms = before.square().mean(1).sqrt()
    sizes = torch.linalg.vector_norm(struck.delta, dim=1) / torch.where(rms > 0, rms, 1.0)  # zeros count as of rms 1
    excess = limit(struck)
    if excess is None:
        return Deviation(_short(sizes.max()), None, None)
    above = _is_promised(excess, harm.changed, energy=limit is _rounded_product)
    if limit is _bit_by_bit:
        return Deviation(_short(sizes.max()), 0.0, above)
    worst = int(excess.argmax())
    size = float(sizes[worst])
    if not math.isfinite(size):  # the floor is that of the row, whatever stands in it
        finite = replace(struck, delta=torch.where(torch.isfinite(struck.delta), struck.delta, 1.0))
        excess = cast(Tensor, limit(finite))
        sizes = torch.linalg.vector_norm(finite.delta, dim=1) / torch.where(rms > 0, rms, 1.0)
    floor = float(sizes[worst]) / float(excess[worst]) if excess[worst] > 0 else None
    return Deviation(_short(size), None if floor is None else _short(floor), above)


def _limit_of(struck: Struck) -> Callable[[Struck], Tensor | None]:
    """What gives the rows' differences in units of what the check of this operator and type publishes."""
    packet = getattr(struck.func, "overloadpacket", None)
    if packet not in _PRODUCTS:
        return _OTHERS.get(packet, _bit_by_bit)
    return _rounded_product if struck.harm.before.dtype == struck.args[-1].dtype == torch.bfloat16 else _product


def _is_promised(excess: Tensor, changed: Tensor, energy: bool) -> bool:
    """Whether faults of this size in each row (1 is the floor) are missed with a chance of less than MISSED.

    All rows meet the same random signs, and those of like tokens are wrong alike: they may all be missed in the same
    draw. So the chance is taken as that of the row which is missed the least, and no smaller for there being more.

    energy: whether the check reads the mean square of many sums (`checks.rounded`), not one sum.
    """
    least = excess.clamp(min=_TINY)
    if energy:
        half = torch.tensor(PROBES / 2, dtype=excess.dtype)
        several = torch.special.gammainc(half, half / least.square().clamp(min=_TINY))
    else:
        several = torch.erf(1 / (least * math.sqrt(2)))
    chances = torch.where(excess > 1, torch.where(changed.sum(1) > 1, several, 0.0), 1.0)
    return float(chances.min()) < MISSED


def delta_of(harm: Damage) -> Tensor:
    """What a blow added to its plane, fp64; infinite where the result is not finite any more, 0 for whole numbers.

    Nothing where no bit differs: masked scores are -inf before and after.
    """
    if not harm.before.is_floating_point():
        return torch.zeros(harm.before.shape, dtype=torch.float64)
    delta = torch.nan_to_num(harm.after.double() - harm.before.double(), math.inf, math.inf, math.inf)
    return torch.where(harm.changed, delta, 0.0)


def _product(struck: Struck) -> Tensor | None:
    """`checks.gemm` in fp32: z kappa_accumulate (|alpha| ||A_i|| ||W||_F + |beta| ||D_i|| + ALIKE ||C_i||)."""
    kappa = struck.kappa(*struck.kernels)
    if kappa is None or kappa.output:
        return None
    left, right = _operands(struck)
    alpha, beta = abs(struck.kwargs.get("alpha", 1)), abs(struck.kwargs.get("beta", 1))
    before = struck.harm.before.double()
    noise = alpha * _norms(left) * torch.linalg.vector_norm(right).clamp(min=NORM_FLOOR)
    if len(struck.args) == 3 and beta:
        added = struck.args[0]
        added = added.expand(before.shape) if added.dim() < 3 else added[struck.harm.plane]
        noise = noise + beta * torch.linalg.vector_norm(added.double(), dim=-1)
    noise = noise + ALIKE * torch.minimum(torch.linalg.vector_norm(before, dim=1), noise)
    return _over(struck.delta, kappa.accumulate_at(max(right.shape[1], left.shape[1])) * noise / LEAST)


def _rounded_product(struck: Struck) -> Tensor | None:
    """`checks.rounded`, for bf16.

    TAIL kappa_output sqrt(1 + 4 / N) sqrt(||C_i||^2 + ||A_i||^2 max(gain, alpha^2 mean ||W_k||^2)), the mean over rows
    that are not zero, and z kappa_accumulate |alpha| ||A_i|| ||W||_F.
    """
    kappa = struck.kappa(*struck.kernels)
    if kappa is None:
        return None
    left, right = _operands(struck)
    alpha = abs(struck.kwargs.get("alpha", 1))
    before, (inner, columns) = struck.harm.before.double(), right.shape
    squares, rows = before.square().sum(1), left.square().sum(1)
    gain = squares.sum() / rows.sum().clamp(min=NORM_FLOOR**2)
    typical = alpha**2 * right.square().sum() / (right != 0).any(1).sum().clamp(min=1)
    norms = (squares + rows * torch.maximum(gain, typical)).sqrt().clamp(min=NORM_FLOOR)
    limits = TAIL * kappa.output * (1 + 4 / columns) ** 0.5 * norms
    terms = alpha * _norms(left) * torch.linalg.vector_norm(right).clamp(min=NORM_FLOOR)
    return torch.linalg.vector_norm(struck.delta, dim=1) / (
        limits + Z * kappa.accumulate_at(max(columns, inner)) * terms
    )


def _operands(struck: Struck) -> tuple[Tensor, Tensor]:
    left, right = (operand[struck.harm.plane].double() for operand in struck.args[-2:])
    return left, right


def _norms(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=1).clamp(min=NORM_FLOOR)


def _softmax(struck: Struck) -> Tensor | None:
    """`checks.softmax`: a row's sum in fp32, each element's own rounding in bf16."""
    kappa, before = struck.kappa("softmax"), struck.harm.before
    if kappa is None:
        return None
    spread = kappa.accumulate_at(before.shape[1])
    if before.dtype == torch.float32:
        return _over(struck.delta, torch.full((before.shape[0],), spread, dtype=torch.float64))
    right = before.float()
    limits = Z * (rounding(right, before.dtype) / Z + spread * right)
    return (struck.delta.abs() / limits.double().clamp(min=NORM_FLOOR)).amax(1)


def _softmax_backward(struck: Struck) -> Tensor | None:
    """`checks.softmax`: z accumulate(n) (||p g|| + |s|), and for bf16 z output (||p g|| + |s| ||p||)."""
    kappa = struck.kappa("softmax_backward")
    if kappa is None:
        return None
    grad, p = (operand[struck.harm.plane].double() for operand in struck.args[:2])
    product = p * grad
    norm, total = torch.linalg.vector_norm(product, dim=1), product.sum(1).abs()
    limits = kappa.accumulate_at(p.shape[1]) * (norm + total)
    if kappa.output:  # weights alone; in fp32 ones as well
        limits = (limits + kappa.output * (norm + total * torch.linalg.vector_norm(p, dim=1))) / LEAST
    return _over(struck.delta, limits)


def _bit_by_bit(struck: Struck) -> Tensor | None:
    """Infinite where any bit of a row differs: `sensors.recompute`, where the guard checks the operator that way; and
    hashes, and other ranks' copies, of what is struck where it lies."""
    plan = None if struck.func is None else plan_of(struck.func)
    if struck.func is not None and (plan is None or not plan.again):
        return None
    differs = (integers(struck.harm.before) != integers(struck.harm.after)).any(1)
    return torch.where(differs, math.inf, 0.0).double()


def _over(delta: Tensor, limits: Tensor) -> Tensor:
    """Rows' differences in units of z times these limits."""
    sizes: Tensor = torch.linalg.vector_norm(delta, dim=1)
    return sizes / (Z * limits).clamp(min=NORM_FLOOR)


_TINY = torch.finfo(torch.float64).tiny
_PRODUCTS = frozenset({aten.mm, aten.addmm, aten.bmm, aten.baddbmm})
_OTHERS: dict[Any, Callable[[Struck], Tensor | None]] = {
    aten._softmax: _softmax,
    aten._softmax_backward_data: _softmax_backward,
}


def _short(value: float | Tensor) -> float:
    """Three digits, for the record."""
    return float(f"{float(value):.3g}")
