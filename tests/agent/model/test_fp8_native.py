"""torch's own product on Hopper, as far as it goes without one: who is chosen, and what `scaled_mm` is handed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import ScalingType, scaled_mm

from agent.model.fp8 import BackendUnavailable, Blocks, Emulation, backend_for
from agent.model.fp8.choose import kind_for
from agent.model.fp8.native import arguments
from agent.model.fp8.triton import Triton


@pytest.mark.parametrize(
    ("device", "capability", "kind"),
    [("cpu", None, "emulation"), ("cuda", (9, 0), "native"), ("cuda", (8, 9), "triton"), ("cuda", (10, 0), "triton")],
)
def test_which_back_end(device: str, capability: tuple[int, int] | None, kind: str) -> None:
    assert kind_for(device, capability) == kind


@pytest.mark.parametrize(("device", "capability", "says"), [("cuda", (8, 0), "8.0"), ("mps", None, "mps")])
def test_no_back_end(device: str, capability: tuple[int, int] | None, says: str) -> None:
    with pytest.raises(BackendUnavailable, match=says):
        kind_for(device, capability)


def test_the_cpu_gets_the_emulation() -> None:
    assert isinstance(backend_for(torch.device("cpu")), Emulation)


@pytest.mark.parametrize(("rows", "columns", "k"), [(70, 256, 200), (128, 128, 128), (33, 384, 1000)])
def test_arguments_are_laid_as_torch_asks(rows: int, columns: int, k: int) -> None:
    """Shapes and strides of torch 2.13, aten/native/cuda/ScaledBlas.cpp; its meta kernel asks for the same."""
    x, weight, triton = torch.randn(rows, k), torch.randn(columns, k), Triton()
    left, right = triton.along_rows(x), triton.tiles(weight)
    for other, recipe in (
        (right, ScalingType.BlockWise128x128),
        (triton.along_rows(weight), ScalingType.BlockWise1x128),
    ):
        given = arguments(left, other)
        m, padded = given["mat_a"].shape
        blocks = -(-k // 128)
        assert (m % 16, padded) == (0, 128 * blocks)
        assert given["mat_b"].stride() == (1, padded)
        assert given["scale_a"].shape == (m, blocks)
        assert given["scale_a"].stride() == (1, m)
        assert given["scale_recipe_b"] == recipe
        assert (given["output_dtype"], given["use_fast_accum"]) == (torch.float32, False)
        meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        made = scaled_mm(**meta)
        assert (made.shape, made.dtype) == ((m, columns), torch.float32)


def test_torch_refuses_scales_laid_out_otherwise() -> None:
    """The control: the meta kernel does look."""
    triton = Triton()
    given = arguments(triton.along_rows(torch.randn(64, 256)), triton.tiles(torch.randn(128, 256)))
    given["scale_a"] = given["scale_a"].contiguous()
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    with pytest.raises(RuntimeError, match="scale a must have shape"):
        scaled_mm(**meta)


def test_what_is_padded_adds_nothing() -> None:
    triton = Triton()
    left, right = triton.along_rows(torch.randn(5, 130)), triton.tiles(torch.randn(20, 130))
    given = arguments(left, right)
    whole = given["mat_a"].double() @ given["mat_b"].double()  # E4M3 products are exact in float64, in any order
    assert torch.equal(whole[:5, :20], left.values.double() @ right.values.double().t())
    assert not whole[5:].any()
    assert not whole[:, 20:].any()


def test_rows_with_scales_of_their_own_have_no_transpose() -> None:
    with pytest.raises(ValueError, match="height"):
        Blocks(torch.zeros(2, 128).to(torch.float8_e4m3fn), torch.ones(2, 1), 1).t()
