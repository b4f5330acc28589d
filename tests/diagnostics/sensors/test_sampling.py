"""The sampler keeps a step's checks within their budget, and lets nothing that they cost out of the account."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.sensors.outlay import seconds_an_operator
from diagnostics.sensors.sampling import Sampler

STEP_S = 2.0


def settled(sampler: Sampler, every_s: float, watching_s: float = 0.0, told: bool = True) -> float:
    """The share after 40 steps whose checks, all of them, would take `every_s`."""
    for _ in range(40):
        checks_s = sampler.share * every_s
        sampler.spent(checks_s, STEP_S + checks_s + watching_s, watching_s if told else 0.0)
    return sampler.share


@given(st.floats(0.001, 0.5), st.floats(0.0, 8.0), st.floats(0.0, 0.2))
def test_checks_and_watching_take_the_budget_and_no_more(budget: float, every_s: float, watching_s: float) -> None:
    share = settled(Sampler(budget), every_s, watching_s)
    assert 0 < share <= 1
    left = budget * STEP_S - watching_s
    assert share == pytest.approx(min(1.0, max(1e-4, left / every_s if every_s else 1.0)), rel=0.01)


def test_watching_that_is_not_counted_exceeds_the_budget() -> None:
    """The control of the above."""
    spent = settled(Sampler(0.05), 1.0, 0.05, told=False) * 1.0 + 0.05
    assert spent > 1.4 * 0.05 * STEP_S


def test_a_step_that_drew_nothing_makes_the_next_at_most_twice_as_dear() -> None:
    sampler = Sampler(0.01)
    before = settled(sampler, 4.0)
    for _ in range(5):
        sampler.spent(0.0, STEP_S)
        assert sampler.share <= 2 * before
        before = sampler.share


def test_draws_are_the_keys_and_as_many_as_the_share_says() -> None:
    sampler = Sampler(0.01)
    sampler.share = 0.25
    drawn = [sampler.draws(7, call) for call in range(4000)]
    assert drawn == [sampler.draws(7, call) for call in range(4000)]
    assert drawn != [sampler.draws(8, call) for call in range(4000)]
    assert 850 < sum(drawn) < 1150


def test_watching_an_operator_is_measured() -> None:
    """Some microseconds: not nothing, not what a check takes; and nobody watches afterwards."""
    assert 1e-7 < seconds_an_operator() < 1e-3
    assert torch._C._len_torch_dispatch_stack() == 0
