"""What ranks hand each other: a hash tells any change of a piece, adding again any change of a sum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diagnostics.sensors.collectives import add_up, piece_hash
from diagnostics.sensors.collectives import adds_up as adds_up_into


def parts_of(ranks: int, size: int, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(ranks, size, generator=generator).mul_(scale))


def summed(parts: list[Tensor]) -> Tensor:
    total = torch.empty_like(parts[0])
    add_up(parts, total)
    return total


def adds_up(parts: list[Tensor], total: Tensor) -> bool:
    return adds_up_into(parts, total, torch.empty_like(total))


SCALES = st.sampled_from([1.0, 1e38, 1e-4, 1e-38, 1e-44, 0.0])


@given(st.integers(2, 9), st.integers(1, 300), st.integers(0, 2**31), SCALES)
def test_a_sum_adds_up_in_rank_order(ranks: int, size: int, seed: int, scale: float) -> None:
    """Wherever it lies in memory, for subnormals and for what overflows."""
    parts = parts_of(ranks, size, seed, scale)
    total = parts[0].clone()
    for part in parts[1:]:
        total = total + part
    assert torch.equal(summed(parts).view(torch.int32), total.view(torch.int32)) or not total.isfinite().all()
    assert adds_up(parts, summed(parts))


@given(st.integers(2, 5), st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 31))
def test_one_bit_of_a_sum_that_changed_is_seen(ranks: int, size: int, seed: int, bit: int) -> None:
    parts = parts_of(ranks, size, seed)
    total = summed(parts)
    total.view(torch.int32)[seed % size] ^= -(2**31) if bit == 31 else 1 << bit
    assert not adds_up(parts, total)


@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 15))
def test_a_lane_that_is_always_wrong_is_not_right_with_itself(size: int, seed: int, lane: int) -> None:
    """Lanes of 16 that the same defect strikes both times; of one element there is no second lane."""
    parts = parts_of(2, size + 16, seed)
    broken = Lane(lane)
    total = torch.empty_like(parts[0])
    with broken:
        add_up(parts, total)
        assert not adds_up(parts, total)
    assert adds_up(parts, summed(parts))


class Lane(torch.overrides.TorchFunctionMode):
    """An adder whose lane gives the wrong least bit: every 16th element of what is added at once."""

    def __init__(self, lane: int) -> None:
        super().__init__()
        self.lane = lane

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        if func is torch.add:
            out.view(torch.int32)[self.lane :: 16] ^= 1
        return out


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sum_that_is_not_finite_adds_up_if_its_parts_are_not(bad: float) -> None:
    parts = parts_of(3, 50, 1)
    total = summed(parts)
    total[7] = bad
    assert not adds_up(parts, total)
    parts[1][7] = bad
    assert adds_up(parts, summed(parts))


def test_which_of_two_nans_a_sum_keeps_does_not_matter() -> None:
    one, other = torch.full((40,), 0x7FC00001, dtype=torch.int32), torch.full((40,), 0x7FC00002, dtype=torch.int32)
    parts = [one.view(torch.float32), other.view(torch.float32)]
    for kept in parts:
        assert adds_up(parts, kept.clone())
    mixed = summed(parts)
    mixed[3] = 0.0
    assert not adds_up(parts, mixed)


def test_zeros_of_another_sign_are_other_bits() -> None:
    assert not adds_up([torch.zeros(20), torch.zeros(20)], -torch.zeros(20))


PIECES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])


@given(st.integers(1, 40), st.integers(1, 9), PIECES, st.integers(0, 2**31), st.integers(0, 2**31))
def test_a_piece_in_which_one_bit_changed_hashes_otherwise(
    rows: int, width: int, dtype: torch.dtype, seed: int, at: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=generator)
    changed = raw.clone()
    changed.view(-1)[at % raw.numel()] ^= 1 << at % 8
    assert piece_hash(raw.view(dtype)) == piece_hash(raw.view(dtype).clone())
    assert piece_hash(raw.view(dtype)) != piece_hash(changed.view(dtype))


def test_a_piece_that_lost_a_row_or_has_them_in_another_order_hashes_otherwise() -> None:
    piece = torch.zeros(6, 32)
    piece[2] = 1.0
    lost, swapped = piece[:-1], piece[[0, 2, 1, 3, 4, 5]]
    assert len({piece_hash(p) for p in (piece, lost, swapped, piece[:0])}) == 4
