"""The checks of the negative log-likelihood: the loss from its targets once more, the gradient by its few elements.

Forward. loss = sum or mean over i of -w[t_i] y[i, t_i], targets equal to ignore_index left out. Identity: the rows'
own terms, gathered and added once more in fp64, and total_weight likewise. Only the rows' target elements are read, so
the check costs a 1/classes-th of a pass. Tolerance of the loss: z accumulate(rows) times the mean (or sum) of the
terms' sizes; in bf16, where torch's CPU kernel adds in bf16, z output sqrt(1 + rows / 64) times them. Of total_weight
the same of the weights. A mean over no row, all of them ignored, is NaN.

Backward. Row i of the gradient is -w[t_i] g / total at t_i and zero elsewhere. Identities: the element at the target
is that number within four roundings (the kernel makes up to three operations in the result's type), and no other
element of the row is other than zero. One pass.

Sees: any change of the loss above its tolerance, 7e-7 in fp32; in the gradient any non-zero element off the target,
and one at the target that is off by more than 4 roundings. Does not see: wrong log-probabilities, targets or weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked
from diagnostics.sensors.checks.rows import PER_DIFFERENCE, argument, ratio, rows_of, unit_roundoff
from diagnostics.sensors.tolerance import LANE_TERMS, Kappa, Z

SENSOR = "loss"

NONE, MEAN = 0, 1  # of aten's reductions: 0 none, 1 mean, 2 sum

# A weight times a gradient over a total, negated: up to three roundings, and one that the expectation itself has.
_ROUNDINGS = 4


@dataclass(frozen=True, slots=True)
class _Targets:
    """Which element of each row [n, classes] is asked for, and with what weight."""

    index: Tensor  # int64 [n], 0 where ignored
    weights: Tensor  # fp64 [n], 0 where ignored

    @classmethod
    def of(cls, call: Call, classes: int) -> _Targets:
        target = argument(call, "target").reshape(-1)
        kept = (target != argument(call, "ignore_index")) & (target >= 0) & (target < classes)
        index = torch.where(kept, target, 0)
        weight = argument(call, "weight")
        weights = kept.double() if weight is None else weight.double()[index] * kept
        return cls(index, weights)

    def at(self, rows: Tensor) -> Tensor:
        """fp64 [n]: each row's element at its target, 0 where ignored, whatever stands there."""
        picked = rows.gather(1, self.index[:, None])[:, 0].double()
        return torch.where(self.weights != 0, picked, 0.0)


def loss_readings(terms: Tensor, weights: Tensor, loss: Tensor, total: Tensor, mean: bool, kappa: Kappa) -> Tensor:
    """Readings fp32 [2] of a reduced loss [] and its total weight [].

    terms: fp64 [n], each row's weighted loss; weights: fp64 [n], 0 where a row is left out.
    """
    n = max(len(terms), 1)
    noise = Z * (kappa.accumulate_at(n) + kappa.output * (1 + n / LANE_TERMS) ** 0.5)
    divisor = weights.sum() if mean else terms.new_ones(())
    expected, size = terms.sum() / divisor, terms.abs().sum() / divisor
    of_loss = ratio(loss.double() - expected, size * noise)
    if mean:  # over no row, all of them left out: 0 / 0, and nothing but that
        of_loss = torch.where((divisor == 0) & loss.isnan(), 0.0, of_loss)
    of_total = ratio(total.double() - weights.sum(), weights.sum() * noise)
    return torch.stack((of_loss, of_total))


def gradient_readings(gradient: Tensor, index: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Readings fp32 [n], twice, of a gradient [n, classes]: `expected` fp64 [n] at `index` [n]; exact: zero elsewhere.

    On a CPU, where the host waits for nobody, strays are looked for row by row only if there are any: that takes six
    times as long as counting all.
    """
    if gradient.shape[1] == 0:
        nothing = gradient.new_zeros(gradient.shape[0], dtype=torch.float32)
        return nothing, nothing
    picked = gradient.gather(1, index[:, None])[:, 0].double()
    limit = expected.abs() * (_ROUNDINGS * unit_roundoff(gradient.dtype))
    of_picked, there = ratio(picked - expected, limit), (expected.to(gradient.dtype) != 0).int()
    if gradient.device.type == "cpu" and int(torch.count_nonzero(gradient)) == int(torch.count_nonzero(picked)):
        return of_picked, ((picked != 0).int() - there).abs().float() * PER_DIFFERENCE
    strays = torch.count_nonzero(gradient, dim=1) - there
    return of_picked, strays.abs().float() * PER_DIFFERENCE


def _forward(call: Call, bench: Bench) -> Iterable[Checked]:
    loss, total = call.out
    kappa = bench.kappa("nll_loss", loss)
    rows = _class_rows(call.args[0])
    targets = _Targets.of(call, rows.shape[1])
    reduction = argument(call, "reduction")
    terms = -targets.at(rows) * targets.weights
    if reduction == NONE:
        limit = terms.abs() * _ROUNDINGS * unit_roundoff(loss.dtype)
        yield Checked(SENSOR, "out", ratio(loss.reshape(-1).double() - terms, limit), tuple(loss.shape))
    else:
        readings = loss_readings(terms, targets.weights, loss, total, reduction == MEAN, kappa)
        yield Checked(SENSOR, "out", readings[:1], ())
        yield Checked(SENSOR, "total_weight", readings[1:], ())


def _backward(call: Call, bench: Bench) -> Iterable[Checked]:
    bench.kappa("nll_loss", call.out)  # the identity needs no constant, but whether the dtype is known is asked here
    rows = _class_rows(call.out)
    targets = _Targets.of(call, rows.shape[1])
    grad = argument(call, "grad_output").reshape(-1).double()
    expected = -grad * targets.weights
    if argument(call, "reduction") == MEAN:
        expected = expected / argument(call, "total_weight").double()
    expected = torch.where(targets.weights != 0, expected, 0.0)
    of_picked, strays = gradient_readings(rows, targets.index, expected)
    yield Checked(SENSOR, "dx", of_picked, tuple(rows.shape))
    yield Checked(SENSOR, "dx", strays, tuple(rows.shape), exact=True)


def _class_rows(t: Tensor) -> Tensor:
    """[n, classes] of log-probabilities [classes], [n, classes] or [n, classes, height, width]."""
    return rows_of(t, 1) if t.dim() > 1 else t.reshape(1, -1)


CHECKS: dict[torch._ops.OpOverloadPacket, Check] = {
    torch.ops.aten.nll_loss_forward: _forward,
    torch.ops.aten.nll_loss2d_forward: _forward,
    torch.ops.aten.nll_loss_backward: _backward,
    torch.ops.aten.nll_loss2d_backward: _backward,
}
BEFORE: dict[torch._ops.OpOverloadPacket, Before] = {}  # none of them writes to an argument
