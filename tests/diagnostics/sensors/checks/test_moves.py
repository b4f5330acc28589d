"""What moves arrives bit for bit: clean moves of any form are quiet, and any bit that is wrong alarms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import CpuBench, alarms, aten, checked, flipped, outliers, run, with_result, worst

from diagnostics.sensors.checks.moves import BEFORE, CHECKS
from diagnostics.sensors.checks.operation import Call, Unsupported

SEEDS = st.integers(0, 10_000)
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))


def moves(rows: int, n: int, k: int, seed: int, dtype: Any) -> list[Call]:
    """One call of every operator that moves, k places of a table [rows, n]."""
    g = torch.Generator().manual_seed(seed)
    x = outliers(rows, n, seed=seed, dtype=dtype)
    index = torch.randint(0, rows, (k,), generator=g)
    columns = torch.randint(0, n, (rows, k), generator=g)
    some = torch.randperm(rows, generator=g)[: max(1, rows // 2)]
    new = outliers(len(some), n, seed=seed + 1, dtype=dtype)
    order = torch.rand(rows, n, generator=g).argsort(1)
    given: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.embedding.default, (x, index), {}),
        (aten.index_select.default, (x, 0, index), {}),
        (aten.index_select.default, (x, 1, columns[0]), {}),
        (aten.index.Tensor, (x, [index.view(1, -1)]), {}),
        (aten.index.Tensor, (x, [None, columns[0] - n]), {}),
        (aten.index.Tensor, (x, [some, some % n]), {}),
        (aten.index.Tensor, (x, [x[:, 0] > 0]), {}),
        (aten.gather.default, (x, 1, columns), {}),
        (aten.gather.default, (x, 0, index.view(-1, 1)), {}),
        (aten.clone.default, (x.t(),), {"memory_format": torch.contiguous_format}),
        (aten._to_copy.default, (x,), {"dtype": torch.bfloat16 if dtype == torch.float32 else torch.float32}),
        (aten.copy_.default, (torch.empty(2, rows, n), x), {}),
        (aten.cat.default, ([x, x[:1], torch.zeros(0)],), {}),
        (aten.cat.default, ([x, x[:, :1]], -1), {}),
        (aten.cat.default, ([x[:, :0], x], 1), {}),
        (aten.cat.default, ([x, x[:0]], 0), {}),
        (aten.index_copy.default, (x, 0, some, new), {}),
        (aten.index_copy_.default, (x.clone(), 0, some, new), {}),
        (aten.scatter.src, (x, 1, order, x.flip(1)), {}),
        (aten.scatter.value, (x, 1, order[:, : max(1, n // 2)], 2.5), {}),
        (aten.scatter_.value, (x > 0, 1, order[:, :1], True), {}),
        (aten.scatter.value, (x, 0, order[:1, :1] * 0, 2.5), {}),
        (aten.scatter_.value_reduce, (x.clone(), 1, order[:, :1], 2.5), {"reduce": "multiply"}),
    ]
    return [run(func, *args, before=BEFORE, **kwargs) for func, args, kwargs in given]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 15), SEEDS, DTYPES)
def test_clean_moves_never_alarm(rows: int, n: int, k: int, seed: int, dtype: torch.dtype) -> None:
    for call in moves(rows, n, k, seed, dtype):
        assert worst(CHECKS, call) == 0.0, call.func


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 15), SEEDS, DTYPES, st.integers(16, 31))
def test_any_bit_that_is_wrong_alarms(rows: int, n: int, k: int, seed: int, dtype: torch.dtype, bit: int) -> None:
    for call in moves(rows, n, k, seed, dtype):
        if call.out.dtype != torch.bool and call.out.numel():
            bad = flipped(call.out, seed % call.out.numel(), bit)
            assert alarms(CHECKS, with_result(call, bad)), call.func


def test_rows_that_changed_places_alarm_though_nothing_was_lost() -> None:
    for call in moves(8, 6, 9, 3, torch.float32):
        swapped = call.out.roll(1, 0)
        if call.out.dtype != torch.bool and call.out.shape[0] > 1 and not torch.equal(swapped, call.out):
            assert alarms(CHECKS, with_result(call, swapped)), call.func


@pytest.mark.parametrize("place", [0, 1])
def test_the_readings_name_the_row(place: int) -> None:
    x = outliers(5, 4, seed=3)
    call = run(aten.index_select.default, x, place, torch.tensor([3, 1, 0]))
    bad = call.out.clone()
    bad.select(place, 1)[2] += 1
    (found,) = checked(CHECKS, with_result(call, bad))
    assert found.readings.tolist() == [0.0, 2.0, 0.0]


def test_a_stray_write_and_a_lost_one_alarm_in_the_row_where_they_are() -> None:
    x, new = outliers(6, 4, seed=3), outliers(2, 4, seed=4)
    for func in (aten.index_copy.default, aten.index_copy_.default):
        call = run(func, x.clone(), 0, torch.tensor([4, 1]), new, before=BEFORE)
        for row in (1, 2):
            bad = call.out.clone()
            bad[row, 0] = 9.0
            (found,) = checked(CHECKS, with_result(call, bad))
            assert found.readings.nonzero().flatten().tolist() == [row]


def test_a_place_written_to_twice_may_hold_either() -> None:
    x, new = torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    call = run(aten.index_copy.default, x, 0, torch.tensor([1, 1]), new)
    for value in (1.0, 2.0):
        out = x.clone()
        out[1] = value
        assert not alarms(CHECKS, with_result(call, out))


def test_without_the_copy_from_before_a_write_in_place_is_refused() -> None:
    x = outliers(6, 4, seed=3)
    out = aten.index_copy_.default(x, 0, torch.tensor([4]), x[:1].clone())
    with pytest.raises(Unsupported, match="no copy was kept"):
        checked(CHECKS, Call(aten.index_copy_.default, (x, 0, torch.tensor([4]), x[:1]), {}, out))


def test_not_a_number_moves_like_any_other_value() -> None:
    x = torch.full((3, 4), torch.nan)
    call = run(aten.index_select.default, x, 0, torch.tensor([2, 0]))
    assert worst(CHECKS, call) == 0.0
    assert alarms(CHECKS, with_result(call, torch.zeros(2, 4)))


def test_nothing_is_quiet_and_a_copy_between_devices_is_refused() -> None:
    x = outliers(3, 4, seed=1)
    none = torch.zeros(0, dtype=torch.int64)
    for call in (
        run(aten.index_select.default, x, 0, none),
        run(aten.embedding.default, x, none),
        run(aten.cat.default, [x[:0], x[:0]]),
        run(aten.clone.default, torch.zeros(())),
    ):
        assert worst(CHECKS, call) == 0.0
    with pytest.raises(Unsupported, match="between devices"):
        checked(CHECKS, Call(aten._to_copy.default, (x.to("meta"),), {}, x), CpuBench())


@pytest.mark.parametrize("kind", ["conjugate", "negative"])
def test_what_torch_keeps_as_a_conjugate_or_a_negative_is_compared_as_it_stands(kind: str) -> None:
    """The backward of a rotation by complex numbers moves conjugates, and real views of them are negatives."""
    x = torch.view_as_complex(torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(3))).conj()
    source = x if kind == "conjugate" else x.imag
    assert source.is_conj() or source.is_neg()
    for call in (run(aten.clone.default, source), run(aten._to_copy.default, source), run(aten.copy_.default, x, x)):
        assert worst(CHECKS, call) == 0.0
        wrong = call.out.clone()
        wrong[2, 1] += 1e-6
        assert worst(CHECKS, with_result(call, wrong)) > 1
