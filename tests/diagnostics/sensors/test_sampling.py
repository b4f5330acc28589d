"""The sampler keeps a step's checks within their budget, and lets nothing that they cost out of the account."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.sensors import inspection, saved
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.outlay import beside
from diagnostics.sensors.sampling import AIM, Sampler

STEP_S = 1.9  # so that nothing that is drawn is half of it


def settled(sampler: Sampler, every_s: float, watching_s: float = 0.0, told: bool = True, whole: bool = False) -> float:
    """The mean cost of a step after 40 watched ones whose checks, all of them, would take `every_s`."""
    for _ in range(40):
        checks_s = sampler.share * every_s
        sampler.spent(checks_s, STEP_S + checks_s + watching_s, watching_s if told else 0.0, whole)
        assert 0 < sampler.share <= 1 <= sampler.period
        assert sampler.share == 1 or sampler.period == 1
    return (sampler.share * every_s + watching_s) / sampler.period


budgets, takes, watchings = st.floats(0.001, 0.5), st.floats(0.0, 8.0), st.floats(0.0, 0.2)


@given(budgets, takes, watchings, st.booleans())
def test_checks_and_watching_take_most_of_the_budget_and_no_more(
    budget: float, every_s: float, watching_s: float, whole: bool
) -> None:
    sampler, allowed = Sampler(budget), AIM * budget * STEP_S
    spent = settled(sampler, every_s, watching_s, whole=whole)
    assert spent <= allowed * (1 + 1e-6) + 1e-4 * every_s
    if sampler.chance < 1:  # a period is a power of two
        assert spent > allowed * (0.99 if sampler.period == 1 else 0.5)


@given(budgets, takes, watchings)
def test_calls_are_drawn_while_watching_leaves_them_half_and_steps_otherwise(
    budget: float, every_s: float, watching_s: float
) -> None:
    sampler, allowed = Sampler(budget), AIM * budget * STEP_S
    settled(sampler, every_s, watching_s)
    assert (sampler.period > 1) == (watching_s > allowed / 2 and every_s + watching_s > allowed)


def test_the_budget_is_kept_with_room() -> None:
    """Aimed at itself, half of all means over a few steps would lie above it."""
    spent = settled(Sampler(0.01), 1.0)
    assert spent == pytest.approx(0.5 * 0.01 * STEP_S, rel=0.01)


def test_watching_that_is_not_counted_exceeds_the_budget() -> None:
    """The control of the above."""
    assert settled(Sampler(0.05), 1.0, 0.08, told=False) > 1.1 * 0.05 * STEP_S


@pytest.mark.parametrize("whole", [False, True])
def test_a_step_that_drew_nothing_makes_the_next_at_most_twice_as_dear(whole: bool) -> None:
    sampler = Sampler(0.01)
    settled(sampler, 4.0, whole=whole)
    before = sampler.chance
    for _ in range(5):
        sampler.spent(0.0, STEP_S, whole=whole)
        assert sampler.chance <= 2 * before
        before = sampler.chance


def test_clocks_that_leave_a_step_nothing_do_not_end_the_checks() -> None:
    """Watching that is reckoned to take longer than the step did."""
    sampler = Sampler(0.01)
    sampler.spent(0.5, 1.0, 0.8)
    assert 1 < sampler.period <= 2**15


def test_draws_are_the_keys_and_as_many_as_the_share_says() -> None:
    sampler = Sampler(0.01)
    sampler.share = 0.25
    drawn = [sampler.draws(7, call) for call in range(4000)]
    assert drawn == [sampler.draws(7, call) for call in range(4000)]
    assert drawn != [sampler.draws(8, call) for call in range(4000)]
    assert 850 < sum(drawn) < 1150


def watched(period: int, steps: int) -> list[int]:
    """Steps of the first so many that a sampler with this period watches."""
    sampler = Sampler(0.01)
    sampler.period = period
    found = []
    for step in range(steps):
        if sampler.watches:
            found.append(step)
        sampler.over()
    return found


@given(st.integers(1, 6), st.integers(0, 3))
def test_ranks_watch_the_same_steps_and_those_of_a_longer_period_some_of_them(power: int, longer: int) -> None:
    few, many = watched(2 ** (power + longer), 4000), watched(2**power, 4000)
    assert set(few) <= set(many)
    assert len(many) == pytest.approx(4000 / 2**power, abs=5 * (4000 / 2**power) ** 0.5)
    assert many[0] == 0  # the first


def test_watching_an_operator_is_measured() -> None:
    """Some microseconds: not nothing, not what a check takes; and nobody watches afterwards."""
    assert 1e-7 < beside() < 1e-3
    assert torch._C._len_torch_dispatch_stack() == 0


class Slow(TorchDispatchMode):
    """An operator takes 100 s, by a clock that moves only where it is told to."""

    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.now = now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.now[0] += 100.0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("drawn", [True, False])
def test_looking_at_operators_is_timed_without_them_and_without_their_checks(
    monkeypatch: pytest.MonkeyPatch, drawn: bool
) -> None:
    now, taken = [0.0], {"_look": 10.0, "_pass_by": 1.0}
    for module in (inspection, saved):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls: Counter[str] = Counter()

    def slowed(name: str) -> Any:
        inner = getattr(inspection.Inspection, name)

        def work(*args: Any) -> Any:
            now[0] += taken[name]
            calls[name] += 1
            return inner(*args)

        return work

    for name in taken:
        monkeypatch.setattr(inspection.Inspection, name, slowed(name))
    model = nn.Linear(4, 4)
    guard = Guard(model, budget=0.5, fingerprints=False)
    guard.sampler.share = 1.0 if drawn else 1e-12
    with Slow(now), guard.step() as step:
        model(torch.ones(2, 4)).square().sum().backward()
    assert calls["_look"] > 4 if drawn else calls["_pass_by"] > 4
    assert step.seconds == 10 * calls["_look"]
    assert step.looking == calls["_pass_by"]
