"""Layer norm and RMS norm: their identities, clean rows and gradients, and faults above the floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import (
    CPU,
    SCALES,
    CpuBench,
    alarms,
    aten,
    checked,
    flipped,
    gross_faults,
    outliers,
    run,
    with_result,
    worst,
)

from diagnostics.sensors.checks.norms import CHECKS, rms_norm_readings
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.signs import LEAST, Signs
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.tolerance import Z, shipped_table

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-6


def layer_norm(
    rows: int, n: int, seed: int, dtype: Any = torch.float32, scale: float = 1.0, mean: float = 0.0
) -> tuple[Call, Call]:
    """Forward and backward, weights near one."""
    x = outliers(rows, n, seed=seed, scale=scale, dtype=dtype) + mean * scale
    w = (1 + 0.3 * outliers(n, seed=seed + 2)).to(dtype)
    b = outliers(n, seed=seed + 4, dtype=dtype)
    there = run(aten.native_layer_norm.default, x, [n], w, b, EPS)
    grad = outliers(rows, n, seed=seed + 6, scale=1 / scale, dtype=dtype)
    args = (grad, x, [n], there.out[1], there.out[2], w, b, [True, True, True])
    return there, run(aten.native_layer_norm_backward.default, *args)


def rms_norm(rows: int, n: int, seed: int, dtype: Any = torch.float32, scale: float = 1.0) -> tuple[Call, Call]:
    """The fused forward, and its backward as a formula: torch has no CPU kernel for that one."""
    x = outliers(rows, n, seed=seed, scale=scale, dtype=dtype)
    w = (1 + 0.3 * outliers(n, seed=seed + 2)).to(dtype)
    there = run(aten._fused_rms_norm.default, x, [n], w, EPS)
    grad = outliers(rows, n, seed=seed + 6, scale=1 / scale, dtype=dtype)
    rstd = there.out[1].float()
    unit, pulled = x.float() * rstd, grad.float() * w.float()
    dx = rstd * (pulled - unit * (pulled * unit).mean(-1, keepdim=True))
    dw = (grad.float() * unit).sum(0)
    args = (grad, x, [n], there.out[1], w, [True, True])
    return there, Call(aten._fused_rms_norm_backward.default, args, {}, (dx.to(dtype), dw.to(dtype)))


NORMS = st.sampled_from((layer_norm, rms_norm))


@settings(deadline=None, max_examples=150)
@given(
    NORMS,
    st.integers(1, 60),
    st.integers(1, 600),
    st.sampled_from(DTYPES),
    st.sampled_from(SCALES),
    st.integers(2_000_000, 3_000_000),
)
def test_clean_norms_never_alarm(norm: Any, rows: int, n: int, dtype: Any, scale: float, seed: int) -> None:
    for call in norm(rows, n, seed, dtype, scale):
        assert worst(CHECKS, call, CpuBench(seed)) <= 1.0


@pytest.mark.parametrize("mean", [3.0, 100.0, -1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_from_zero_are_quiet(dtype: torch.dtype, mean: float) -> None:
    for call in layer_norm(30, 200, 2_000_002, dtype, mean=mean):
        assert worst(CHECKS, call) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zeros_and_nothing_are_quiet(dtype: torch.dtype) -> None:
    for shape in ((3, 8), (0, 8)):
        x, w = torch.zeros(shape, dtype=dtype), torch.ones(8, dtype=dtype)
        there = run(aten.native_layer_norm.default, x, [8], w, None, EPS)
        assert worst(CHECKS, there) <= 1.0
        args = (x, x, [8], there.out[1], there.out[2], w, None, [True, True, False])
        assert worst(CHECKS, run(aten.native_layer_norm_backward.default, *args)) <= 1.0
        assert worst(CHECKS, run(aten._fused_rms_norm.default, x, [8], None, None)) <= 1.0


def test_several_dimensions_are_normalised_together_and_only_what_was_asked_is_checked() -> None:
    x, w = outliers(2, 3, 4, 5, seed=2_000_003), outliers(4, 5, seed=1)
    there = run(aten.native_layer_norm.default, x, [4, 5], w, w, EPS)
    assert [each.readings.numel() for each in checked(CHECKS, there)] == [6, 6, 6]
    assert worst(CHECKS, there) <= 1.0
    args = (x, x, [4, 5], there.out[1], there.out[2], w, w, [False, True, False])
    back = run(aten.native_layer_norm_backward.default, *args)
    assert [each.result for each in checked(CHECKS, back)] == ["dw"]
    assert worst(CHECKS, back) <= 1.0


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, True], [False, True, False], [False, False, True]])
def test_sums_over_rows_without_a_tolerance_are_made_again_whatever_else_was_asked(mask: list[bool]) -> None:
    """In bf16, of which no constant for them is known."""
    x, w = outliers(40, 16, seed=2_000_003, dtype=torch.bfloat16), outliers(16, seed=1, dtype=torch.bfloat16)
    there = run(aten.native_layer_norm.default, x, [16], w, w, EPS)
    back = run(aten.native_layer_norm_backward.default, x, x, [16], there.out[1], there.out[2], w, w, mask)
    assert worst(CHECKS, back) <= 1.0
    for at, asked in enumerate(mask):
        if asked:
            bad = back.out[at].clone()
            bad.view(-1)[3] += 8 * bad.abs().amax()
            assert alarms(CHECKS, with_result(back, bad, at)), at


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_norms_own_identity_holds_exactly_with_eps(eps: float) -> None:
    x = outliers(6, 50, seed=3).double().requires_grad_()
    w, grad = outliers(50, seed=4).double(), outliers(6, 50, seed=5).double()
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    (dx,) = torch.autograd.grad(x * rstd * w, x, grad)
    unit = (x * rstd).detach()
    expected = rstd**3 * eps * 50 * (grad * w * unit).mean(-1, keepdim=True)
    assert torch.allclose((unit * dx).sum(-1, keepdim=True), expected.detach(), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=80)
@given(NORMS, st.booleans(), st.integers(2, 300), st.integers(2_000_000, 3_000_000))
def test_an_element_off_by_twice_the_floor_alarms(norm: Any, backward: bool, n: int, seed: int) -> None:
    call = norm(5, n, seed)[backward]
    kappa = shipped_table().kappa("cpu", "float32", "layer_norm")
    x, w = (
        (call.args[1], call.args[-3] if norm is layer_norm else call.args[-2])
        if backward
        else (call.args[0], call.args[2])
    )
    rstd = call.args[4 if norm is layer_norm else 3] if backward else call.out[-1]
    mean = x.mean(-1, keepdim=True).abs() if norm is layer_norm else torch.zeros(5, 1)
    carried = call.args[0] if backward else x
    size = rstd[2] * (
        (carried[2] * w).norm() * (1 + mean[2] * rstd[2] * backward) + (0 if backward else mean[2] * w.norm())
    )
    if norm is layer_norm and not backward:
        size = size + call.args[3].norm()
    bad = call.out[0].clone()
    bad[2, seed % n] += float(2 / LEAST * Z * kappa.accumulate_at(n) * size) + 2e-7 * float(bad[2].abs().amax())
    found = checked(CHECKS, with_result(call, bad, 0), CpuBench(seed))
    assert (found[0].readings <= 1.0).tolist() == [True, True, False, True, True]
    assert not alarms(CHECKS, with_result(call, bad, 0), CpuBench(seed, loose=1e3))


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gross_faults_of_every_result_alarm(norm: Any, dtype: torch.dtype) -> None:
    for call in norm(12, 40, 2_000_005, dtype):
        for place, result in enumerate(call.out):
            for fault, bad in gross_faults(result, place):
                assert not torch.equal(bad, result)
                assert alarms(CHECKS, with_result(call, bad, place)), (place, fault)


@pytest.mark.parametrize("place", [1, 2])
def test_saved_statistics_are_checked_to_a_millionth(place: int) -> None:
    there, _ = layer_norm(12, 40, 2_000_006)
    off = there.out[place].clone()
    off[7] *= 1 + 1e-3
    found = checked(CHECKS, with_result(there, off, place))
    assert not bool(found[place].readings[7] <= 1.0)
    assert bool((found[place].readings[:7] <= 1.0).all())


def test_one_wrong_column_sum_of_a_weights_gradient_alarms() -> None:
    _, back = layer_norm(50, 40, 2_000_008)
    for place in (1, 2):
        bad = back.out[place].clone()
        bad[5] += 1e-4 * bad.abs().amax()
        assert alarms(CHECKS, with_result(back, bad, place))
        assert not alarms(CHECKS, with_result(back, bad, place), CpuBench(loose=1e4))


def test_a_low_precision_weights_gradient_is_made_again_and_one_bit_of_it_alarms() -> None:
    _, back = layer_norm(50, 40, 2_000_008, torch.bfloat16)
    assert [(each.sensor, each.result) for each in checked(CHECKS, back)] == [
        ("norm", "dx"),
        ("recompute", "out1"),
        ("recompute", "out2"),
    ]
    for place in (1, 2):
        assert alarms(CHECKS, with_result(back, flipped(back.out[place], 3, 16), place))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_an_rms_norm_made_of_other_operators_is_checked_by_its_gradient(dtype: torch.dtype, weighted: bool) -> None:
    x = outliers(3, 7, 64, seed=2_000_009, dtype=dtype).requires_grad_()
    w = (1 + 0.2 * outliers(64, seed=8)).to(dtype) if weighted else None
    wide = x.float()
    out = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(dtype)
    grad = outliers(3, 7, 64, seed=9, dtype=dtype)
    (dx,) = torch.autograd.grad(out if w is None else out * w, x, grad)
    kappa = CpuBench().kappa("rms_norm", x)
    with quiet():
        clean = rms_norm_readings(x.detach(), w, EPS, grad, dx, Signs(1, CPU), kappa)
        assert clean.shape == (21,)
        assert bool((clean <= 1.0).all())
        bad = dx.clone()
        bad[1, 2, 3] += dx.abs().amax()
        wrong = rms_norm_readings(x.detach(), w, EPS, grad, bad, Signs(1, CPU), kappa)
    assert (wrong <= 1.0).logical_not().nonzero().flatten().tolist() == [9]


def test_a_nan_operand_gives_a_nan_reading_of_its_row() -> None:
    there, back = layer_norm(4, 30, 2_000_010)
    for call, place in ((there, 0), (back, 1)):
        args = list(call.args)
        args[place] = args[place].clone()
        args[place][2, 3] = torch.nan
        found = checked(CHECKS, Call(call.func, tuple(args), {}, call.out))
        assert found[0].readings.isnan().tolist() == [False, False, True, False]
