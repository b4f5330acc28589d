"""Faults that are judged and taken back: as many as one likes in one step, which stays as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._decoder import VOCABULARY, Decoder
from benchmarks._struck import Flip, place_of, strike_all
from diagnostics.faults.bits import flipped
from diagnostics.faults.sites import Census, makes_values, results
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.quiet import quiet

TIMES = 2
# Of the step's hundred operators, so many apart are struck alone as well.
_EVERY = 4


class Model:
    """A small decoder and its pass."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(3)
        self.module = Decoder(64, 1).to(dtype)
        self.tokens = torch.randint(0, VOCABULARY, (1, 32))

    def passes(self) -> None:
        self.module.zero_grad()
        self.module(self.tokens).backward()

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.module.parameters() if p.grad is not None]


class Left(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One fault as `Blows` puts it, which is not taken back."""

    def __init__(self, flip: Flip) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flip = flip
        self._number = -1

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._number += makes_values(func)
        if makes_values(func) and self._number == self._flip.number:
            assert str(func) == self._flip.operator
            place = place_of(results(func, args, kwargs or {}, out)[self._flip.result], self._flip.element)
            with quiet():
                place.copy_(flipped(place.clone(), 1 << self._flip.bit))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_is_struck_and_the_step_gives_the_bits_of_a_clean_one(dtype: torch.dtype) -> None:
    model = Model(dtype)
    with Census(model.module) as census:
        model.passes()
    clean = model.gradients()
    found = strike_all(Guard(model.module), model.passes, TIMES)
    assert [(flip.number, flip.operator) for flip in found] == [
        (site.number, site.operator) for site in census.sites for _ in range(TIMES)
    ]
    assert any(flip.operator.startswith("aten.add_") for flip in found)  # it writes over its operand
    for one, other in zip(clean, model.gradients(), strict=True):
        assert torch.equal(one, other)
    with Left(next(flip for flip in found if flip.product and flip.upper)):
        model.passes()
    assert not all(torch.equal(one, other) for one, other in zip(clean, model.gradients(), strict=True))


def test_what_is_run_again_is_always_seen_and_without_checks_nothing_is() -> None:
    model = Model()
    found = strike_all(Guard(model.module), model.passes, TIMES)
    multiplied = [flip for flip in found if flip.operator in ("aten.mul.Tensor", "aten.add_.Scalar")]
    assert len(multiplied) > 20
    assert all(flip.seen for flip in multiplied)
    assert all(flip.seen for flip in found if flip.product)  # at this size they are thin, and run again too
    identities = strike_all(Guard(model.module, again=0.0), model.passes, TIMES)
    assert [flip for flip in identities if flip.seen and flip.operator == "aten.mul.Tensor"] == []
    products = [flip for flip in identities if flip.product]
    assert all(flip.seen for flip in products if flip.bit in range(23, 31))
    assert not all(flip.seen for flip in products)
    blind = Guard(model.module)
    blind.sampler.share = 0.0
    assert not any(flip.seen for flip in strike_all(blind, model.passes, TIMES))


def test_a_share_of_the_calls_sees_that_share_of_the_faults() -> None:
    model = Model()
    guard = Guard(model.module)
    guard.sampler.share = 0.25
    found = strike_all(guard, model.passes, 8)
    assert len(found) > 700
    assert 0.2 < sum(flip.seen for flip in found) / len(found) < 0.3


@pytest.mark.parametrize("again", [1.0, 0.0])
def test_a_fault_that_is_left_in_place_is_seen_by_its_own_check_where_one_that_is_taken_back_is(again: float) -> None:
    model = Model()
    guard = Guard(model.module, again=again)
    found = strike_all(guard, model.passes, 1)
    late = []
    for flip in found[::_EVERY]:
        step = guard.step(1)  # what it settles is not struck
        with Left(flip), step:
            model.passes()
        alarms = step.alarms
        assert not flip.seen or alarms, flip
        if alarms and not flip.seen:
            late.append((flip, alarms))
    # Later checks, whose sides share the wrong operand, alarm where it is not finite, or makes something that is not.
    assert all(any(not math.isfinite(alarm.reading) for alarm in alarms) for _, alarms in late), late
    missed = [flip for flip in found[::_EVERY] if not flip.seen]
    assert len(missed) < len(found[::_EVERY])
    assert missed or again == 1.0
