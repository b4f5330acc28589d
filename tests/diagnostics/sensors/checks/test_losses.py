"""The negative log-likelihood: clean losses and gradients stay quiet, wrong ones do not."""

from __future__ import annotations

from typing import Any

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
    flipped,
    gross_faults,
    outliers,
    run,
    with_result,
    worst,
)

from diagnostics.sensors.checks.losses import CHECKS, MEAN, NONE
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.tolerance import Z, shipped_table

DTYPES = (torch.float32, torch.bfloat16)
SUM = 2


def calls(
    rows: int,
    classes: int,
    seed: int,
    reduction: int = MEAN,
    dtype: Any = torch.float32,
    scale: float = 1.0,
    weighted: bool = False,
) -> tuple[Call, Call]:
    """The forward and the backward of one loss, a fifth of whose targets are ignored."""
    g = torch.Generator().manual_seed(seed)
    y = torch.log_softmax(outliers(rows, classes, seed=seed, scale=scale, dtype=dtype), -1)
    target = torch.randint(0, classes, (rows,), generator=g)
    target[1::5] = -100
    weight = (torch.rand(classes, generator=g) + 0.1).to(dtype) if weighted else None
    there = run(aten.nll_loss_forward.default, y, target, weight, reduction, -100)
    grad = outliers(*there.out[0].shape, seed=seed, scale=1 / scale, dtype=dtype)
    back = run(aten.nll_loss_backward.default, grad, y, target, weight, reduction, -100, there.out[1])
    return there, back


@settings(deadline=None, max_examples=120)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 80)),
    st.sampled_from((NONE, MEAN, SUM)),
    st.sampled_from(DTYPES),
    st.sampled_from(SCALES),
    st.booleans(),
    st.integers(2_000_000, 3_000_000),
)
def test_clean_losses_never_alarm(
    shape: tuple[int, int], reduction: int, dtype: torch.dtype, scale: float, weighted: bool, seed: int
) -> None:
    for call in calls(*shape, seed, reduction, dtype, scale, weighted):
        assert worst(CHECKS, call) <= 1.0


def test_images_have_their_classes_in_the_second_dimension() -> None:
    y = torch.log_softmax(outliers(2, 5, 3, 4, seed=1), 1)
    target = torch.arange(24).view(2, 3, 4) % 5
    there = run(aten.nll_loss2d_forward.default, y, target, None, MEAN, -100)
    assert worst(CHECKS, there) <= 1.0
    back = run(aten.nll_loss2d_backward.default, torch.tensor(1.0), y, target, None, MEAN, -100, there.out[1])
    found = by_row(CHECKS, back)
    assert found.shape == (24,)
    assert float(found.amax()) <= 1.0
    assert alarms(CHECKS, with_result(back, flipped(back.out, 0, 20)))


def test_nothing_and_one_vector_are_quiet() -> None:
    for reduction in (NONE, SUM):
        assert worst(CHECKS, calls(0, 4, 1, reduction)[0]) <= 1.0
    y = torch.log_softmax(outliers(6, seed=5), -1)
    call = run(aten.nll_loss_forward.default, y, torch.tensor(2), None, MEAN, -100)
    assert worst(CHECKS, call) <= 1.0
    assert alarms(CHECKS, with_result(call, call.out[0] * 1.001, 0))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.sampled_from(DTYPES), st.booleans(), st.integers(2_000_000, 3_000_000))
def test_a_mean_over_no_target_is_not_a_number_and_any_number_alarms(
    rows: int, dtype: torch.dtype, weighted: bool, seed: int
) -> None:
    y = torch.log_softmax(outliers(rows, 6, seed=seed, dtype=dtype), -1)
    target, weight = torch.full((rows,), -100), torch.rand(6).to(dtype) if weighted else None
    there = run(aten.nll_loss_forward.default, y, target, weight, MEAN, -100)
    assert bool(there.out[0].isnan())
    assert worst(CHECKS, there) <= 1.0
    for wrong in (0.0, 1.0, torch.inf):
        assert alarms(CHECKS, with_result(there, torch.full_like(there.out[0], wrong), 0))
    assert alarms(CHECKS, with_result(there, torch.ones_like(there.out[1]), 1))
    back = run(
        aten.nll_loss_backward.default, torch.tensor(1.0, dtype=dtype), y, target, weight, MEAN, -100, *there.out[1:]
    )
    assert worst(CHECKS, back) <= 1.0
    assert alarms(CHECKS, with_result(back, torch.full_like(back.out, torch.nan)))


def test_not_a_number_is_no_sum_over_no_target_and_no_mean_over_some() -> None:
    y, none = torch.log_softmax(outliers(3, 6, seed=5), -1), torch.full((3,), -100)
    for target, reduction in ((none, SUM), (torch.tensor([-100, 2, 1]), MEAN)):
        call = run(aten.nll_loss_forward.default, y, target, None, reduction, -100)
        assert worst(CHECKS, call) <= 1.0
        assert alarms(CHECKS, with_result(call, call.out[0] * torch.nan, 0))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.sampled_from((MEAN, SUM)), st.integers(2_000_000, 3_000_000))
def test_a_change_of_twice_the_floor_alarms(rows: int, reduction: int, seed: int) -> None:
    there, _ = calls(rows, 30, seed, reduction)
    loss, total = there.out
    floor = Z * shipped_table().kappa("cpu", "float32", "nll_loss").accumulate_at(rows)
    # a loss of 0, its class certain, has a floor of 0: nothing is added to it
    assert float(loss) == 0.0 or alarms(CHECKS, with_result(there, loss * (1 + 2 * floor + 2e-7), 0))
    assert alarms(CHECKS, with_result(there, total * (1 + 2 * floor + 2e-7), 1))
    assert not alarms(CHECKS, with_result(there, loss * (1 + 2 * floor), 0), CpuBench(loose=4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", [NONE, MEAN])
def test_gross_faults_of_loss_and_gradient_alarm(dtype: torch.dtype, reduction: int) -> None:
    there, back = calls(40, 12, 2_000_005, reduction, dtype)
    for fault, bad in gross_faults(back.out, 3):
        assert alarms(CHECKS, with_result(back, bad)), fault
    for fault, bad in gross_faults(there.out[0].reshape(-1), 0):
        assert alarms(CHECKS, with_result(there, bad.view(there.out[0].shape), 0)), fault


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 479), st.integers(3, 31))
def test_any_flip_off_the_target_and_those_from_bit_3_on_at_it_alarm(element: int, bit: int) -> None:
    _, back = calls(40, 12, 2_000_006)
    bad = flipped(back.out, element, bit)
    if bad.flatten()[element] == 0:  # the sign of a zero is no number
        return
    assert (by_row(CHECKS, with_result(back, bad)) <= 1.0).tolist() == [row != element // 12 for row in range(40)]


def test_a_wrong_target_is_not_seen_and_an_ignored_row_that_is_not_zero_is() -> None:
    there, back = calls(10, 6, 2_000_007)
    assert not alarms(CHECKS, there)
    bad = back.out.clone()
    bad[1, 3] = 1e-12  # row 1 is ignored
    assert alarms(CHECKS, with_result(back, bad))
    moved = back.args[2].clone()
    moved[0] = (moved[0] + 1) % 6
    args = (*back.args[:2], moved, *back.args[3:])
    assert not alarms(CHECKS, run(back.func, *args))
