"""What people get wrong with a guard is said at once, and never passes for a clean step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from struck import Struck, product
from torch import Tensor, nn

import assay

X = torch.ones(3, 4)


def ruins() -> Struck:
    """Every product is NaN."""
    return product(None, lambda out: out.fill_(math.nan))


def run(model: nn.Module) -> None:
    model(X).sum().backward()


def test_a_step_is_entered_once() -> None:
    model = nn.Linear(4, 4)
    step = assay.Guard(model).step()
    with step:
        run(model)
    assert step.clean
    with pytest.raises(RuntimeError, match="entered once"), ruins(), step:
        run(model)
    with pytest.raises(RuntimeError, match="entered once"):
        step.__enter__()
    guard = assay.Guard(model)
    for ruin in (False, True):  # the control: a step for each
        with guard.step() as step:
            if ruin:
                with ruins():
                    run(model)
            else:
                run(model)
        assert step.clean != ruin


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("ask", ["clean", "worst", "alarms", "evidence", "first_alarm"])
def test_a_step_that_was_never_entered_answers_nothing(ask: str, enabled: bool) -> None:
    model = nn.Linear(4, 4)
    guard = assay.Guard(model, enabled=enabled)
    step = guard.step()
    run(model)
    with pytest.raises(RuntimeError, match=r"never entered.*inside `with guard\.step"):
        getattr(step, ask)
    with guard.step() as step:  # the one before is forgotten
        run(model)
    getattr(step, ask)


def test_asking_within_the_block_does_not_blind_the_rest() -> None:
    model = nn.Linear(4, 4)
    guard = assay.Guard(model)
    with guard.step() as step:
        assert step.clean
        assert step.worst == 0.0
        run(model)
        before = step.checks
        assert step.clean
        assert step.alarms == []
        assert step.checks == before  # what asking computes is not looked at
        with ruins():
            run(model)
        assert not step.clean
        assert step.first_alarm == before
        step.observe("loss", 1.0)
        assert [each.name for each in step.evidence] == ["loss"]
    assert not step.clean
    assert step.checks > before + 1


def test_what_comes_after_the_verdict_is_refused() -> None:
    """It would be no part of it: before, all of these are."""
    model = nn.Linear(4, 4)
    guard = assay.Guard(model)
    loss = torch.tensor(math.nan)

    def give() -> list[Callable[[], None]]:
        return [
            lambda: step.observe("loss", loss),
            lambda: step.observe_all(["loss"], loss.reshape(1)),
            lambda: step.check_finite("loss", loss),
            lambda: step.check_equal("loss", loss, 1.0),
            lambda: guard.check_finite("loss", loss),
            lambda: guard.check_equal("loss", loss, 1.0),
        ]

    with guard.step() as step:
        run(model)
    assert step.clean
    checks = step.checks
    for late in give():
        with pytest.raises(RuntimeError, match="loss comes after this step was asked"):
            late()
    assert (step.clean, step.checks) == (True, checks)
    with guard.step() as step:
        run(model)
        checks = step.checks
        for early in give():
            early()
        assert not step.clean
    assert step.checks == checks + 5  # all but the statistics


def test_one_step_of_a_guard_at_a_time() -> None:
    model = nn.Linear(4, 4)
    guard, other = assay.Guard(model), assay.Guard(model)
    with guard.step() as step:
        with pytest.raises(RuntimeError, match="under way"):
            guard.step()
        with other.step() as within:  # another guard's is its own matter
            run(model)
    assert step.clean
    assert within.clean
    early, late = guard.step(), guard.step()
    with pytest.raises(RuntimeError, match="later step"):
        early.__enter__()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), late:
        model(torch.ones(3, 5))
    with guard.step() as step:  # what was cut short is no longer under way
        run(model)
    assert step.clean


MODEL = nn.Linear(4, 4)
GUARD = assay.Guard(MODEL)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no model": (lambda: assay.Guard(None), TypeError, "model is None, must be a torch.nn.Module"),  # type: ignore[arg-type]
    "a budget for an optimizer": (lambda: assay.Guard(MODEL, 0.01), TypeError, r"Guard\(model, budget=0.01\)"),  # type: ignore[arg-type]
    "parameters": (lambda: assay.Guard(MODEL, MODEL.parameters()), TypeError, "optimizer is a generator"),  # type: ignore[arg-type]
    "a budget in words": (lambda: assay.Guard(MODEL, budget="1%"), TypeError, "budget is '1%', must be a number"),  # type: ignore[arg-type]
    "a budget of True": (lambda: assay.Guard(MODEL, budget=True), TypeError, "budget is True, must be a number"),
    "a budget of nothing": (lambda: assay.Guard(MODEL, budget=0), ValueError, "positive fraction"),
    "again": (lambda: assay.Guard(MODEL, again=None), TypeError, "again is None, must be a number"),  # type: ignore[arg-type]
    "too often": (lambda: assay.Guard(MODEL, again=1.5), ValueError, "share in 0..1"),
    "a scale": (lambda: assay.Guard(MODEL, tolerance_scale="2"), TypeError, "tolerance_scale is '2'"),  # type: ignore[arg-type]
    "a file for a table": (lambda: assay.Guard(MODEL, table="x.json"), TypeError, r"parse_table\(text\) reads one"),  # type: ignore[arg-type]
    "a key": (lambda: GUARD.step("a"), TypeError, "key is str 'a', must be an integer"),  # type: ignore[arg-type]
    "a word for a loss": (lambda: GUARD.step().observe("loss", "x"), TypeError, "loss is str 'x'"),  # type: ignore[arg-type]
    "losses": (lambda: GUARD.step().observe("loss", torch.ones(2)), ValueError, r"loss has shape \[2\]"),
    "a complex loss": (lambda: GUARD.step().observe("loss", torch.tensor(1j)), TypeError, "must be a real number"),
    "a list": (lambda: GUARD.step().check_finite("g", [1.0]), TypeError, "g is a list, must be a tensor"),  # type: ignore[arg-type]
    "a number": (lambda: GUARD.step().check_equal("g", 1.0, 1.0), TypeError, "scalars go to observe"),  # type: ignore[arg-type]
    "a word for alarms": (lambda: GUARD.recalibrate("x"), TypeError, "give step.alarms"),  # type: ignore[arg-type]
    "no alarms": (lambda: GUARD.recalibrate(None), TypeError, "must be several: step.alarms"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    wrong, kind, said = WRONG[name]
    with pytest.raises(kind) as refused:
        wrong()
    assert re.search(said, str(refused.value))


def test_what_can_be_meant_is_not() -> None:
    guard = assay.Guard(MODEL, torch.optim.SGD(MODEL.parameters()), budget=1, again=0, tolerance_scale=2)
    with guard.step(key=2**70) as step:
        run(MODEL)
        step.observe("loss", torch.ones(1, 1, dtype=torch.float64))
        step.observe("steps", 3)
    assert [each.value for each in step.evidence] == [1.0, 3.0]
    assert guard.recalibrate(iter(step.alarms)) == 0


@pytest.mark.parametrize(
    ("value", "clean"),
    [(1 + 1j, True), (complex(math.nan, 1), False), (complex(1, math.inf), False)],
)
@pytest.mark.parametrize("conjugate", [False, True])
def test_of_complex_values_both_parts_must_be_finite(value: complex, clean: bool, conjugate: bool) -> None:
    values: Tensor = torch.tensor([1j, value])
    guard = assay.Guard(MODEL)
    with guard.step() as step:
        run(MODEL)
        step.check_finite("spectrum", values.conj() if conjugate else values)
    assert step.clean == clean
    assert guard.failures == 0


def test_a_guard_may_be_made_before_its_model_has_memory() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    guard = assay.Guard(model)
    with pytest.raises(RuntimeError, match="meta device"):
        guard.step()
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    with guard.step() as step:
        run(model)
    assert step.clean
    assert step.checks
    with ruins(), guard.step() as step:
        run(model)
    assert not step.clean
