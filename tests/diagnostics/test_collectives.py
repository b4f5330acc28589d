"""Sums over ranks under a linear checksum: clean ones read low in any order, changes above the floor alarm."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diagnostics.sensors.collectives import (
    BLOCK,
    TOTAL,
    Weights,
    checksums,
    piece_hash,
    reduction_readings,
    visible,
)

SIZES = [1, 2, 17, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


def parts_of(ranks: int, size: int, seed: int, scale: float = 1.0, alike: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1 if alike else ranks, size, generator=generator).mul_(scale)
    return values.expand(ranks, size).contiguous()


def summed(parts: Tensor, seed: int = 0) -> Tensor:
    """In fp32, one after another, in an order of the seed's."""
    order = torch.randperm(parts.shape[0], generator=torch.Generator().manual_seed(seed)).tolist()
    total = parts[order[0]].clone()
    for rank in order[1:]:
        total += parts[rank]
    return total


def reading(parts: Tensor, total: Tensor, key: int = 1) -> float:
    weights = Weights(key)
    given = torch.stack([checksums([part], weights) for part in parts])
    return float(reduction_readings(given, checksums([total], weights)[:, TOTAL]))


@given(
    st.integers(2, 9),
    st.sampled_from(SIZES),
    st.integers(0, 2**31),
    st.sampled_from([1.0, 1e4, 1e-4, 1e-20, 1e-38, 0.0]),
    st.booleans(),
)
def test_a_clean_sum_never_alarms(ranks: int, size: int, seed: int, scale: float, alike: bool) -> None:
    parts = parts_of(ranks, size, seed, scale, alike)
    assert reading(parts, summed(parts, seed), seed) <= 0.6


def test_nothing_to_sum_reads_nothing() -> None:
    assert checksums([], Weights(1)).shape == (0, 2)
    assert reading(torch.zeros(2, 0), torch.zeros(0)) == 0.0


@given(st.integers(2, 8), st.sampled_from(SIZES), st.integers(0, 2**31), st.sampled_from([-2.0, 1.5, 40.0]))
def test_one_element_that_changed_by_more_than_the_floor_alarms(
    ranks: int, size: int, seed: int, floors: float
) -> None:
    parts = parts_of(ranks, size, seed)
    total = summed(parts, seed)
    norm = sum(float(part.norm()) for part in parts) / ranks  # of a part; its rms where all are alike
    total[seed % size] += floors * visible(ranks, size) * norm / math.sqrt(size)
    assert not reading(parts, total, seed) <= 1.0


def test_the_published_floors() -> None:
    assert visible(2, 1 << 20) == pytest.approx(1.4e-3, rel=0.02)
    assert visible(8, 1 << 20) == pytest.approx(1.5e-2, rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sum_that_is_not_finite_alarms_unless_a_part_is_not(bad: float) -> None:
    parts = parts_of(3, 5000, 1)
    total = summed(parts)
    total[77] = bad
    assert not reading(parts, total) <= 1.0
    parts[1, 77] = bad
    assert reading(parts, total) == 0.0


def structured(kind: str, total: Tensor, start: int) -> None:
    """Wrong in the shapes that real faults have."""
    if kind == "run of four":
        total[start : start + 4] *= 1.5
    elif kind == "period":
        total[start::4096] += 1.0
    elif kind == "stuck lane":
        total.view(-1, 16)[:, start % 16] = 0.0
    else:
        total[start : start + 1024] = total[start + 1024 : start + 2048].clone()


@pytest.mark.parametrize("kind", ["run of four", "period", "stuck lane", "wrong tile"])
def test_structured_faults_alarm(kind: str) -> None:
    for seed in range(20):
        parts = parts_of(2, 4 * BLOCK, seed)
        total = summed(parts)
        structured(kind, total, 100 * seed)
        assert not reading(parts, total, seed) <= 1.0, (kind, seed)


def missed(keys: range, first: int, second: int, total: Tensor, parts: Tensor) -> int:
    changed = total.clone()
    changed[first] += 3.0
    changed[second] -= 3.0
    return sum(reading(parts, changed, key) <= 1.0 for key in keys)


@pytest.mark.parametrize(("first", "second"), [(3, 4), (3, 3 + BLOCK), (3, 3 + 2 * BLOCK), (100, 2 * BLOCK + 7)])
def test_equal_and_opposite_faults_seldom_cancel(first: int, second: int) -> None:
    """Of about 5,000 tau each: they do where two weights differ by 1/5,000."""
    parts = parts_of(2, 3 * BLOCK, 5)
    assert missed(range(64), first, second, summed(parts), parts) <= 1


def test_with_equal_weights_they_always_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(Weights, "of", lambda self, block, size: torch.ones(size, dtype=torch.float64))
    parts = parts_of(2, 3 * BLOCK, 5)
    assert missed(range(8), 3, 4 + BLOCK, summed(parts), parts) == 8


def test_all_ranks_draw_the_same_weights_and_each_key_others() -> None:
    one, again, other = (Weights(key).of(3, BLOCK) for key in (7, 7, 8))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert 0.75 <= float(one.abs().min()) < float(one.abs().max()) <= 1.25
    assert abs(float(one.mean())) < 0.03


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
