"""The floor that the record states is the check's own: above it faults are seen, below they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.campaign.floors import Deviation, Struck, delta_of, deviation
from diagnostics.faults.models import Damage
from diagnostics.sensors.checks import gemm, softmax
from diagnostics.sensors.checks.operand import Operand, Operands
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import Kappa, shipped_table

aten = torch.ops.aten
TABLE = shipped_table()
DTYPES = [torch.float32, torch.bfloat16]


class Bench:
    """What a check uses, with the shipped tolerances."""

    def __init__(self, key: int) -> None:
        self.signs = Signs(key, torch.device("cpu"))

    def kappa(self, kernel: str, like: Tensor) -> Kappa:
        return TABLE.kappa("cpu", str(like.dtype).removeprefix("torch."), kernel)

    def operand(self, value: Tensor) -> Operand:
        return Operands().of(value)


def of(func: Any, args: tuple[Any, ...], plane: tuple[int, ...], before: Tensor, after: Tensor) -> Deviation:
    harm = Damage(plane, before, after, None)
    return deviation(Struck(func, args, {}, harm, delta_of(harm), TABLE, ("mm",)))


def reading(checks: dict[Any, Any], func: Any, args: tuple[Any, ...], out: Tensor, key: int) -> float:
    found = checks[func.overloadpacket](Call(func, args, {}, out), Bench(key))
    return max(float(each.readings.max()) for each in found)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [False, True])
def test_products(dtype: torch.dtype, batched: bool) -> None:
    func = aten.bmm.default if batched else aten.mm.default
    shape = (3, 40, 96) if batched else (40, 96)
    for seed in range(10):
        args = random(*shape, dtype=dtype, seed=seed), random(*shape[:-2], 96, 64, dtype=dtype, seed=seed + 99)
        out = func(*args)
        plane = (seed % 3,) if batched else ()
        at = (*plane, 7, seed)
        floor = of(func, args, plane, out[plane], out[plane] + 1).floor
        rms = float(out[plane][7].float().square().mean().sqrt())
        for factor, seen in ((2.0, True), (0.4, False)):
            bad = out.clone().float()
            bad[at] += factor * floor * rms
            bad = bad.to(dtype)
            told = of(func, args, plane, out[plane], bad[plane])
            assert told.above is seen
            assert told.size == pytest.approx(factor * floor, rel=0.5 if dtype == torch.bfloat16 else 0.05)
            assert (reading(gemm.CHECKS, func, args, bad, seed) > 1) is seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_its_gradient(dtype: torch.dtype) -> None:
    x = random(5, 30, 48, dtype=dtype)
    forward = (x, -1, False)
    p = aten._softmax.default(*forward)
    backward = (random(5, 30, 48, dtype=dtype, seed=1), p, -1, dtype)
    for func, args in ((aten._softmax.default, forward), (aten._softmax_backward_data.default, backward)):
        out = func(*args)
        row = out[2, 7].float()
        worst = int(row.abs().argmax())
        seen = unseen = 0
        for exponent in range(-26, 0):
            bad = out.clone()
            bad[2, 7, worst] = (row[worst] * (1 + 2.0**exponent)).to(dtype)
            told = of(func, args, (2,), out[2], bad[2])
            excess = told.size / told.floor if told.floor else 0.0
            alarms = reading(softmax.CHECKS, func, args, bad, exponent + 99) > 1
            if excess > 2:
                seen += 1
                assert alarms
            elif excess < 0.4:
                unseen += 1
                assert not alarms
        assert seen >= 4
        assert unseen >= 2


def test_several_wrong_elements_of_a_row_need_more_to_be_promised() -> None:
    """Their sum under random signs may be small: at the floor it mostly is, at 100 times it is in 1 of 125 draws."""
    args = random(8, 32), random(32, 64, seed=1)
    out = args[0] @ args[1]
    one = of(aten.mm.default, args, (), out, out + 1).floor * float(out[3].square().mean().sqrt())
    missed = dict.fromkeys((3.0, 100.0), 0)
    for factor in missed:
        bad = out.clone()
        bad[3] += random(64, seed=5) / random(64, seed=5).norm() * one * factor * 1.01
        assert of(aten.mm.default, args, (), out, bad).above is (factor == 100.0)
        readings = [reading(gemm.CHECKS, aten.mm.default, args, bad, key) for key in range(400)]
        missed[factor] = sum(value <= 1 for value in readings)
    assert 50 < missed[3.0] < 160  # erf(1 / 3 sqrt 2) = 26 %
    assert missed[100.0] < 12


def test_several_wrong_elements_of_a_rounded_row_are_promised_little_above_the_floor() -> None:
    """The check reads their energy, over 32 draws: with one sum, as in fp32, it would take 80 times the floor."""
    args = random(8, 32, dtype=torch.bfloat16), random(32, 64, seed=1, dtype=torch.bfloat16)
    out = args[0] @ args[1]
    floor = of(aten.mm.default, args, (), out, out + 1).floor * float(out[3].float().square().mean().sqrt())
    for factor, above, least, most in ((0.5, False, 195, 200), (1.6, True, 0, 2)):
        bad = out.float()
        bad[3] += random(64, seed=5) / random(64, seed=5).norm() * floor * factor
        bad = bad.to(torch.bfloat16)
        assert of(aten.mm.default, args, (), out, bad).above is above
        readings = [reading(gemm.CHECKS, aten.mm.default, args, bad, key) for key in range(200)]
        assert least <= sum(value <= 1 for value in readings) <= most


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 3.0), (torch.bfloat16, 1.2)])
def test_many_rows_that_are_wrong_alike_are_promised_no_more_than_one(dtype: torch.dtype, factor: float) -> None:
    """They meet the same random signs, so all are missed in the same draws: more often than MISSED, however many."""
    args = random(1, 32, dtype=dtype).expand(64, 32).contiguous(), random(32, 64, seed=1, dtype=dtype)
    out = args[0] @ args[1]
    floor = of(aten.mm.default, args, (), out, out + 1).floor * float(out[0].float().square().mean().sqrt())
    bad = (out.float() + random(64, seed=5) / random(64, seed=5).norm() * floor * factor).to(dtype)
    told = of(aten.mm.default, args, (), out, bad)
    assert told.size > told.floor
    assert not told.above
    readings = [reading(gemm.CHECKS, aten.mm.default, args, bad, key) for key in range(200)]
    assert sum(value <= 1 for value in readings) > 4
    bad[9, 1:] = out[9, 1:]  # a row with one wrong element above the floor is seen in every draw
    bad[9, 0] = out[9, 0] + 2 * floor
    assert of(aten.mm.default, args, (), out, bad).above
    assert all(reading(gemm.CHECKS, aten.mm.default, args, bad, key) > 1 for key in range(200))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_nearly_nothing_have_the_checks_own_least_floor(dtype: torch.dtype) -> None:
    """Norms are clamped: what is far below them is no fault that is promised to be seen."""
    args = torch.zeros(8, 8, dtype=dtype), random(8, 8, seed=1, dtype=dtype)
    out = args[0] @ args[1]
    for size, above in ((1e-38, False), (1e-10, True)):
        bad = out.clone()
        bad[3, 3] = size
        assert of(aten.mm.default, args, (), out, bad).above is above
        assert (reading(gemm.CHECKS, aten.mm.default, args, bad, 1) > 1) is above


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_above_every_floor(dtype: torch.dtype) -> None:
    args = random(8, 8, dtype=dtype), random(8, 8, seed=1, dtype=dtype)
    out = args[0] @ args[1]
    for value in (float("nan"), float("inf")):
        bad = out.clone()
        bad[3, 3] = value
        told = of(aten.mm.default, args, (), out, bad)
        assert (told.size, told.above) == (float("inf"), True)
        bad[3, 3] = out[3, 3] + 64
        assert told.floor == pytest.approx(of(aten.mm.default, args, (), out, bad).floor)  # it is the row's


def test_masked_scores_are_no_difference() -> None:
    out = random(4, 6)
    out[:, 4:] = float("-inf")
    bad = out.clone()
    bad[2, 1] += 0.5
    told = of(aten.add_.Tensor, (out,), (), out, bad)
    assert told.size == pytest.approx(0.5 / float((out[2, :4].square().sum() / 6).sqrt()), rel=0.01)
    assert told.above


def test_without_a_check_there_is_no_floor() -> None:
    out = random(4, 4)
    told = of(aten.bernoulli.default, (out,), (), out, out + 1)  # random: nobody can say what it should be
    assert (told.floor, told.above) == (None, None)
    assert told.size > 0
    again = of(aten.celu.default, (out,), (), out, out.nextafter(out + 1))  # run again, and compared bit by bit
    assert (again.floor, again.above) == (0.0, True)
    assert of(aten.mm.default, (out.half(), out.half()), (), out.half(), out.half() + 1).floor is None  # fp16


def test_what_is_hashed_where_it_lies_has_no_floor_to_exceed() -> None:
    out = random(4, 4)
    assert (of(None, (), (), out, out.nextafter(out + 1)).floor, of(None, (), (), out, out + 1).above) == (0.0, True)
    told = of(None, (), (), torch.arange(4).view(2, 2), torch.zeros(2, 2, dtype=torch.int64))
    assert told == Deviation(None, 0.0, True)
    assert not of(None, (), (), out, out.clone()).above


@pytest.mark.parametrize("func", [None, aten.celu.default])
def test_where_every_bit_is_compared_the_worst_row_is_that_of_the_largest_difference(func: Any) -> None:
    out = torch.ones(4, 4)
    bad = out + torch.tensor([[0.0], [1e-3], [2.0], [1e-3]])
    told = of(func, (out,), (), out, bad)
    assert (told.size, told.floor, told.above) == (4.0, 0.0, True)
