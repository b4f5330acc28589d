"""Routing and ordering: what was chosen is the best, orders are permutations, counts add up, tokens come home."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import SCALES, CpuBench, alarms, aten, checked, flipped, outliers, run, with_result, worst

from diagnostics.sensors.checks.operation import Unsupported
from diagnostics.sensors.checks.router import CHECKS, count_readings, gate_readings, hashed, home_readings
from diagnostics.sensors.multilinear import splitmix64
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.tolerance import UnknownTolerance, Z, shipped_table

DTYPES = (torch.float32, torch.bfloat16)
SEEDS = st.integers(2_000_000, 3_000_000)


def scores(rows: int, n: int, seed: int, dtype: Any = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Scores with ties and, in some rows, places that are closed by -inf."""
    x = outliers(rows, n, seed=seed, scale=scale, dtype=dtype)
    if seed % 3 == 0:
        x = (x / scale).round() * scale
    if seed % 5 == 0 and n > 2:
        x[::2, 1::2] = -torch.inf
    if seed % 7 == 0:
        x[::3, seed % n] = torch.inf
        x[1::3, seed % 4 :: 4] = torch.nan
    return x


@settings(deadline=None, max_examples=120)
@given(
    st.integers(1, 30),
    st.integers(1, 80),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from(SCALES),
    SEEDS,
)
def test_clean_choices_and_orders_never_alarm(
    rows: int, n: int, k: int, largest: bool, flag: bool, dtype: Any, scale: float, seed: int
) -> None:
    x = scores(rows, n, seed, dtype, scale)
    assert worst(CHECKS, run(aten.topk.default, x, min(k, n), -1, largest, flag)) == 0.0
    assert worst(CHECKS, run(aten.topk.default, x.t(), min(k, n), 0, largest, flag)) == 0.0
    assert worst(CHECKS, run(aten.sort.default, x, -1, flag)) == 0.0
    assert worst(CHECKS, run(aten.sort.stable, x, stable=True, dim=0, descending=flag)) == 0.0
    assert worst(CHECKS, run(aten.sort.default, x.argsort(-1))) == 0.0


@settings(deadline=None, max_examples=120)
@given(st.integers(1, 20), st.integers(2, 40), st.booleans(), st.integers(0, 31), SEEDS)
def test_any_wrong_bit_of_a_choice_alarms(rows: int, n: int, order: bool, bit: int, seed: int) -> None:
    x = outliers(rows, n, seed=seed)  # without ties: another of equal scores would be as good
    call = run(aten.sort.default, x) if order else run(aten.topk.default, x, 2)
    element = seed % call.out[0].numel()
    values = flipped(call.out[0], element, bit)
    assert alarms(CHECKS, with_result(call, values, 0))
    index = call.out[1].clone()
    index.view(-1)[element] ^= 1 << bit
    assert alarms(CHECKS, with_result(call, index, 1))


def test_a_better_score_that_was_left_out_alarms_though_values_and_indices_agree() -> None:
    x = torch.tensor([[5.0, 1.0, 4.0, 3.0]])
    call = run(aten.topk.default, x, 2)
    wrong = with_result(with_result(call, torch.tensor([[5.0, 3.0]]), 0), torch.tensor([[0, 3]]), 1)
    assert alarms(CHECKS, wrong)
    twice = with_result(with_result(call, torch.tensor([[5.0, 5.0]]), 0), torch.tensor([[0, 0]]), 1)
    assert alarms(CHECKS, twice)


def test_another_of_equal_scores_is_as_good() -> None:
    call = run(aten.topk.default, torch.tensor([[2.0, 7.0, 2.0]]), 2)
    for index in ([1, 0], [1, 2]):
        assert not alarms(CHECKS, with_result(call, torch.tensor([index]), 1))


def test_an_order_with_a_pair_of_indices_off_by_opposite_amounts_alarms() -> None:
    call = run(aten.sort.default, torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    off = torch.tensor([[1, 1, 2, 2]])  # the plain sum of 0, 1, 2, 3
    assert int(off.sum()) == 6
    assert alarms(CHECKS, with_result(call, off, 1))
    assert not alarms(CHECKS, with_result(call, torch.tensor([[3, 1, 0, 2]]), 1))


def test_a_score_that_is_not_a_number_is_the_largest() -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([[1.0, nan, 2.0, nan, inf]])
    for largest in (True, False):
        for k in range(1, 6):
            call = run(aten.topk.default, x, k, -1, largest)
            assert worst(CHECKS, call) == 0.0
            for index in permutations(range(5), k):
                wrong = with_result(with_result(call, x[:, list(index)], 0), torch.tensor([index]), 1)
                seen = [str(float(x[0, place])) for place in index]
                assert alarms(CHECKS, wrong) is (seen != [str(value) for value in call.out[0][0].tolist()])
    for descending in (True, False):
        call = run(aten.sort.default, x, -1, descending)
        assert worst(CHECKS, call) == 0.0
        moved = torch.tensor([[1, 0, 2, 3, 4]])
        wrong = with_result(with_result(call, call.out[0].gather(1, moved), 0), call.out[1].gather(1, moved), 1)
        assert alarms(CHECKS, wrong) is not descending  # the two largest are both NaN


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 200), st.sampled_from(DTYPES), st.integers(0, 3), SEEDS)
def test_running_sums_over_infinities_and_nan_are_what_those_leave(n: int, dtype: Any, kind: int, seed: int) -> None:
    x = outliers(3, n, seed=seed, dtype=dtype)
    place = 1 + seed % (n - 2)
    x[1, place] = (torch.inf, -torch.inf, torch.nan, torch.inf)[kind]
    if kind == 3:
        x[1, -1] = -torch.inf
    call = run(aten.cumsum.default, x, 1)
    assert worst(CHECKS, call) <= 1.0
    for at, value in ((place, 0.0), (n - 1, torch.nan if kind < 2 else 1.0), (place, -x[1, place])):
        bad = call.out.clone()
        bad[1, at] = value
        same = torch.equal(bad.nan_to_num(7.0), call.out.nan_to_num(7.0))
        assert alarms(CHECKS, with_result(call, bad)) is not same
    bad = call.out.clone()
    bad[1, place - 1] += x[1][x[1].isfinite()].float().abs().sum().to(dtype)  # before it
    assert alarms(CHECKS, with_result(call, bad))


