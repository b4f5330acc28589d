"""How far the struck result is from the right one, and from what on the check that covers it promises to see that.

Each check publishes its tolerance (the module named beside each function). Here it is taken from the operands and the
right result, of which the check has only estimates; the fault's size in a row is the L2 of its difference, which is
what random signs add up to on average. Where they are weights, the floor is that of the least of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.faults.bits import integers
from diagnostics.faults.models import Damage
from diagnostics.sensors.checks.gemm import ALIKE
from diagnostics.sensors.checks.registry import plan_of
from diagnostics.sensors.checks.rows import rounding
from diagnostics.sensors.checks.signs import LEAST
from diagnostics.sensors.tolerance import Kappa, ToleranceTable, UnknownTolerance, Z

aten = torch.ops.aten
#: What recall above the floor may miss (docs/campaign.md: at least 99 %).
MISSED = 0.01


@dataclass(frozen=True, slots=True)
class Deviation:
    """size: of the worst row's difference, L2, in units of the row's rms element; None if the result holds no numbers.

    floor: of that row in the same units, 0 for a check bit by bit; None if no check publishes one. above: whether the
    check promises to see the fault: one wrong element of a row when it is above the floor, several when their sum under
    random signs, about Gaussian, is below it in all rows with a chance of less than MISSED.
    """

    size: float | None
    floor: float | None
    above: bool | None


@dataclass(frozen=True, slots=True)
class Struck:
    """An operator and one plane of its result. delta: what was added to it, fp64; infinite where it is not finite.

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
    limit = _LIMITS.get(getattr(struck.func, "overloadpacket", None), _bit_by_bit)
    if not harm.before.is_floating_point():
        excess = None if struck.func is None else _bit_by_bit(struck)
        return Deviation(None, None, None) if excess is None else Deviation(None, 0.0, bool((excess > 0).any()))
    before = torch.nan_to_num(harm.before.double(), 0.0, 0.0, 0.0)
    rms = before.square().mean(1).sqrt()
    sizes = torch.linalg.vector_norm(struck.delta, dim=1) / torch.where(rms > 0, rms, 1.0)  # zeros count as of rms 1
    excess = None if struck.func is None else limit(struck)
    if excess is None:
        return Deviation(_short(sizes.max()), None, None)
    worst = int(excess.argmax())
    above, size = _promised(excess, harm.changed), float(sizes[worst])
    floor = (
        0.0 if torch.isinf(excess[worst]) and limit is _bit_by_bit else size / float(excess[worst]) if size else None
    )
    return Deviation(_short(size), None if floor is None else _short(floor), above)


def _promised(excess: Tensor, changed: Tensor) -> bool:
    """Whether faults of this size in each row (1 is the floor) are missed with a chance of less than MISSED."""
    several = torch.erf(1 / (excess.clamp(min=_TINY) * math.sqrt(2)))
    chances = torch.where(excess > 1, torch.where(changed.sum(1) > 1, several, 0.0), 1.0)
    return float(chances.prod()) < MISSED


def delta_of(harm: Damage) -> Tensor:
    """What a blow added to its plane, fp64; infinite where the result is not finite any more, 0 for whole numbers.

    Nothing where no bit differs: masked scores are -inf before and after.
    """
    if not harm.before.is_floating_point():
        return torch.zeros(harm.before.shape, dtype=torch.float64)
    delta = torch.nan_to_num(harm.after.double() - harm.before.double(), math.inf, math.inf, math.inf)
    return torch.where(harm.changed, delta, 0.0)


def _product(struck: Struck) -> Tensor | None:
    """`checks.gemm`: z (kappa_output norm_i + kappa_accumulate (|alpha| ||A_i|| ||W||_F + |beta| ||D_i||)).

    norm_i^2 is ||C_i||^2 and ||A_i||^2 times the mean gain, as the check estimates it; in fp32 ALIKE ||C_i|| is added
    to the norms that kappa_accumulate is relative to.
    """
    kappa = struck.kappa(*struck.kernels)
    if kappa is None:
        return None
    plane, before = struck.harm.plane, struck.harm.before.double()
    left, right = (operand[plane].double() for operand in struck.args[-2:])
    rows = torch.linalg.vector_norm(left, dim=1)
    noise = rows * torch.linalg.vector_norm(right) * abs(struck.kwargs.get("alpha", 1))
    beta = abs(struck.kwargs.get("beta", 1))
    if len(struck.args) == 3 and beta:
        added = struck.args[0]
        added = added.expand(before.shape) if added.dim() < 3 else added[plane]
        noise = noise + beta * torch.linalg.vector_norm(added.double(), dim=-1)
    squares = before.square().sum(1)
    norms = (squares + rows.square() * squares.sum() / rows.square().sum().clamp(min=_TINY)).sqrt()
    if not kappa.output:
        noise = noise + ALIKE * squares.sqrt()
    limits = kappa.accumulate_at(max(right.shape[1], left.shape[1])) * noise + kappa.output * norms
    return _over(struck.delta, limits if kappa.output else limits / LEAST)


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
    return (struck.delta.abs() / limits.double().clamp(min=_TINY)).amax(1)


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
    """`sensors.recompute`, where the guard checks the operator that way: infinite where any bit of a row differs."""
    plan = plan_of(struck.func)
    if plan is None or not plan.again:
        return None
    differs = (integers(struck.harm.before) != integers(struck.harm.after)).any(1)
    return torch.where(differs, math.inf, 0.0).double()


def _over(delta: Tensor, limits: Tensor) -> Tensor:
    """Rows' differences in units of z times these limits."""
    sizes: Tensor = torch.linalg.vector_norm(delta, dim=1)
    return sizes / (Z * limits).clamp(min=_TINY)


_TINY = torch.finfo(torch.float64).tiny
_LIMITS: dict[Any, Callable[[Struck], Tensor | None]] = {
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm), _product),
    aten._softmax: _softmax,
    aten._softmax_backward_data: _softmax_backward,
}


def _short(value: float | Tensor) -> float:
    """Three digits, for the record."""
    return float(f"{float(value):.3g}")
