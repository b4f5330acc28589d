"""One token repeated, padding rows: roundings that are alike raise no alarm, and a fault among them still does."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import CpuBench, with_result, worst
from torch import Tensor

from diagnostics.sensors.checks import gemm, rows, sums
from diagnostics.sensors.checks.gemm import row_readings
from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.rows import combined
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import shipped_table

CPU = torch.device("cpu")
aten = torch.ops.aten


def alike(m: int, k: int, n: int, seed: int, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient [m, k] and activations [k, n] of k tokens that are all the same, and their product."""
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, 1, generator=g).expand(m, k), torch.randn(1, n, generator=g).expand(k, n).contiguous()
    left = left.mT.contiguous().mT if turned else left.contiguous()
    return left, right, left @ right


def read(c: Tensor, left: Tensor, right: Tensor, key: int = 0) -> Tensor:
    kappa = shipped_table().kappa("cpu", str(c.dtype).removeprefix("torch."))
    return row_readings(c, Operand(left), Operand(right), Signs(key, CPU), kappa)


def worst_of_keys(left: Tensor, right: Tensor, c: Tensor) -> float:
    return max(float(read(c, left, right, key).amax()) for key in range(8))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("k", [128, 257, 2048])
def test_products_of_equal_tokens_are_quiet(k: int, turned: bool) -> None:
    left, right, c = alike(512, k, 256, k, turned)
    assert worst_of_keys(left, right, c) <= 0.5


def test_without_the_term_for_equal_terms_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    left, right, c = alike(512, 128, 256, 128, True)
    monkeypatch.setattr(gemm, "ALIKE", 0.0)
    assert worst_of_keys(left, right, c) > 0.5


def test_a_long_sum_is_good_to_what_a_short_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, matrix = torch.full((8192,), 1.234), torch.full((8192, 16), 0.7391)
    exact = 8192 * float(weights[0].double() * matrix[0, 0].double())

    def error() -> float:
        return float((combined(weights, matrix).double() - exact).abs().max()) / exact

    assert error() < 64 * torch.finfo(torch.float32).eps
    monkeypatch.setattr(rows, "_PART", 1 << 30)
    assert error() > 64 * torch.finfo(torch.float32).eps  # the control: BLAS adds one by one


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e38, 1e25, 10.0])
def test_a_wrong_element_widens_its_tolerance_by_nothing_of_note(wrong: float) -> None:
    left, right, c = alike(64, 128, 96, 1, True)
    c[3, 5] = wrong
    readings = read(c, left, right)
    assert not readings[3] <= 1
    assert bool((torch.cat((readings[:3], readings[4:])) <= 1).all())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 9), st.sampled_from([(), (2,), (2, 3)]), st.integers(0, 2**32))
def test_a_sum_in_parts_is_the_sum(n: int, d: int, batch: tuple[int, ...], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weights, matrix = torch.randn(*batch, n, generator=g), torch.randn(*batch, n, d, generator=g)
    exact = (weights.double().unsqueeze(-1) * matrix.double()).sum(-2)
    size = (weights.double().unsqueeze(-1) * matrix.double()).abs().sum(-2)
    found = combined(weights, matrix)
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= 1e-5 * size).all())


def test_rows_of_zeros_beside_the_tokens_change_no_reading_in_bf16() -> None:
    """An expert's three tokens among 64 places. They are alike, and their gradients cancel: W S is rounded alike."""
    g = torch.Generator().manual_seed(0)
    tokens = (torch.randn(1, 128, generator=g) * (1 + 0.02 * torch.randn(3, 128, generator=g))).bfloat16()
    grads = torch.randn(128, 1, generator=g) * torch.tensor([[-0.48, 0.82, -0.37]]) + 0.01 * torch.randn(
        128, 3, generator=g
    )
    few = grads.bfloat16(), tokens
    many = F.pad(few[0], (0, 61)), F.pad(few[1], (0, 0, 0, 61))
    for key in range(20):
        padded, plain = (read(left @ right, left, right, key) for left, right in (many, few))
        assert float(padded.amax()) <= 0.75
        assert torch.allclose(padded, plain, rtol=0.05)


@pytest.mark.parametrize(("count", "seen"), [(100, 0.5), (5000, 4.0)])
def test_a_token_that_comes_many_times_is_quiet_in_its_embedding(
    count: int, seen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """seen: how much is, in rows that were added; of 5,000 equal ones the sum itself is good to one or so."""
    g = torch.Generator().manual_seed(count)
    rows, index = torch.randn(1, 64, generator=g).expand(count, 64).contiguous(), torch.zeros(count, dtype=torch.long)
    out = aten.embedding_dense_backward(rows, index, 4, -1, False)
    call = Call(aten.embedding_dense_backward.default, (rows, index, 4, -1, False), {}, out)
    assert max(worst(sums.CHECKS, call, CpuBench(key)) for key in range(8)) <= 0.5
    whole = out.clone()
    out[0, 7] += seen * float(rows[0].norm())
    assert all(worst(sums.CHECKS, call, CpuBench(key)) > 1 for key in range(8))
    monkeypatch.setattr(sums, "_EACH", 0.0)  # the control
    bare = max(worst(sums.CHECKS, with_result(call, whole), CpuBench(key)) for key in range(8))
    assert bare > 0.5 or count == 100
