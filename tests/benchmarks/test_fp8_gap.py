"""The benchmark of FP8's loss gap: its statistics, what its controls do, and that a finished run is not run again."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agent.model.fp8 import Emulation
from benchmarks import fp8_gap
from benchmarks._fp8_training import Blockwise, Coarse, PerTensor, Regime, Variant, learning_rate, power_of_two


def test_the_interval_is_students() -> None:
    mean, error, half = fp8_gap.interval([1.0, 2.0, 3.0])
    assert (mean, error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert half == pytest.approx(4.303 / math.sqrt(3))  # two degrees of freedom


def test_gaps_are_paired_by_seed() -> None:
    found = {("bf16", 1): [2.0] * 50, ("bf16", 2): [4.0] * 50, ("fp8", 2): [9.0] + [4.4] * 50}
    assert fp8_gap.gaps(found, "fp8") == {2: pytest.approx(0.1)}


@pytest.mark.parametrize(("gap", "met"), [(0.001, True), (0.003, False)])
def test_the_target_is_of_the_interval_not_of_the_mean(gap: float, met: bool) -> None:
    ends = {"bf16": [2.0] * 3, "fp8": [2.0 * (1 + gap + noise) for noise in (-1e-4, 0.0, 1e-4)]}
    found = {
        (name, seed): [end] * 50 for name in fp8_gap.VARIANTS for seed, end in enumerate(ends.get(name, [2.2] * 3))
    }
    (figure,) = [f for f in fp8_gap.figures(found, True) if f.name.endswith("bf16, fp8, farthest end of the interval")]
    assert (figure.target, figure.met) == (0.0025, met)
    assert figure.value > gap


@given(st.floats(min_value=2.0**-60, max_value=2.0**60, width=32))
def test_powers_of_two_are_the_nearest(value: float) -> None:
    got, negative = power_of_two(torch.tensor([value, -value])).tolist()
    assert negative == -got
    mantissa, exponent = math.frexp(value)
    assert got == math.ldexp(1.0 if mantissa >= 0.75 else 0.5, exponent)


def operands() -> tuple[Tensor, Tensor]:
    """Activations [192, 256], one of them much larger than the others, and a weight [64, 256]."""
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(192, 256, generator=generator), torch.randn(64, 256, generator=generator)
    x[5] *= 1e6
    return x, w


def test_without_statistics_the_bits_are_the_same() -> None:
    x, w = operands()
    ours, theirs = Blockwise(), Emulation()
    assert torch.equal(ours.along_rows(x).values, theirs.along_rows(x).values)
    assert torch.equal(ours.along_columns(x).values, theirs.along_columns(x).values)
    assert torch.equal(ours.tiles(w).values, theirs.tiles(w).values)


@pytest.mark.parametrize("control", [PerTensor, Coarse])
def test_the_controls_are_worse(control: type[Emulation]) -> None:
    x, w = operands()

    def error(backend: Emulation) -> float:
        got = backend.product(backend.along_rows(x), backend.tiles(w))
        return float((got - x @ w.t())[6:].norm())

    assert error(control()) > 3 * error(Blockwise())


def test_the_rate_rises_stays_and_falls_to_a_tenth() -> None:
    regime = Regime(steps=300, peak_lr=1.0, warmup=60)
    rates = {step: learning_rate(step, regime) for step in (30, 60, 100, 200, 300)}
    assert rates == {30: 0.5, 60: 1.0, 100: 1.0, 200: pytest.approx(0.55), 300: pytest.approx(0.1)}


def test_a_finished_run_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regime, jobs = Regime(steps=2, peak_lr=1e-4, warmup=1), [("bf16", 1)]
    path = fp8_gap.kept_at(tmp_path, "bf16", 1, regime)
    path.write_text(json.dumps({"losses": [3.0, 2.0]}))
    assert fp8_gap.measure(jobs, regime, tmp_path) == {("bf16", 1): [3.0, 2.0]}
    assert fp8_gap.kept_at(tmp_path, "bf16", 2, regime) != path
    assert fp8_gap.kept_at(tmp_path, "bf16", 1, Regime(steps=2, peak_lr=2e-4, warmup=1)) != path
    monkeypatch.setitem(fp8_gap.VARIANTS, "bf16", Variant("bf16", stirred=True))
    assert fp8_gap.kept_at(tmp_path, "bf16", 1, regime) != path  # another variant of the same name
