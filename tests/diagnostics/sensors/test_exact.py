"""What compares bits or counts has no tolerance: no scale admits a difference, and no false alarm widens it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from struck import Struck
from torch import Tensor, nn

from diagnostics.sensors.account import MUTED
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.guarded_step import GuardedStep

aten = torch.ops.aten
X = torch.arange(12.0).view(3, 4).flip(1)


def another_place(out: Any) -> None:
    out[1][0, 0] = 3 - out[1][0, 0]


def one_more(out: Tensor) -> None:
    out.view(-1)[1] += 1


def negative(p: Tensor) -> None:
    """The row's sum is what it was."""
    p[0, 0] += p[0, 1] + 0.25
    p[0, 1] = -0.25


def stray(gradient: Tensor) -> None:
    gradient[gradient == 0] = torch.finfo(torch.float32).tiny


def loss() -> Tensor:
    x = X.clone().requires_grad_()
    torch.nn.functional.nll_loss(x, torch.tensor([0, 1, 2])).backward()
    return x


EXACT: dict[str, tuple[Any, Callable[[Any], None], Callable[[], Any]]] = {
    "chosen": (aten.topk, another_place, lambda: X.topk(2)),
    "order": (aten.sort, another_place, lambda: X.sort(stable=True)),
    "running count": (aten.cumsum, one_more, lambda: torch.ones(3, 4, dtype=torch.long).cumsum(1)),
    "count": (aten.bincount, one_more, lambda: torch.tensor([0, 1, 1]).bincount()),
    "histogram": (aten.histc, one_more, lambda: X.histc(4, 0, 12)),
    "negative probability": (aten._softmax, negative, lambda: X.softmax(1)),
    "stray gradient": (aten.nll_loss_backward, stray, loss),
    "scattered count": (
        aten.scatter_add,
        one_more,
        lambda: torch.zeros(3, 4, dtype=torch.long).scatter_add(1, X.long() % 4, X.long()),
    ),
    "move": (aten.index_select, one_more, lambda: X.index_select(0, torch.tensor([2, 0]))),
    "element": (aten.exp, one_more, lambda: X.exp()),
}


def step(guard: Guard, name: str, struck: bool = True) -> GuardedStep:
    operator, damage, work = EXACT[name]
    with Struck(operator if struck else (), damage), guard.step(key=1) as seen:
        work()
    return seen


@pytest.mark.parametrize("name", EXACT)
def test_no_scale_and_no_recalibration_admits_a_difference(name: str) -> None:
    assert step(Guard(nn.Linear(2, 2)), name, struck=False).clean
    again = 1.0 if name in ("element", "move") else 0.0
    for scale in (1.0, 1e6):
        guard = Guard(nn.Linear(2, 2), again=again, tolerance_scale=scale)
        seen = step(guard, name)
        assert [alarm.exact for alarm in seen.alarms if math.isfinite(alarm.reading)] == [True], seen.alarms
        assert guard.recalibrate(seen.alarms) == 0
        assert not step(guard, name).clean


def test_a_check_that_alarms_on_every_device_is_muted_at_its_place_and_listed() -> None:
    guard = Guard(nn.Linear(2, 2), again=0.0)
    seen = step(guard, "chosen")
    assert guard.mute(seen.alarms) == 1
    assert guard.mute(seen.alarms) == 0
    muted = step(guard, "chosen")
    assert muted.clean
    assert muted.skipped == {MUTED: 1}
    assert not step(guard, "order").clean  # the control: another check is heard


def test_what_has_a_tolerance_is_admitted_by_a_scale_and_by_recalibration() -> None:
    """The control."""
    a, b = torch.randn(8, 8), torch.randn(8, 8)

    def seen(guard: Guard, size: float) -> GuardedStep:
        def damage(out: Tensor) -> None:
            out[0, 0] += size

        with Struck(aten.mm, damage), guard.step(key=1) as step:
            torch.mm(a, b)
        return step

    guard = Guard(nn.Linear(2, 2), again=0.0)
    (alarm,) = seen(guard, 1.0).alarms
    size = 1.5 / alarm.reading
    (alarm,) = seen(guard, size).alarms
    assert not alarm.exact
    assert seen(Guard(nn.Linear(2, 2), again=0.0, tolerance_scale=10.0), size).clean
    assert guard.recalibrate([alarm]) == 1
    assert seen(guard, size).clean
