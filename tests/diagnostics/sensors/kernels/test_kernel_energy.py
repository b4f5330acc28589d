"""The check of bf16 products in three kernels: the reference's formula, sharp where it says so, and in any layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import CPU, DEVICE
from torch import Tensor

from diagnostics.sensors.checks import rounded
from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.rounded import TAIL, energy_readings
from diagnostics.sensors.checks.signs import PROBES, Signs
from diagnostics.sensors.kernels import energy
from diagnostics.sensors.tolerance import NORM_FLOOR, Z, shipped_table

KAPPA = shipped_table().kappa("cpu", "bfloat16", "mm")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def probes(n: int) -> Tensor:
    return Signs(7, CPU).probes(n, torch.bfloat16)


def readings(c: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    there = (each.to(DEVICE) for each in (c, left, right, probes(c.shape[-1])))
    return energy.readings(*there, KAPPA, alpha, TAIL).cpu()


def formula(c: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """`rounded`, in float64 but for the rounding of W S to bf16."""
    (n, inner), s = (c.shape[-1], left.shape[-1]), probes(c.shape[-1]).double()
    through = right.double() @ s
    predicted = alpha * (left.double() @ through.bfloat16().double())
    residual = ((c.double() @ s - predicted).square().sum(-1) / PROBES).sqrt()
    squares, estimate = left.double().square().sum(-1), predicted.square().sum(-1) / PROBES
    weights = through.square().sum((-2, -1)).unsqueeze(-1) / PROBES
    gain = estimate.sum(-1, keepdim=True) / squares.sum(-1, keepdim=True).clamp(min=NORM_FLOOR**2)
    of_rows = (estimate + squares * torch.maximum(gain, weights * alpha**2 / inner)).sqrt()
    sums = squares.sqrt() * weights.sqrt() * Z * abs(alpha) * KAPPA.accumulate_at(max(n, inner))
    return residual / (of_rows * TAIL * KAPPA.output * (1 + 4 / n) ** 0.5 + sums)


@settings(max_examples=12)
@given(
    st.integers(0, 3),
    st.integers(1, 80),
    st.integers(1, 150),
    st.integers(1, 90),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, -0.25]),
    st.integers(0, 2**31),
)
def test_readings_are_those_of_the_formula(
    batch: int, m: int, k: int, n: int, turn_a: bool, turn_b: bool, alpha: float, seed: int
) -> None:
    lead = (batch,) if batch else ()
    left, right = normal(*lead, m, k, seed=seed), normal(*lead, k, n, seed=seed + 1)
    c = (alpha * (left.float() @ right.float())).bfloat16()
    left = left.mT.contiguous().mT if turn_a else left
    right = right.mT.contiguous().mT if turn_b else right
    found = readings(c, left, right, alpha)
    assert found.shape == (*lead, m)
    assert torch.allclose(found.double(), formula(c, left, right, alpha), rtol=0.01, atol=0.002)
    assert float(found.max()) <= 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, on infinities, in the interpreter
@pytest.mark.parametrize("wrong", [2.0, float("nan"), float("inf")])
def test_a_wrong_element_alarms_in_its_row_and_a_small_one_does_not(wrong: float) -> None:
    left, right = normal(40, 200, seed=1), normal(200, 96, seed=2)
    c = left @ right
    rms = float(c.float().square().mean().sqrt())
    bad = c.clone()
    bad[7, 11] += wrong * rms
    assert [i for i, reading in enumerate(readings(bad, left, right).tolist()) if not reading <= 1] == [7]
    below = c.clone()
    below[7, 11] += 0.02 * rms
    assert float(readings(below, left, right).max()) <= 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_finite_alarms() -> None:
    left, right = normal(40, 200, seed=1), normal(200, 96, seed=2)
    c = left @ right
    left[3, 5], c[3] = torch.nan, torch.nan  # not by the host's product, which may spread a NaN over other rows
    assert not float(readings(c, left, right)[3]) <= 1
    c[7, 11] = torch.nan
    found = readings(c, left, right).tolist()
    assert [i for i, reading in enumerate(found) if not reading <= 1] == [3, 7]


def test_nothing_but_zeros_reads_nothing() -> None:
    left, right = torch.zeros(20, 30).bfloat16(), normal(30, 8, seed=3)
    assert readings(left @ right, left, right).tolist() == [0.0] * 20
    bad = left @ right
    bad[3, 3] = 1.0
    assert not float(readings(bad, left, right)[3]) <= 1


def test_what_it_takes() -> None:
    a = torch.zeros(4, 4).bfloat16()
    assert energy.can_read(a, a, a)
    assert energy.can_read(a[None], a[None], a[None])
    assert not energy.can_read(a.float(), a, a)
    assert not energy.can_read(a[:, :0], a, a[:, :0])
    assert not energy.can_read(a[None, None], a[None, None], a[None, None])
    tall = a[:1].expand(1 << 20, 4)
    assert not energy.can_read(tall, tall, a)


def test_only_a_cuda_device_is_read_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there all that they take: what is added, or is in fp16, stays with torch's operators."""
    assert rounded.on_device(CPU) is None
    assert rounded.on_device(torch.device("cuda")) is energy
    asked: list[str] = []

    class Fake:
        def can_read(self, *operands: Tensor) -> bool:
            asked.append("can")
            return True

        def readings(self, *rest: object) -> str:
            return "fused"

    monkeypatch.setattr(rounded, "on_device", lambda device: Fake())
    a, signs = normal(8, 8, seed=1), Signs(1, CPU)
    operands = a @ a, Operand(a), Operand(a), signs, KAPPA, 1.0
    assert energy_readings(*operands, None) == "fused"  # type: ignore[comparison-overlap]
    assert energy_readings(*operands, torch.zeros(8, PROBES)).shape == (8,)
    assert asked == ["can"]
