"""The Triton kernels under Triton's interpreter: equal codes and scales, products within fp32 rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model.fp8 import Blocks, Emulation, Recipe, Tally, read
from agent.model.fp8.triton import Triton

BOTH = (Recipe(), Recipe(power_of_two=False))


def skewed(rows: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.exp(4 * torch.randn(rows, k, generator=generator))
    return x * (torch.rand(rows, k, generator=generator) < 0.9)


def quantised(backend: Emulation | Triton, x: Tensor) -> list[Tensor]:
    return [made.dequantised() for made in (backend.along_rows(x), backend.along_columns(x), backend.tiles(x))]


@pytest.mark.parametrize("recipe", BOTH)
@pytest.mark.parametrize("shape", [(1, 1), (17, 300), (130, 128), (40, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_as_the_emulation_does(shape: tuple[int, int], dtype: torch.dtype, recipe: Recipe) -> None:
    x = skewed(*shape).to(dtype)
    for ours, theirs in zip(quantised(Triton(recipe), x), quantised(Emulation(recipe), x), strict=True):
        assert torch.equal(ours, theirs)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(width=32), min_size=1, max_size=150))
def test_any_values(values: list[float]) -> None:
    """NaN, infinities, subnormals and what is too large among them."""
    x = torch.tensor([values])
    ours, theirs = Triton().along_rows(x).dequantised(), Emulation().along_rows(x).dequantised()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_the_same_statistics() -> None:
    x = skewed(40, 200)
    ours, theirs = Tally("a", "fprop"), Tally("a", "fprop")
    Triton().tiles(x, ours)
    Emulation().tiles(x, theirs)
    Triton().along_rows(x, ours)
    Emulation().along_rows(x, theirs)
    assert read([("here", ours)]) == read([("here", theirs)])


def operands(backend: Emulation | Triton) -> list[tuple[Blocks, Blocks]]:
    """Those of fprop, dgrad and wgrad of a linear [70, 200] -> [70, 150]."""
    x, weight, grad = skewed(70, 200, 1), skewed(150, 200, 2), skewed(70, 150, 3)
    tiles = backend.tiles(weight)
    return [
        (backend.along_rows(x), tiles),
        (backend.along_rows(grad), tiles.t()),
        (backend.along_columns(grad), backend.along_columns(x)),
    ]


@pytest.mark.parametrize("recipe", BOTH)
def test_products_agree_with_the_emulation_and_with_float64(recipe: Recipe) -> None:
    triton, emulation = Triton(recipe), Emulation(recipe)
    for ours, theirs in zip(operands(triton), operands(emulation), strict=True):
        left, right = (part.dequantised().double() for part in ours)
        true, size = left @ right.t(), left.abs() @ right.abs().t()
        for made in (triton.product(*ours), emulation.product(*theirs)):
            assert made.dtype == torch.float32
            # Sums of up to 200 terms in any order: 2^-24 a term is Higham's bound for recursive summation.
            assert bool(((made.double() - true).abs() <= 200 * 2.0**-24 * size).all())


def test_a_product_without_its_scales_is_another() -> None:
    """The control: the bound above is not met by anything."""
    left, right = operands(Triton())[0]
    assert left.scales is not None
    spoilt = Blocks(left.values, left.scales * 1.01, left.height)
    made, wrong = Triton().product(left, right), Triton().product(spoilt, right)
    assert float((made - wrong).norm() / made.norm()) > 1e-3
