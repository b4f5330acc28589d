"""How constants follow from clean readings: they grow as far as needed, never fall below a floor, and have an end."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.calibration.rules import (
    DTYPES,
    EXACT_SHARE,
    LEAST_ACCUMULATE,
    MOST_ROUNDINGS,
    ROUNDED_SHARE,
    RULES,
    SHARE,
    Constant,
    Least,
    Rounding,
    Rule,
    rounded_once,
    up,
)
from diagnostics.sensors.tolerance import shipped_table

SIXTEEN = (torch.bfloat16, torch.float16)


@given(st.floats(1e-12, 1e3))
def test_constants_are_rounded_up_to_three_digits(value: float) -> None:
    assert value <= up(value) <= value * 1.0101
    assert float(f"{up(value):.2e}") == up(value)
    assert up(up(value)) == up(value)


def test_one_rounding_is_what_it_is_in_every_type() -> None:
    """The theory against rounding itself, in rows that are long enough to average over mantissas."""
    x = torch.randn(200, 2000, generator=torch.Generator().manual_seed(1))
    for dtype in SIXTEEN:
        found = ((x.to(dtype).float() - x).norm(dim=1) / x.norm(dim=1)).square().mean().sqrt()
        assert 0.95 < float(found) / rounded_once(dtype) < 1.05
    assert rounded_once(torch.float32) == 0.0


def proportional(noise: float) -> float:
    """The constant that is settled on where a reading is the noise over the constant."""
    constant = Constant.floor(RULES["mm"], torch.float32, 0.0, "cuda")
    while constant.admit(noise / constant.accumulate):
        pass
    assert not constant.refused
    assert noise / constant.accumulate <= constant.share
    return constant.accumulate


@given(st.floats(1e-12, 4e-5), st.floats(1.0, 10.0))
def test_a_constant_settles_at_the_noise_over_the_share_or_at_its_floor(noise: float, times: float) -> None:
    found = proportional(noise)
    assert found == LEAST_ACCUMULATE or found <= noise / SHARE * 1.05
    if noise * times <= 4e-5:
        assert proportional(noise * times) >= found


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_roundings_begin_at_the_theory_and_end_at_eight_of_them(dtype: torch.dtype) -> None:
    constant = Constant.floor(Rule(Rounding.OFTEN), dtype, 3e-7, "cuda")
    assert constant.output == pytest.approx(rounded_once(dtype), rel=0.01)
    assert constant.admit(2.0)
    assert constant.output == pytest.approx(4 * rounded_once(dtype), rel=0.02)
    assert constant.accumulate == 3e-7
    assert not constant.admit(2.0)
    assert "no rounding needs more" in constant.refused


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reading_that_is_no_number_gives_no_constant(bad: float) -> None:
    constant = Constant.floor(RULES["mm"], torch.float32, 0.0, "cpu")
    assert not constant.admit(bad)
    assert "finite result" in constant.refused


def test_what_needs_no_more_than_the_ceiling_is_refused_beyond_it_only() -> None:
    for kernel, reading in (("mm", 400.0), ("fp8", 2000.0)):  # FP8's sums are cut off to 14 bits, and may drift
        constant = Constant.floor(RULES[kernel], torch.float32, 0.0, "cuda")
        assert constant.admit(reading)
        assert constant.accumulate == pytest.approx(reading * 2e-7)
        assert not constant.admit(1.0 if kernel == "mm" else 1.5)
        assert "accumulate" in constant.refused


def test_no_shipped_constant_is_one_that_calibration_refuses() -> None:
    for (_, dtype, kernel), kappa in shipped_table().entries.items():
        assert kappa.accumulate <= RULES[kernel].most
        assert kappa.output <= MOST_ROUNDINGS * rounded_once(DTYPES[dtype])


def test_what_other_machines_needed_is_kept_where_it_holds() -> None:
    rule = Rule(Rounding.OFTEN, Least("somewhere", 0.0048, 3e-7))
    assert Constant.floor(rule, torch.bfloat16, 0.0, "cpu").output == 0.0048
    assert Constant.floor(rule, torch.bfloat16, 0.0, "cuda").output == up(rounded_once(torch.bfloat16))
    assert Constant.floor(rule, torch.float16, 0.0, "cpu").output == up(rounded_once(torch.float16))
    assert Constant.floor(rule, torch.float32, 0.0, "cpu").output == 0.0
    accumulate = [Constant.floor(rule, torch.float32, 0.0, device).accumulate for device in ("cpu", "cuda")]
    assert accumulate == [3e-7, LEAST_ACCUMULATE]
    of_gpus = Rule(Rounding.ONCE, Least("somewhere", 0.0048), on_gpu=Least("rounds twice", 0.0023))
    assert Constant.floor(of_gpus, torch.bfloat16, 0.0, "cuda").output == 0.0023
    assert Constant.floor(of_gpus, torch.bfloat16, 0.0, "cpu").output == 0.0048


def test_rooms_are_by_kind_of_rounding() -> None:
    share = {rounding: Constant.floor(Rule(rounding), torch.bfloat16, 0.0, "cpu").share for rounding in Rounding}
    assert share[Rounding.ONCE] == ROUNDED_SHARE
    assert share[Rounding.EXACT] == EXACT_SHARE
    assert share[Rounding.OFTEN] == share[Rounding.ITSELF] == SHARE
    assert {Constant.floor(Rule(rounding), torch.float32, 0.0, "cpu").share for rounding in Rounding} == {SHARE}