def test_nothing_and_scalars_are_quiet() -> None:
    assert checked(CHECKS, run(aten.topk.default, torch.zeros(0, 4), 2)) == []
    assert worst(CHECKS, run(aten.sort.default, torch.zeros(()))) == 0.0
    assert checked(CHECKS, run(aten.cumsum.default, torch.zeros(0), 0)) == []
    assert worst(CHECKS, run(aten.bincount.default, torch.zeros(0, dtype=torch.int64))) == 0.0
    with pytest.raises(Unsupported, match="own range"):
        checked(CHECKS, run(aten.histc.default, torch.ones(4), 3))


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from((*DTYPES, torch.int64, torch.bool)),
    st.sampled_from(SCALES),
    SEEDS,
)
def test_clean_running_sums_never_alarm_and_wrong_ones_do(
    n: int, positive: bool, dtype: Any, scale: float, seed: int
) -> None:
    x = outliers(3, n, seed=seed, scale=scale)
    x = (x.abs() if positive else x).to(dtype) if dtype != torch.int64 else x.mul(10).long()
    call = run(aten.cumsum.default, x, 1)
    assert worst(CHECKS, call) <= 1.0
    bad = call.out.clone()
    kappa = shipped_table().kappa("cpu", "float32", "cumsum").accumulate_at(n)
    floor = 2 * Z * kappa * x[1].abs().sum() + 1e-6 * x[1].abs().sum() if dtype == torch.float32 else 1
    if dtype != torch.bfloat16:
        bad[1, seed % n] += floor if x.numel() else 0
        assert float(floor) == 0.0 or alarms(CHECKS, with_result(call, bad))
    bad = call.out.clone()
    if dtype.is_floating_point:
        bad[2, seed % n] = math.nan
        assert alarms(CHECKS, with_result(call, bad))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 40), SEEDS)
def test_counts_add_up_bin_by_bin(n: int, bins: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, bins, (n,), generator=g)
    call = run(aten.bincount.default, x, None, bins)
    assert worst(CHECKS, call) == 0.0
    lost, moved = call.out.clone(), call.out.clone()
    lost[seed % bins] += 1
    assert alarms(CHECKS, with_result(call, lost))
    if bins > 1:
        moved[seed % bins] += 1
        moved[(seed + 1) % bins] -= 1
        assert alarms(CHECKS, with_result(call, moved))
    weighted = run(aten.bincount.default, x, outliers(n, seed=seed), bins)
    assert worst(CHECKS, weighted) <= 1.0
    wrong = weighted.out.clone()
    wrong[seed % bins] += weighted.args[1].abs().sum() * 1e-3
    assert alarms(CHECKS, with_result(weighted, wrong))
    histogram = run(aten.histc.default, x.float(), bins, 0, bins)
    assert worst(CHECKS, histogram) == 0.0
    assert alarms(CHECKS, with_result(histogram, histogram.out + 1))


def test_hashes_are_those_of_the_digest() -> None:
    assert [int(h) % 2**64 for h in hashed(torch.arange(5))] == [splitmix64(i) for i in range(5)]


def test_gates_and_counts_sum_to_their_constants() -> None:
    bench = CpuBench()
    s = torch.sigmoid(outliers(200, 8, seed=2_000_002))
    gates = s / s.sum(-1, keepdim=True) * 2.5
    with quiet():
        kappa = bench.kappa("gates", gates)
        assert float(gate_readings(gates, 2.5, kappa).amax()) <= 1.0
        bad = gates.clone()
        bad[7, 3] += 1e-4
        assert (gate_readings(bad, 2.5, kappa) <= 1.0).logical_not().nonzero().flatten().tolist() == [7]
        counts = torch.bincount(torch.randint(0, 16, (600,)), minlength=16)
        assert count_readings(counts, 200, 3).tolist() == [0.0]
        assert count_readings(counts, 201, 3).tolist() == [6.0]


def test_every_copy_of_a_token_comes_home_unchanged() -> None:
    sent = outliers(10, 6, seed=3, dtype=torch.bfloat16)
    index = torch.arange(10).repeat(3)[torch.randperm(30)]
    home = sent[index]
    with quiet():
        assert home_readings(sent, home, index, 3).tolist() == [0.0] * 10
        changed = flipped(home, 8, 16)
        assert home_readings(sent, changed, index, 3).nonzero().flatten().tolist() == [int(index[1])]
        swapped = home.clone()
        swapped[4] = home[4].flip(0)
        assert home_readings(sent, swapped, index, 3).nonzero().flatten().tolist() == [int(index[4])]
        lost = home_readings(sent, home[1:], index[1:], 3)
        assert lost.nonzero().flatten().tolist() == [int(index[0])]
        astray = index.clone()
        astray[0] = 1 << 40
        assert not bool((home_readings(sent, home, astray, 3) <= 1.0).all())


def test_a_type_without_a_constant_is_said_to_have_none() -> None:
    with pytest.raises(UnknownTolerance, match="cumsum in float64"):
        checked(CHECKS, run(aten.cumsum.default, torch.zeros(2, 3, dtype=torch.float64), 1))
