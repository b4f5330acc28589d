"""The emulation rounds as E4M3 does, bit for bit: against torch's cast in float64 arithmetic, for any block."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model.fp8 import Emulation, Recipe, Tally, read, summarise
from agent.model.fp8.emulation import quantised

BOTH = (Recipe(), Recipe(power_of_two=False))
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**99), max_value=2.0**99)


def reference(x: Tensor, height: int, width: int, recipe: Recipe) -> Tensor:
    """Block by block: the scale's formula, torch's cast to E4M3, and float64 for what the codes stand for."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            block = x[i : i + height, j : j + width].float()
            scale = max(block.abs().amax(), torch.tensor(1e-4)) / torch.tensor(448.0)
            if recipe.power_of_two:
                scale = torch.tensor(2.0 ** math.ceil(math.log2(float(scale))))
            codes = (block.double() / scale.double()).float().to(torch.float8_e4m3fn)
            out[i : i + height, j : j + width] = codes.double() * scale.double()
    return out


def skewed(rows: int, k: int, seed: int) -> Tensor:
    """Normal values over many magnitudes, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.exp(4 * torch.randn(rows, k, generator=generator))
    return x * (torch.rand(rows, k, generator=generator) < 0.9)


@pytest.mark.parametrize("recipe", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (130, 256), (257, 300), (64, 96), (128, 129)])
def test_every_direction_is_the_reference(shape: tuple[int, int], dtype: torch.dtype, recipe: Recipe) -> None:
    x = skewed(*shape, seed=shape[1]).to(dtype)
    backend = Emulation(recipe)
    for found, height, width in (
        (backend.along_rows(x).dequantised(), 1, 128),
        (backend.along_columns(x).dequantised().t(), 128, 1),
        (backend.tiles(x).dequantised(), 128, 128),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, reference(x, height, width, recipe).float(), rtol=0, atol=0)


@settings(deadline=None, max_examples=150)
@given(st.lists(FLOATS, min_size=1, max_size=40), st.booleans())
@example([0.0, -0.0], True)
@example([1e-45, 2.0**-149, -1e-40], True)  # subnormal in fp32
@example([448.0, 449.0, 432.0, 416.0, 1.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10], True)  # ties of all kinds
@example([0.0001, 0.00010000001, 1e-5], False)  # around the least amax
def test_any_block_is_the_reference(values: list[float], power_of_two: bool) -> None:
    x, recipe = torch.tensor([values]), Recipe(power_of_two)
    found = quantised(x, 1, 128, recipe)
    torch.testing.assert_close(found, reference(x, 1, 128, recipe).float(), rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_with_power_of_two_scales_values_are_exact_in_bf16_and_stable(values: list[float]) -> None:
    once = quantised(torch.tensor([values]), 1, 128, Recipe())
    assert torch.equal(once, once.to(torch.bfloat16).float())
    assert torch.equal(once, quantised(once, 1, 128, Recipe()))


def test_any_strides() -> None:
    x = skewed(130, 260, 2)
    for view in (x.t(), x[:, ::2], x[:1].expand(7, 260)):
        assert torch.equal(quantised(view, 1, 128, Recipe()), quantised(view.clone().contiguous(), 1, 128, Recipe()))


def test_with_other_scales_they_are_not() -> None:
    """The control: these need fp32 products."""
    once = quantised(skewed(4, 128, 1), 1, 128, Recipe(power_of_two=False))
    assert not torch.equal(once, once.to(torch.bfloat16).float())


@pytest.mark.parametrize("recipe", BOTH)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**100])
def test_what_is_not_finite_spoils_its_block_and_no_other(bad: float, recipe: Recipe) -> None:
    x = skewed(2, 256, 5)
    clean = quantised(x, 1, 128, recipe)
    x[1, 200] = bad
    found = quantised(x, 1, 128, recipe)
    assert found[1, 128:].isnan().all()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1, :128], clean[1, :128])


def test_the_scale_floor() -> None:
    assert float(Recipe(power_of_two=False).scales(torch.zeros(1))) == pytest.approx(1e-4 / 448)
    assert float(Recipe().scales(torch.tensor([448.0]))) == 1.0
    assert float(Recipe().scales(torch.tensor([448.1]))) == 2.0


def test_the_tally_counts_what_happened() -> None:
    x = torch.zeros(2, 128)
    x[0, :4] = torch.tensor([448.0, -440.0, 2.0**-11, 1.0])  # scale 1: two saturate, one vanishes
    x[1, 0] = 3.0
    tally = Tally("activation", "fprop")
    Emulation().along_rows(x, tally)
    (found,) = summarise(read([("here", tally)]))
    assert (found.amax, found.saturation, found.underflow) == (448.0, 2 / 256, 1 / 5)
    tally.clear()
    assert summarise(read([("here", tally)])) == ()


def test_shapes_without_elements() -> None:
    assert Emulation().along_rows(torch.zeros(0, 256)).dequantised().shape == (0, 256)
    assert Emulation().along_columns(torch.zeros(0, 256)).dequantised().shape == (256, 0)
