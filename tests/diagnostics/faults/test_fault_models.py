"""Fault models: each changes what it says and nothing else, the same for the same seed, whatever the result's shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diagnostics.faults.bits import UnknownModel, integers
from diagnostics.faults.models import MODELS, OF_INDICES, OF_ROWS, Damage, Fault, damage, models_for
from diagnostics.faults.places import PERIODS, RUN, TILE

FLOATING = [torch.float32, torch.bfloat16]


def clean(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values * 50).to(dtype) if not dtype.is_floating_point else values.to(dtype)


def struck(values: Tensor, fault: Fault) -> tuple[Tensor, Damage]:
    bad = values.clone()
    return bad, damage(bad, fault)


def places(changed: Tensor) -> tuple[list[int], list[int]]:
    """Rows and columns of a plane in which anything changed."""
    return changed.any(1).nonzero().flatten().tolist(), changed.any(0).nonzero().flatten().tolist()


@given(
    st.sampled_from(MODELS),
    st.integers(0, 2**40),
    st.lists(st.integers(1, 20), min_size=0, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_the_damage_is_all_there_is(model: str, seed: int, shape: list[int], dtype: torch.dtype) -> None:
    rows = shape[-2] if len(shape) > 1 else 1
    if model not in models_for(dtype, rows):
        return
    values = clean(tuple(shape), dtype, seed)
    bad, told = struck(values, Fault(model, seed, 2.0))
    again, _ = struck(values, Fault(model, seed, 2.0))
    assert torch.equal(integers(bad), integers(again))  # by the seed alone
    plane = bad
    while plane.dim() < 2:
        plane = plane.unsqueeze(0)
    assert torch.equal(integers(plane[told.plane]), integers(told.after))
    plane[told.plane] = told.before
    assert torch.equal(integers(bad), integers(values))  # with the plane put back nothing is left


@given(st.integers(0, 31), st.integers(0, 2**40))
def test_bitflip_flips_the_bit_it_was_given(bit: int, seed: int) -> None:
    _, told = struck(clean((6, 7)), Fault("bitflip", seed, bit=bit))
    words = (integers(told.before) ^ integers(told.after)).flatten()
    assert [int(word) & 0xFFFFFFFF for word in words if word] == [1 << bit]
    assert told.bit == bit
    assert int(told.changed.sum()) == 1


def test_bits_are_drawn_uniformly_over_the_width() -> None:
    values = clean((4, 4), torch.bfloat16)
    counts = torch.zeros(16)
    for seed in range(1600):
        counts[struck(values, Fault("bitflip", seed))[1].bit] += 1
    assert float(counts.min()) > 60  # of 100 each: a binomial's 4 sigma
    assert float(counts.max()) < 140


def test_multibit_flips_several_bits_of_one_value() -> None:
    for seed in range(50):
        _, told = struck(clean((6, 7)), Fault("multibit", seed))
        (word,) = (int(w) & 0xFFFFFFFF for w in (integers(told.before) ^ integers(told.after)).flatten() if w)
        assert 2 <= word.bit_count() <= 8


@pytest.mark.parametrize("dtype", FLOATING)
def test_regions_are_as_named(dtype: torch.dtype) -> None:
    values = clean((70, 90), dtype)
    for seed in range(12):
        rows, columns = places(struck(values, Fault("row", seed, 3.0))[1].changed)
        assert (len(rows), len(columns) > 80) == (1, True)
        rows, columns = places(struck(values, Fault("column", seed, 3.0))[1].changed)
        assert (len(rows) > 60, len(columns)) == (True, 1)
        rows, columns = places(struck(values, Fault("tile", seed, 3.0))[1].changed)
        assert rows[-1] - rows[0] < TILE
        assert columns[-1] - columns[0] < TILE
        rows, columns = places(struck(values, Fault("stuck", seed, 3.0))[1].changed)
        assert {later - first for first, later in itertools.pairwise(columns)} == {TILE}
        assert len(rows) == 70
        for one in ("value", "scaled"):
            assert int(struck(values, Fault(one, seed, 3.0))[1].changed.sum()) == 1


def test_runs_of_four_repeat_along_both_axes() -> None:
    seen = set()
    for seed in range(40):
        rows, columns = places(struck(clean((200, 200)), Fault("runs", seed, 3.0))[1].changed)
        period = rows[1] - rows[0]
        assert set(torch.tensor(rows).diff().tolist()) == {period}
        inside = [column for column in columns if column + RUN <= 200]
        assert {(column - columns[0]) % period for column in inside} <= set(range(RUN))
        seen.add(period)
    assert seen == set(PERIODS)


def test_strength_is_in_units_of_the_rms() -> None:
    values = clean((64, 64)) * 5
    _, told = struck(values, Fault("tile", 3, 0.01))
    noise = (told.after - told.before)[told.changed]
    assert float(noise.square().mean().sqrt()) == pytest.approx(0.01 * 5, rel=0.2)
    _, told = struck(values, Fault("scaled", 3, 0.25))
    factor = float((told.after / told.before)[told.changed])
    assert factor == pytest.approx(1.25, rel=1e-5) or factor == pytest.approx(0.75, rel=1e-5)


def test_tokens_are_lost_or_change_places() -> None:
    values = clean((9, 4))
    bad, told = struck(values, Fault("lost", 1))
    (row,) = places(told.changed)[0]
    assert not bad[row].any()
    bad, told = struck(values, Fault("misdirected", 1))
    first, second = places(told.changed)[0]
    assert torch.equal(bad[first], values[second])
    assert torch.equal(bad[second], values[first])


def test_an_index_becomes_another_valid_one() -> None:
    values = torch.arange(12).view(3, 4)
    for seed in range(30):
        bad, told = struck(values, Fault("index", seed))
        assert int(told.changed.sum()) == 1
        assert 0 <= int(bad.min()) <= int(bad.max()) < 12


def test_a_place_can_be_given() -> None:
    for at in range(24):
        bad = torch.zeros(2, 3, 4)
        damage(bad, Fault("bitflip", 5, bit=23), at)
        assert bad.flatten().nonzero().flatten().tolist() == [at]


def test_views_with_strides_are_struck_in_place() -> None:
    whole = torch.zeros(8, 10)
    damage(whole.t()[2:5], Fault("bitflip", 1, bit=30))
    assert int((whole != 0).sum()) == 1
    assert bool(whole[:, 2:5].any())


def test_complex_values_are_pairs() -> None:
    values = torch.zeros(3, 5, dtype=torch.complex64)
    told = damage(values, Fault("bitflip", 2, bit=30))
    assert told.before.shape == (5, 2)
    assert int((torch.view_as_real(values) != 0).sum()) == 1


def test_models_fit_types() -> None:
    assert models_for(torch.bool, 4) == ("bitflip",)
    assert not set(models_for(torch.float32, 4)) & set(OF_INDICES)
    assert not set(models_for(torch.float32, 1)) & set(OF_ROWS)
    assert set(models_for(torch.int64, 4)) >= {"index", "carry", "lost"}


@pytest.mark.parametrize(
    ("fault", "names"), [(Fault("zap", 1), "model is 'zap'"), (Fault("bitflip", 1, bit=32), "bit is 32")]
)
def test_senseless_faults_are_refused(fault: Fault, names: str) -> None:
    with pytest.raises(UnknownModel, match=names):
        damage(torch.zeros(2, 2), fault)
