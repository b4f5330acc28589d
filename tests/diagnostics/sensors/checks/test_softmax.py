"""Softmax and log-softmax, forward and backward: clean rows of any kind stay quiet, faults above the floor do not."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import (
    SCALES,
    CpuBench,
    alarms,
    aten,
    by_row,
    checked,
    flipped,
    gross_faults,
    outliers,
    run,
    with_result,
    worst,
)

from diagnostics.sensors.checks import softmax
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.softmax import CHECKS
from diagnostics.sensors.tolerance import UnknownTolerance, Z, shipped_table

FORWARDS = ("_softmax", "_log_softmax", "_safe_softmax")
BACKWARDS = ("_softmax_backward_data", "_log_softmax_backward_data")
DTYPES = (torch.float32, torch.bfloat16)
BLIND = 1e30


def forward(name: str, x: torch.Tensor, dim: int = -1) -> Call:
    extra = (dim,) if name == "_safe_softmax" else (dim, False)
    return run(getattr(aten, name).default, x, *extra)


def backward(name: str, grad: torch.Tensor, x: torch.Tensor, dim: int = -1) -> Call:
    out = forward(name.removesuffix("_backward_data"), x, dim).out
    return run(getattr(aten, name).default, grad, out, dim, x.dtype)


def call_of(name: str, rows: int, columns: int, seed: int, scale: float, dtype: torch.dtype) -> Call:
    x = outliers(rows, columns, seed=seed, scale=scale, dtype=dtype)
    if name in FORWARDS:
        return forward(name, x)
    return backward(name, outliers(rows, columns, seed=seed + 1, scale=1 / scale, dtype=dtype), x)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(FORWARDS + BACKWARDS),
    st.tuples(st.integers(1, 40), st.integers(1, 700)),
    st.sampled_from((*SCALES, 10.0)),
    st.sampled_from(DTYPES),
    st.integers(2_000_000, 3_000_000),
)
def test_clean_rows_never_alarm(name: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, seed: int) -> None:
    assert worst(CHECKS, call_of(name, *shape, seed, scale, dtype), CpuBench(seed)) <= 1.0


@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 4), (2, 3, 5), (2, 0)])
def test_zeros_one_row_and_nothing_are_quiet(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=dtype)
    call = forward(name, x) if name in FORWARDS else backward(name, torch.zeros_like(x), x)
    assert worst(CHECKS, call) <= 1.0


@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_rows_are_those_of_the_dimension(name: str, dim: int) -> None:
    x = outliers(3, 4, 5, seed=2_000_001)
    call = forward(name, x, dim) if name in FORWARDS else backward(name, outliers(3, 4, 5, seed=2), x, dim)
    found = by_row(CHECKS, call)
    assert found.shape == (60 // x.shape[dim],)
    assert float(found.amax()) <= 1.0


@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_gross_faults_alarm_and_a_blind_check_misses_the_finite_ones(name: str, dtype: torch.dtype, seed: int) -> None:
    call = call_of(name, 6, 50, 2_000_100 + seed, 1.0, dtype)
    for fault, bad in gross_faults(call.out, seed * 17):
        assert alarms(CHECKS, with_result(call, bad), CpuBench(seed)), fault
        if dtype == torch.float32 and bool(bad.isfinite().all()):
            assert not alarms(CHECKS, with_result(call, bad), CpuBench(seed, loose=BLIND)), fault


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORWARDS + BACKWARDS), st.integers(2, 300), st.integers(2_000_000, 3_000_000))
def test_a_change_of_twice_the_published_floor_alarms_in_fp32(name: str, columns: int, seed: int) -> None:
    call = call_of(name, 4, columns, seed, 1.0, torch.float32)
    kernel = "softmax_backward" if name in BACKWARDS else "log_softmax" if "log" in name else "softmax"
    kappa = shipped_table().kappa("cpu", "float32", kernel)
    norm = torch.ones(4)
    if name == "_log_softmax":
        norm = 1 + call.out.abs().amax(-1) + torch.logsumexp(call.args[0], -1).abs()
    elif name in BACKWARDS:
        grad, seen = call.args[0], call.args[1]
        grad = grad * seen if name == "_softmax_backward_data" else grad
        norm = grad.norm(dim=-1) + grad.sum(-1).abs()
    bad = call.out.clone()
    bad[2, seed % columns] += 2 * Z * kappa.accumulate_at(columns) * norm[2] + 2e-7 * bad[2].abs().amax()
    found = by_row(CHECKS, with_result(call, bad), CpuBench(seed))
    assert found[2] > 1.0
    assert bool((found[[0, 1, 3]] <= 1.0).all())


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(("_softmax", "_log_softmax")), st.integers(18, 31), st.integers(2_000_000, 3_000_000))
def test_flips_of_low_precision_probabilities_alarm_from_the_third_lowest_bit_on(
    name: str, bit: int, seed: int
) -> None:
    call = call_of(name, 4, 40, seed, 1.0, torch.bfloat16)
    assert alarms(CHECKS, with_result(call, flipped(call.out, int(call.out.abs().argmax()), bit)))


def test_a_wrong_score_under_exp_and_sum_alike_is_not_seen_in_fp32() -> None:
    x = outliers(4, 30, seed=2_000_010)
    wrong = x.clone()
    wrong[1, 3] += 2.0
    call = with_result(forward("_softmax", x), torch.softmax(wrong, -1))
    assert not alarms(CHECKS, call)
    assert alarms(CHECKS, with_result(forward("_log_softmax", x), torch.log_softmax(wrong, -1)))


def test_a_negative_probability_alarms_where_its_sum_does_not() -> None:
    call = forward("_softmax", torch.tensor([[20.0, 0.0, 0.0]]))
    bad = call.out.clone()
    bad[0, 1] = -bad[0, 1]
    assert abs(float(bad.sum()) - 1) < 1e-7
    assert alarms(CHECKS, with_result(call, bad))


def test_masked_scores_are_no_alarm_and_a_row_masked_throughout_is_zero_where_softmax_is_safe() -> None:
    x = outliers(3, 8, seed=2_000_011)
    x[0, 3:], x[1] = -torch.inf, -torch.inf
    for dtype in DTYPES:
        call = forward("_safe_softmax", x.to(dtype))
        assert worst(CHECKS, call) <= 1.0
        bad = call.out.clone()
        bad[1, 2] = 0.5
        assert alarms(CHECKS, with_result(call, bad))
    for name in ("_softmax", "_log_softmax"):
        assert (by_row(CHECKS, forward(name, x)) <= 1.0).tolist() == [True, False, True]  # NaN is no result
    lost = forward("_log_softmax", x[:1])
    bad = lost.out.clone()
    bad[0, 4] = -3.0
    assert alarms(CHECKS, with_result(lost, bad))


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_nan_in_the_inputs_is_a_nan_reading(name: str) -> None:
    grad: Any = outliers(3, 8, seed=2)
    grad[1, 1] = torch.nan
    (found,) = checked(CHECKS, backward(name, grad, outliers(3, 8, seed=3)))
    assert found.readings.isnan().tolist() == [False, True, False]


def test_a_dtype_without_a_kappa_is_said_to_have_none() -> None:
    with pytest.raises(UnknownTolerance, match="softmax in float64"):
        checked(CHECKS, forward("_softmax", torch.zeros(2, 3, dtype=torch.float64)))


def test_rows_are_cut_into_blocks_that_leave_no_reading_out(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of("_log_softmax_backward_data", 7, 20, 2_000_020, 1.0, torch.float32)
    (whole,) = checked(CHECKS, call)
    monkeypatch.setattr("diagnostics.sensors.checks.rows.BLOCK_ELEMENTS", 45)
    (cut,) = checked(CHECKS, call)
    assert cut.readings.shape == (7,)
    assert torch.allclose(cut.readings, whole.readings, atol=0.5)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 700)),
    st.sampled_from((*SCALES, 10.0)),
    st.sampled_from(("clean", "flip", "shift", "row")),
    st.integers(0, 30),
    st.integers(2_000_000, 3_000_000),
)
def test_where_the_bound_of_log_probabilities_suffices_their_readings_are_below_it(
    shape: tuple[int, int], scale: float, fault: str, bit: int, seed: int
) -> None:
    call = call_of("_log_softmax", *shape, seed, scale, torch.float32)
    out = call.out.clone()
    if fault == "flip":
        out = flipped(out, seed % out.numel(), bit)
    elif fault != "clean":  # all of one row alike, which its spread does not show; or more and more of it
        out[seed % shape[0]] += 2.0 ** (bit - 25) * (1 if fault == "shift" else torch.linspace(0, 1, shape[1]))
    bound = softmax._log_bound(out, call.args[0], CpuBench().kappa("log_softmax", out))
    with patch.object(softmax, "_SURE", -1.0):
        (exact,) = checked(CHECKS, with_result(call, out))
    (found,) = checked(CHECKS, with_result(call, out))
    assert bool((exact.readings <= bound + 0.25)[bound <= 0.5].all())  # roundings of the bound itself
    assert bool(((found.readings <= 1) == (exact.readings <= 1)).all())
    assert fault != "clean" or bool((found.readings <= 1).all())


def test_the_bound_spares_clean_rows_the_rest() -> None:
    call = call_of("_log_softmax", 20, 700, 2_000_004, 1.0, torch.float32)
    with patch.object(softmax, "worst_element", side_effect=AssertionError("computed again")):
        assert worst(CHECKS, call) <= 0.5
        with pytest.raises(AssertionError, match="again"):
            worst(CHECKS, with_result(call, flipped(call.out, 77, 23)))
