"""What a whole step costs under a guard, and with which coverage and recall: the figures of one small size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import guard_overhead
from benchmarks._guarded_steps import SETTINGS, Bench, Cost, Covered, Setting

BY_NAME = {setting.name: setting for setting in SETTINGS}


def small() -> Bench:
    return Bench(64, torch.float32, 64)


@pytest.fixture(scope="module")
def timed() -> tuple[Bench, dict[str, Cost]]:
    bench = small()
    return bench, bench.costs(1)


def state(bench: Bench) -> list[Tensor]:
    return [p.detach().clone() for p in bench.model.parameters()]


def test_a_guarded_step_updates_as_a_plain_one_does_whoever_came_before() -> None:
    bench, twin = small(), small()
    for one in (bench, twin):
        one.passes()
    began = state(bench)
    for setting in SETTINGS:
        bench.guarded(setting)
        twin.step()
    assert all(torch.equal(a, b) for a, b in zip(state(bench), state(twin), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(state(bench), began, strict=True))
    assert bench.guards["everything"].upkeep is not None
    assert bench.guards["products alone"].upkeep is None


def test_a_step_that_alarms_is_no_cost() -> None:
    bench, setting = small(), BY_NAME["everything"]
    bench.passes()
    bench.guarded(setting)
    with torch.no_grad():
        next(bench.model.parameters()).fill_(torch.nan)
    with pytest.raises(RuntimeError, match="everything: a false alarm"):
        bench.guarded(setting)


def test_each_setting_covers_and_sees_what_it_says(timed: tuple[Bench, dict[str, Cost]]) -> None:
    bench, costs = timed
    assert set(costs) == {"deterministic", *BY_NAME}
    for setting in SETTINGS:
        cost = costs[setting.name]
        assert len(cost.ratios) == len(cost.shares) == 1
        assert cost.own[0] > cost.optimizer[0] >= 0
    assert costs["everything"].optimizer[0] > 0 == costs["products alone"].optimizer[0]
    assert costs["a budget of 0.8 %"].shares[0] < 1.0 == costs["everything"].shares[0]
    covered = {setting.name: bench.covered(setting) for setting in SETTINGS}
    assert covered["everything"] == (1.0, 1.0, 1.0)
    assert covered["identities only"].products == 1.0 > covered["identities only"].operators
    assert covered["products alone"] == (1.0, 18 / 100, None)  # of the step's operators that make values
    struck = {name: bench.struck(setting, 1.0, 1) for name, setting in BY_NAME.items()}
    assert {flip.product for flip in struck["products alone"] if flip.seen} == {True}
    assert {flip.product for flip in struck["identities only"] if flip.seen} == {True, False}
    assert not any(flip.seen for flip in bench.struck(BY_NAME["everything"], 0.0, 1))
    guard = bench.guards["a budget of 0.8 %"]
    assert guard.sampler.budget == BY_NAME["a budget of 0.8 %"].budget
    assert guard.sampler.chance < 1.0


def test_the_cost_of_a_budget_that_draws_steps_is_the_mean_over_its_period() -> None:
    """Its coverage too: of what a watched step covers, one part in the period."""
    bench = small()
    costs = bench.costs(1)
    cost = costs["a budget of 0.8 %"]
    (share,) = cost.shares
    assert share <= 1 / 16  # of steps of a few milliseconds, whose operators take some 20 us each to watch
    assert 0 < cost.own[0] < costs["everything"].own[0]
    assert bench.covered(BY_NAME["a budget of 0.8 %"]) == pytest.approx((share, share, share))


def test_what_must_be_read_grows_with_what_is_checked(timed: tuple[Bench, dict[str, Cost]]) -> None:
    bench, _ = timed
    touched = bench.touched()
    bytes_read = {
        setting.name: guard_overhead.limit("limit", setting, bench, touched, 1e9).peer_value for setting in SETTINGS[:4]
    }
    parameters = sum(p.nbytes for p in bench.model.parameters())
    assert bench.at_rest() >= 3 * parameters
    assert bytes_read["products alone"] == touched.products < touched.identities
    assert bytes_read["identities only"] == touched.identities + 2 * bench.at_rest()
    assert bytes_read["everything"] == bytes_read["identities only"] + touched.again + touched.saved
    watched = guard_overhead.watching("watching", bench)
    assert (watched.value or 0.0) > 0
    assert (watched.peer_value or 0.0) > 100


@pytest.mark.parametrize(("operators", "met"), [(0.0, False), (0.0004, True), (0.05, True)])
def test_a_mark_is_met_only_where_something_is_covered(operators: float, met: bool) -> None:
    setting = Setting("a budget", budget=0.008, target=0.008)
    cost = Cost([1.005, 1.001], [0.004], [0.0], [1e-4, 1e-4])
    figure = guard_overhead.of_cost("x", setting, cost, Covered(0.0, operators, None), large=True, clocked=True)
    assert (figure.met, figure.samples) == (met, 2)
    dear = Cost([1.05], [0.05], [0.0], [1.0])
    covered = Covered(1.0, operators, None)
    assert guard_overhead.of_cost("x", setting, dear, covered, large=True, clocked=True).met is False
    assert guard_overhead.of_cost("x", setting, cost, covered, large=False, clocked=True).met is None


def test_a_ratio_that_noise_makes_small_meets_no_mark_that_the_checks_own_clock_misses() -> None:
    setting, covered = Setting("a budget", budget=0.008, target=0.008), Covered(1.0, 1.0, None)
    noisy = Cost([0.97, 1.01, 0.99], [0.02], [0.0], [1.0])
    found = guard_overhead.of_cost("x", setting, noisy, covered, large=True, clocked=True)
    assert (found.value, found.met) == (pytest.approx(-0.01), False)
    assert "rounds -0.030..0.010" in (found.coverage or "")
    assert guard_overhead.of_cost("x", setting, noisy, covered, large=True, clocked=False).met  # a GPU's is the ratio


def test_every_cost_has_its_own_recall() -> None:
    size = guard_overhead.Size(64, 64, 1, 1)
    figures = list(guard_overhead.of_size(size, torch.float32, torch.device("cpu"), 1e9))
    named = {figure.name: figure for figure in figures}
    for setting in SETTINGS:
        assert named[f"hidden 64, fp32: {setting.name}"].coverage
        assert setting.budget or named[f"hidden 64, fp32: limit, {setting.name}"].value
        recall = named[f"hidden 64, fp32: recall, {setting.name}"]
        products = named[f"hidden 64, fp32: recall, products, {setting.name}"]
        assert (recall.samples, products.samples) == (100, 18)
        assert "95 % interval" in (recall.coverage or "")
    assert (named["hidden 64, fp32: recall, everything"].value or 0.0) > 0.9
