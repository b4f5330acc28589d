"""Sums at chosen places: clean ones are quiet whatever repeats, and rows that were lost, moved or changed alarm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import SCALES, CpuBench, alarms, aten, checked, gross_faults, outliers, run, with_result, worst

from diagnostics.sensors.checks.operation import Call, Unsupported
from diagnostics.sensors.checks.sums import BEFORE, CHECKS
from diagnostics.sensors.tolerance import UnknownTolerance, Z, shipped_table

DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
SEEDS = st.integers(2_000_000, 3_000_000)


def sums(n: int, k: int, width: int, seed: int, dtype: Any = torch.float32, scale: float = 1.0) -> list[Call]:
    """One call of every operator that adds at places: k rows of `width` to n places."""
    g = torch.Generator().manual_seed(seed)
    there, sent = (outliers(m, width, seed=seed + i, scale=scale, dtype=dtype) for i, m in enumerate((n, k)))
    index = torch.randint(0, n, (k,), generator=g)
    each = torch.randint(0, n, (k, width), generator=g)
    if seed % 3 == 0:
        index, each = index * 0, each % max(1, n // 2)
    given: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.index_add.default, (there, 0, index, sent), {"alpha": 1}),
        (aten.index_add_.default, (there.clone(), 0, index, sent), {"alpha": -2}),
        (aten.index_add.default, (there.t(), 1, index, sent.t()), {}),
        (aten.index_put.default, (there, [index], sent, True), {}),
        (aten.index_put_.default, (there.clone(), [index - n], sent, True), {}),
        (aten._index_put_impl_.default, (there.clone(), [index.view(1, -1)], sent, True), {}),
        (aten.embedding_dense_backward.default, (sent, index, n, -1, False), {}),
        (aten.embedding_dense_backward.default, (sent.view(1, k, width), index.view(1, k), n, 0, False), {}),
        (aten.scatter_add.default, (there, 0, each, sent), {}),
        (aten.scatter_add_.default, (there.t().clone(), 1, each.t(), sent.t()), {}),
    ]
    return [run(func, *args, before=BEFORE, **kwargs) for func, args, kwargs in given]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 120), st.integers(1, 40), DTYPES, st.sampled_from(SCALES), SEEDS)
def test_clean_sums_never_alarm(n: int, k: int, width: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    for call in sums(n, k, width, seed, dtype, scale):
        assert worst(CHECKS, call, CpuBench(seed)) <= 1.0, call.func


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(2, 30), SEEDS)
def test_a_change_of_twice_the_floor_alarms_in_its_row(n: int, k: int, width: int, seed: int) -> None:
    call = sums(n, k, width, seed)[0]
    there, _, index, sent = call.args
    row = int(index[seed % k])
    received = sent[index == row].norm(dim=1).sum() + there[row].norm()
    floor = Z * shipped_table().kappa("cpu", "float32", "sums").accumulate_at(max(k, width)) * received
    bad = call.out.clone()
    bad[row, seed % width] += float(2 * floor) + 2e-7 * float(bad[row].abs().amax())
    (found,) = checked(CHECKS, with_result(call, bad), CpuBench(seed))
    assert (found.readings <= 1.0).logical_not().nonzero().flatten().tolist() == [row]
    assert not alarms(CHECKS, with_result(call, bad), CpuBench(seed, loose=1e4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gross_faults_of_every_sum_alarm(dtype: torch.dtype) -> None:
    for call in sums(12, 30, 10, 2_000_005, dtype):
        for fault, bad in gross_faults(call.out, 2):
            assert alarms(CHECKS, with_result(call, bad)), (call.func, fault)


def test_a_row_that_was_sent_elsewhere_alarms_in_both_places() -> None:
    there, sent = torch.zeros(6, 8), outliers(3, 8, seed=4)
    call = run(aten.index_add.default, there, 0, torch.tensor([1, 4, 1]), sent)
    wrong = with_result(call, aten.index_add.default(there, 0, torch.tensor([1, 2, 1]), sent))
    (found,) = checked(CHECKS, wrong)
    assert (found.readings <= 1.0).logical_not().nonzero().flatten().tolist() == [2, 4]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 30), SEEDS)
def test_integer_counts_are_exact(n: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, n, (3, k), generator=g)
    call = run(
        aten.scatter_add_.default, torch.zeros(3, n, dtype=torch.int64), 1, index, torch.ones_like(index), before=BEFORE
    )
    assert worst(CHECKS, call) == 0.0
    bad = call.out.clone()
    bad[1, seed % n] += 1
    bad[1, (seed + 1) % n] -= 1
    assert alarms(CHECKS, with_result(call, bad)) == (n > 1)
    rows = run(
        aten.index_add_.default,
        torch.zeros(n, 2, dtype=torch.int64),
        0,
        index[0],
        torch.ones(k, 2, dtype=torch.int64),
        before=BEFORE,
    )
    assert worst(CHECKS, rows) == 0.0
    assert alarms(CHECKS, with_result(rows, rows.out + 1))


def test_writes_that_do_not_add_and_several_indices_are_run_again() -> None:
    x = outliers(5, 4, seed=3)
    some = torch.tensor([1, 3])
    for args in ((x.clone(), [some], x[:2], False), (x.clone(), [some, some], x[0, :2], True)):
        for func in (aten.index_put.default, aten.index_put_.default):
            call = run(func, *args, before=BEFORE)
            assert [each.sensor for each in checked(CHECKS, call)] == ["recompute"]
            assert worst(CHECKS, call) == 0.0
            assert alarms(CHECKS, with_result(call, call.out + 1))


def test_nothing_is_quiet() -> None:
    none, zeros = torch.zeros(0, dtype=torch.int64), torch.zeros(4, 3)
    assert worst(CHECKS, run(aten.index_add.default, zeros, 0, none, zeros[:0])) == 0.0
    assert worst(CHECKS, run(aten.index_put.default, zeros, [none], zeros[:0], True)) == 0.0
    assert worst(CHECKS, run(aten.embedding_dense_backward.default, zeros[:0], none, 4, -1, False)) == 0.0
    assert checked(CHECKS, run(aten.index_add.default, zeros[:, :0], 0, none, zeros[:0, :0])) == []


def test_a_nan_that_was_sent_is_a_nan_reading_where_it_went() -> None:
    sent = torch.ones(2, 3)
    sent[1, 1] = torch.nan
    call = run(aten.index_add.default, torch.zeros(4, 3), 0, torch.tensor([0, 2]), sent)
    (found,) = checked(CHECKS, call)
    assert found.readings.isnan().tolist() == [False, False, True, False]


def test_what_cannot_be_checked_says_why() -> None:
    x, some = outliers(3, 4, seed=3), torch.tensor([1, 1, 0])
    with pytest.raises(Unsupported, match="frequency"):
        checked(CHECKS, run(aten.embedding_dense_backward.default, x, some, 4, -1, True))
    with pytest.raises(Unsupported, match="no copy was kept"):
        checked(CHECKS, Call(aten.index_add_.default, (x, 0, some, x), {}, x))
    with pytest.raises(UnknownTolerance, match="sums in float64"):
        checked(CHECKS, run(aten.index_add.default, x.double(), 0, some, x.double()))
