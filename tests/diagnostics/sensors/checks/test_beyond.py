"""Products that cancel, overflow or have huge operands: clean ones are quiet, wrong ones are not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import CpuBench, alarms, aten, outliers, run, with_result, worst

from diagnostics.sensors.checks import gemm, rounded
from diagnostics.sensors.checks.gemm import BEFORE, CHECKS
from diagnostics.sensors.checks.operation import Call

SEEDS = st.integers(2_000_000, 3_000_000)
HALVES = (torch.bfloat16, torch.float16)


def cancelling(kind: str, rows: int, inner: int, columns: int, seed: int, dtype: torch.dtype) -> Call:
    a, w = outliers(rows, inner, seed=2 * seed), outliers(inner, columns, seed=2 * seed + 2)  # none has outliers yet
    if kind == "residual":
        a, w = a.abs().to(dtype), w.abs().to(dtype)
        return run(aten.addmm.default, (a.float() @ w.float()).to(dtype), a, w, beta=-1, before=BEFORE)
    a[:, 0] = a[:, 1] = 200.0
    w[0] *= 100
    w[1] += -w[0]
    return run(aten.mm.default, a.to(dtype), w.to(dtype))


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(("residual", "channels")),
    st.integers(1, 40),
    st.integers(2, 600),
    st.integers(2, 90),
    SEEDS,
    st.sampled_from((*HALVES, torch.float32)),
)
def test_products_that_cancel_are_quiet(
    kind: str, rows: int, inner: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    assert worst(CHECKS, cancelling(kind, rows, inner, columns, seed, dtype), CpuBench(seed)) <= 1.0


@pytest.mark.parametrize("kind", ["residual", "channels"])
def test_a_wrong_element_of_a_product_that_cancels_alarms(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = cancelling(kind, 40, 512, 48, 2_000_001, torch.bfloat16)
    a, w = (t.float() for t in call.args[-2:])
    bad = call.out.clone()
    bad[7, 5] += 0.03 * float(a[7].norm() * w.norm()) / 512**0.5  # three floors of a product that does not cancel
    assert alarms(CHECKS, with_result(call, bad))
    monkeypatch.setattr(rounded, "_SURE", math.inf)  # the negative control: no second look
    assert alarms(CHECKS, call)


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from((torch.bfloat16, torch.float32)),
    st.sampled_from(((1e10, 1e10), (1e19, 1e3), (1e25, 1e-20), (1e-20, 1e30), (1e19, 1e19), (1e30, 1e30))),
    st.sampled_from((None, 0.0, 1e-5, 1.0, 1e15)),
    st.tuples(st.integers(1, 20), st.integers(1, 200), st.integers(1, 60)),
    SEEDS,
)
def test_huge_operands_are_quiet_and_wrong_elements_are_not(
    dtype: torch.dtype, scales: tuple[float, float], of_added: float | None, shape: tuple[int, int, int], seed: int
) -> None:
    rows, inner, columns = shape
    a = outliers(rows, inner, seed=seed, scale=scales[0], dtype=dtype)
    w = outliers(inner, columns, seed=seed + 1, scale=scales[1], dtype=dtype)
    if of_added is None:
        call = run(aten.mm.default, a, w)
    else:
        added = outliers(rows, columns, seed=seed + 2, scale=of_added * min(scales[0] * scales[1], 1e18), dtype=dtype)
        call = run(aten.addmm.default, added, a, w, beta=0.5, alpha=2.0, before=BEFORE)
    assert worst(CHECKS, call, CpuBench(seed)) <= 1.0
    row, column = seed % rows, seed % columns
    terms = 2 * (a[row].double().abs() @ w[:, column].double().abs())
    if of_added is not None:
        terms += call.args[0][row, column].double().abs()
    if terms < torch.finfo(dtype).max / 2:
        for wrong in (math.nan, math.inf, -math.inf):
            bad = call.out.clone()
            bad[row, column] = wrong
            assert alarms(CHECKS, with_result(call, bad), CpuBench(seed)), wrong
    elif of_added is None:
        exact = (a[row].double() @ w.double()).abs()
        column = int(exact.argmax())
        bad = call.out.clone()
        bad[row, column] = 0.0
        cancels = exact[column] < terms / 16  # to what lies below the floor
        assert cancels or alarms(CHECKS, with_result(call, bad), CpuBench(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e10, 1e14, 1e19, 1e22])
def test_a_wrong_element_of_a_huge_product_alarms(dtype: torch.dtype, scale: float) -> None:
    a, w = (outliers(*shape, seed=2, scale=size, dtype=dtype) for shape, size in (((20, 64), scale), ((64, 30), 1e10)))
    call = run(aten.mm.default, a, w)
    assert worst(CHECKS, call) <= 1.0
    bad = call.out.clone()
    bad[3, 4] += float(call.out[3].abs().float().amax())
    assert alarms(CHECKS, with_result(call, bad))


def half_overflowing(rows: int, inner: int, columns: int, seed: int, kind: str) -> Call:
    """An fp16 product of which about half the elements lie beyond 65,504."""
    size = (6.5e4 / inner**0.5) ** 0.5
    a, w = (outliers(*shape, seed=2 * seed, scale=size).half() for shape in ((rows, inner), (inner, columns)))
    if kind == "mm":
        return run(aten.mm.default, a, w)
    if kind == "bias":
        return run(
            aten.addmm.default,
            outliers(columns, seed=2 * seed, scale=1e4).half(),
            a,
            w,
            beta=-1.0,
            alpha=0.5,
            before=BEFORE,
        )
    return run(
        aten.baddbmm.default,
        outliers(1, rows, columns, seed=2 * seed, scale=1e4).half(),
        a[None],
        w[None],
        before=BEFORE,
    )


@settings(deadline=None, max_examples=120)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 300), st.integers(1, 60)),
    st.sampled_from(("mm", "bias", "batch")),
    SEEDS,
)
def test_fp16_products_beyond_its_range_are_quiet_and_only_they(
    shape: tuple[int, int, int], kind: str, seed: int
) -> None:
    call = half_overflowing(*shape, seed, kind)
    assert worst(CHECKS, call, CpuBench(seed)) <= 1.0
    flat = call.out.view(-1)
    for place in {seed % len(flat), int(flat.abs().float().argmax()), int(flat.abs().float().argmin())}:
        value = float(flat[place])
        wrongs = [math.nan, -value, 0.0] if math.isinf(value) else [math.nan]
        wrongs += [math.inf] if abs(value) < 6e4 else []
        for wrong in wrongs:
            bad = flat.clone()
            bad[place] = wrong
            assert alarms(CHECKS, with_result(call, bad.view(call.out.shape)), CpuBench(seed)), (value, wrong)


def test_without_the_range_of_fp16_every_overflow_would_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    call = half_overflowing(8, 64, 16, 2_000_003, "mm")
    assert worst(CHECKS, call) <= 1.0
    monkeypatch.setattr(gemm, "all_finite", lambda t: False)
    assert alarms(CHECKS, call)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_products_of_nothing_are_quiet(dtype: torch.dtype) -> None:
    x = torch.ones(4, 5, dtype=dtype)
    for a, w in ((x, x.t()[:, :0]), (x[:0], x.t()), (x[:, :0], x.t()[:0])):
        assert worst(CHECKS, run(aten.mm.default, a, w)) == 0.0
        assert worst(CHECKS, run(aten.addmm.default, x[0, : w.shape[1]], a, w, before=BEFORE)) == 0.0


@settings(deadline=None, max_examples=80)
@given(st.sampled_from((*HALVES, torch.float32)), st.sampled_from((1.0, -2.0)), st.booleans(), SEEDS)
def test_where_the_addend_is_infinite_so_is_the_result(
    dtype: torch.dtype, beta: float, in_place: bool, seed: int
) -> None:
    a, w, d = (outliers(2, *shape, seed=2 * seed, dtype=dtype) for shape in ((9, 16), (16, 12), (9, 12)))
    closed = torch.ones(9, 12, dtype=torch.bool).triu_(5)
    d = d.masked_fill(closed, -torch.inf)
    call = run(aten.baddbmm_.default if in_place else aten.baddbmm.default, d, a, w, beta=beta, before=BEFORE)
    if in_place:
        (found,) = CHECKS[aten.baddbmm_](call, CpuBench())
    else:
        found, infinite = CHECKS[aten.baddbmm](call, CpuBench())
        assert infinite.exact
        assert float(infinite.readings.amax()) == 0.0
        for wrong in (0.0, -float(call.out[1, 2, 11])):
            bad = call.out.clone()
            bad[1, 2, 11] = wrong
            _, infinite = CHECKS[aten.baddbmm](with_result(call, bad), CpuBench())
            assert infinite.readings.tolist() == [2.0 if row == 11 else 0.0 for row in range(18)]
    rows = found.readings.view(2, 9)
    assert bool((rows[:, -2:] <= 1.0).all())  # rows without infinities are checked as ever
    assert bool(rows[:, :-2].isnan().all())  # the others are left to a second run
    bad = call.out.clone()
    bad[1, 8, 3] += 20 * bad[1, 8].abs().amax()
    first = next(iter(CHECKS[call.func.overloadpacket](with_result(call, bad), CpuBench())))
    assert float(first.readings.view(2, 9)[1, 8]) > 1.0
    assert bool((first.readings.view(2, 9)[0, -2:] <= 1.0).all())
