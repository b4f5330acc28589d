"""Quantising with its sums under Triton's interpreter: the codes of the FP8 emulation, the sums of float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import quantise
from torch import Tensor

from agent.model.fp8 import Blocks, Emulation, Recipe
from diagnostics.sensors.kernels.quantised import Quantised, Scaling


def skewed(rows: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.exp(3 * torch.randn(rows, k, generator=generator))
    return x * (torch.rand(rows, k, generator=generator) < 0.9)


def signs(n: int, seed: int = 9) -> Tensor:
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def values(made: Quantised) -> Tensor:
    return Blocks(made.codes, made.scales, made.height).dequantised()


def close(ours: Tensor, terms: Tensor, dim: int) -> bool:
    """Within Higham's bound for sums of these float64 terms in any order, the products' own roundings among them."""
    bound = (terms.shape[dim] + 2) * 2.0**-24 * terms.abs().sum(dim)
    return bool(((ours.double() - terms.sum(dim)).abs() <= bound).all())


@settings(max_examples=20)
@given(
    st.integers(1, 150),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_codes_are_the_emulations_and_sums_are_of_their_values(
    rows: int, k: int, dtype: torch.dtype, tiled: bool, power_of_two: bool, turned: bool, seed: int
) -> None:
    x = skewed(k, rows, seed).t().to(dtype) if turned else skewed(rows, k, seed).to(dtype)
    emulation = Emulation(Recipe(power_of_two=power_of_two))
    theirs = (emulation.tiles(x) if tiled else emulation.along_rows(x)).dequantised()
    along, down = signs(k), signs(rows, 3)
    made = quantise(x, along, down, tiled, Scaling(power_of_two=power_of_two))
    assert torch.equal(values(made), theirs)
    exact = theirs.double()
    assert made.down is not None
    assert close(made.along, exact * along, 1)
    assert close(made.squares, exact * exact, 1)
    assert close(made.down, exact * down[:, None], 0)
    assert torch.allclose(made.row_norms.double(), exact.norm(dim=1), rtol=1e-5)
    assert float(made.norm) == pytest.approx(float(exact.norm()), rel=1e-5)


def test_the_sums_do_not_change_the_codes() -> None:
    x = skewed(40, 200, 1)
    with_down, without = quantise(x, signs(200), signs(40)), quantise(x, torch.zeros(200))
    assert torch.equal(values(with_down), values(without))
    assert without.down is None
    assert not without.along.any()


@pytest.mark.parametrize("tiled", [False, True])
def test_a_corrupted_input_has_other_sums(tiled: bool) -> None:
    """The control: one value a quarter larger moves its row's sums and its column's, and no other row's by 1x128."""
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    x[7, 150] = 2.0
    bad = x.clone()
    bad[7, 150] = 2.5
    clean, wrong = (quantise(each, signs(200), signs(40), tiled) for each in (x, bad))
    assert clean.down is not None
    assert wrong.down is not None
    for ours, theirs, at in ((clean.along, wrong.along, 7), (clean.squares, wrong.squares, 7)):
        assert (ours != theirs).nonzero().flatten().tolist() == [at]
    assert (clean.down != wrong.down).nonzero().flatten().tolist() == [150]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**100])
def test_what_is_not_finite_makes_its_sums_nan(value: float) -> None:
    x = torch.ones(20, 130)
    x[3, 129] = value
    made = quantise(x, signs(130), signs(20))
    assert made.down is not None
    assert made.along.isnan().nonzero().flatten().tolist() == [3]
    assert made.squares.isnan().nonzero().flatten().tolist() == [3]
    assert made.down.isnan().nonzero().flatten().tolist() == [128, 129]


def test_nothing_is_quantised_to_nothing() -> None:
    made = quantise(torch.empty(0, 5), signs(5), signs(0))
    assert made.codes.shape == (0, 5)
    assert made.down is not None
    assert made.down.tolist() == [0.0] * 5
    assert quantise(torch.empty(3, 0), signs(0)).squares.tolist() == [0.0] * 3


def test_vectors_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="along has shape"):
        quantise(torch.ones(2, 3), signs(2))
    with pytest.raises(ValueError, match="down has shape"):
        quantise(torch.ones(2, 3), signs(3), signs(3))
