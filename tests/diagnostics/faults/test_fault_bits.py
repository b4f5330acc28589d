"""Bits of values: what is flipped comes back, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.faults.bits import UnknownModel, carried, flipped, integers, width_of

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8]


@given(st.sampled_from(TYPES), st.integers(0, 63), st.integers(0, 2**31))
def test_a_flip_changes_one_bit_and_flipping_again_undoes_it(dtype: torch.dtype, bit: int, seed: int) -> None:
    bit %= width_of(dtype)
    values = (torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)
    bad = flipped(values, 1 << bit)
    width = 8 * dtype.itemsize
    changed = integers(values) ^ integers(bad)
    assert {int(word) & (1 << width) - 1 for word in changed.flatten()} == {1 << bit}
    assert torch.equal(integers(flipped(bad, 1 << bit)), integers(values))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([-1, 1]))
def test_a_carry_is_the_neighbouring_value(value: float, amount: int) -> None:
    one = torch.tensor([value])
    if value != 0:  # below zero's bits are those of a NaN
        towards = torch.tensor([math.copysign(math.inf, value) if amount > 0 else 0.0])
        assert torch.equal(carried(one, amount), torch.nextafter(one, towards))


def test_a_bool_has_one_bit() -> None:
    assert width_of(torch.bool) == 1
    assert flipped(torch.tensor([True, False]), 1).tolist() == [False, True]


def test_types_without_a_model_are_refused() -> None:
    with pytest.raises(UnknownModel, match="float8_e4m3fn"):
        integers(torch.zeros(1).to(torch.float8_e4m3fn))
    with pytest.raises(UnknownModel, match="float8_e4m3fn"):
        width_of(torch.float8_e4m3fn)
