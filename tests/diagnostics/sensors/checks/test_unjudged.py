"""A NaN that a device makes where no check looks holds its step, and one that was there before holds the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from struck import Struck, first
from torch import Tensor, nn

from diagnostics.sensors.checks.unjudged import finite_readings
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.inspection import Inspection


def put(name: str, value: float) -> Struck:
    """A value in the middle of the first result of an operator's first call."""

    def damage(out: Any) -> None:
        tensor = first(out)
        tensor[tuple(size // 2 for size in tensor.shape)] = value

    return Struck(getattr(torch.ops.aten, name) if name else (), damage, at=0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(x)[0])
        return out


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), nn.Linear(16, 4))


class Multiplied(nn.Module):
    """The gradient of prod is one that the eyes are kept from."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(x).view(*x.shape[:-1], 4, 4).prod(-1))
        return out


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a recurrent kernel": (Recurrent, "mkldnn_rnn_layer"),
    "a dropout's mask": (dropping, "bernoulli_"),
}


def clean(model: nn.Module, guard: Guard, name: str = "", value: float = torch.nan, key: int = 1) -> bool:
    torch.manual_seed(0)
    model.zero_grad()
    with put(name, value), guard.step(key) as step:
        model(torch.randn(5, 3, 16)).square().mean().backward()
    assert guard.failures == 0
    return step.clean


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", CASES)
def test_what_no_check_judges_may_not_bring_in_what_is_not_finite(case: str, value: float) -> None:
    make, name = CASES[case]
    model = make()
    assert clean(model, Guard(model))
    assert not clean(model, Guard(model), name, value)


@pytest.mark.parametrize("case", CASES)
def test_unasked_it_would_pass(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a NaN that an operand holds is run again, and comes out the same."""
    monkeypatch.setattr(Inspection, "_ask", lambda *_: None)
    make, name = CASES[case]
    model = make()
    assert clean(model, Guard(model), name)


def test_a_gradient_that_the_eyes_are_kept_from_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Multiplied()
    assert clean(model, Guard(model))
    given: list[str] = []
    monkeypatch.setattr(Inspection, "unseen", lambda self, operation, results, operands: given.append(operation))
    x = torch.randn(5, 3, 16)
    with Guard(model).step():  # no other mode is on, under which torch would take another way, and be seen
        model(x).square().mean().backward()
    assert given == ["ProdBackward1"]


def test_a_weight_that_is_not_finite_holds_every_step() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with torch.no_grad():
        model[1].weight[2, 3] = torch.nan
    guard = Guard(model)
    assert [clean(model, guard, key=key) for key in range(3)] == [False, False, False]
    assert clean(nn.Linear(16, 4), Guard(nn.Linear(16, 4)))  # the control


def test_a_weight_that_is_only_looked_up_is_asked_too() -> None:
    """What comes of it is an operand like others."""
    table, head = nn.Embedding(8, 16), nn.Linear(16, 4)
    guard = Guard(nn.ModuleList([table, head]))
    for value, expected in ((1.0, True), (torch.nan, False), (torch.inf, False)):
        with torch.no_grad():
            table.weight[3, 2] = value
        with guard.step() as step:
            head(table(torch.tensor([[1, 3]]))).square().mean().backward()
        assert step.clean == expected


def test_where_calls_are_drawn_nothing_is_excused() -> None:
    """What comes of the calls that are not drawn may be a device's."""
    model = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4))
    guard = Guard(model, again=1 / 16)
    assert [clean(model, guard, "silu", key=key) for key in range(8)] == [False] * 8


def test_what_operands_bring_is_no_fault_of_the_operator() -> None:
    ill, well = torch.tensor([1.0, torch.inf]), torch.ones(2)
    assert [bool(one.readings <= 1) for one in finite_readings([ill], [well, torch.arange(3)])] == [False]
    assert [bool(one.readings <= 1) for one in finite_readings([ill, well], [ill])] == [True, True]
    assert not list(finite_readings([torch.arange(3), torch.empty(0)], [well]))
