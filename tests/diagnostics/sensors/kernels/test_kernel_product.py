"""Products with the sums of their accumulators under Triton's interpreter: right, sharp, and blind to what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import DEVICE, multiply, multiply_quantised, quantise
from torch import Tensor

from diagnostics.calibration.rules import MOST_ACCUMULATE_FP8, SHARE
from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.rounded import energy_readings
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.kernels.product import Product, readings, readings_of
from diagnostics.sensors.kernels.quantised import Quantised
from diagnostics.sensors.tolerance import shipped_table

#: The constants of CPU kernels: under the interpreter the accumulator is numpy's fp32, and a GPU's sums of so few bf16
#: products are no worse.
FINE = shipped_table().kappa("cpu", "float32", "fp8")
#: Tensor cores keep some 14 bits of FP8 products' sums between two promotions, and cut the rest off.
OF_FP8 = FINE if DEVICE.type == "cpu" else shipped_table().kappa(DEVICE.type, "float32", "fp8")
CUT_OFF = 0.0 if DEVICE.type == "cpu" else MOST_ACCUMULATE_FP8 * SHARE
COARSE = shipped_table().kappa("cpu", "bfloat16", "mm")


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def drawn(key: int = 5) -> Signs:
    return Signs(key, torch.device("cpu"))


def check(made: Product, left: Tensor, right: Tensor, r: Tensor, cut_off: float = 0.0) -> None:
    """The product and its sums against float64, within Higham's bound; out within a rounding to bf16 besides."""
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    bound = ((left.shape[1] + right.shape[1]) * 2.0**-24 + cut_off) * size
    assert made.out.dtype == torch.bfloat16
    assert bool(((made.out.double() - exact).abs() <= bound + exact.abs() * 2.0**-7 + 2.0**-126).all())
    assert bool(((made.sums.double() - exact @ r.double()).abs() <= bound.sum(1)).all())


@settings(max_examples=15)
@given(
    st.integers(1, 90), st.integers(1, 200), st.integers(1, 150), st.booleans(), st.booleans(), st.integers(0, 2**31)
)
def test_bf16_products_and_their_sums(m: int, k: int, n: int, turn_a: bool, turn_b: bool, seed: int) -> None:
    left, right = normal(m, k, seed).bfloat16(), normal(k, n, seed + 1).bfloat16()
    left = left.t().contiguous().t() if turn_a else left
    right = right.t().contiguous().t() if turn_b else right
    signs = drawn(seed)
    made = multiply(left, right, signs.vector(n))
    check(made, left, right, signs.vector(n))
    found = readings_of(made.sums, Operand(left), Operand(right), signs, FINE)
    assert found.shape == (m,)
    assert float(found.max()) <= 1


def values(made: Quantised) -> Tensor:
    tall = made.scales.repeat_interleave(made.height, 0)[: made.codes.shape[0]]
    return made.codes.float() * tall.repeat_interleave(128, 1)[:, : made.codes.shape[1]]


@settings(max_examples=15)
@given(st.integers(1, 90), st.integers(1, 300), st.integers(1, 150), st.booleans(), st.integers(0, 2**31))
def test_fp8_products_are_checked_without_a_pass_of_their_own(m: int, k: int, n: int, tiled: bool, seed: int) -> None:
    """The weight's quantisation gives W r, the activation's A (W r) and the norms, the product C r."""
    r = drawn(seed).vector(n)
    right = quantise(normal(n, k, seed), torch.zeros(k), r, tiled)
    assert right.down is not None
    left = quantise(normal(m, k, seed + 1), right.down)
    made = multiply_quantised(left, right, r)
    check(made, values(left), values(right).t(), r, CUT_OFF)
    found = readings(made.sums, left.along, left.row_norms, right.norm, max(n, k), OF_FP8)
    assert float(found.max()) <= 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, on infinities, in the interpreter
@pytest.mark.parametrize("size", [2.0**-8, 2.0**-4, 1.0, float("nan"), float("inf")])
def test_a_wrong_accumulator_is_seen_where_the_rounded_result_hides_it(size: float) -> None:
    """One term of one row is wrong inside the kernel: it is given an A that the prediction was not made of."""
    left, right = normal(64, 256, 1), normal(256, 192, 2).bfloat16()
    left[5, 9] = 1.0
    left = left.bfloat16()
    signs = drawn()
    bad = left.clone()
    bad[5, 9] = 1.0 + 4 * size
    made = multiply(bad, right, signs.vector(192))
    fine = readings_of(made.sums, Operand(left), Operand(right), signs, FINE)
    assert [i for i, reading in enumerate(fine.tolist()) if not reading <= 1] == [5]
    coarse = energy_readings(made.out, Operand(left), Operand(right), signs, COARSE, 1.0, None)
    if size < 2.0**-5:
        assert float(coarse.max()) <= 1  # the control: the check of bf16 outputs does not see it
    healthy = multiply(left, right, signs.vector(192))
    assert float(readings_of(healthy.sums, Operand(left), Operand(right), signs, FINE).max()) <= 1


def test_other_signs_than_the_prediction_alarm() -> None:
    left, right = normal(8, 64, 1).bfloat16(), normal(64, 64, 2).bfloat16()
    made = multiply(left, right, drawn(1).vector(64))
    assert float(readings_of(made.sums, Operand(left), Operand(right), drawn(2), FINE).min()) > 1


def test_a_corrupted_code_or_scale_alarms() -> None:
    r = drawn().vector(70)
    right = quantise(normal(70, 200, 3), torch.zeros(200), r, tiled=True)
    assert right.down is not None
    left = quantise(normal(20, 200, 4), right.down)
    largest = int(left.codes[6].float().abs().argmax())
    for name, at in (("codes", (6, largest)), ("scales", (6, 1))):
        bad = Quantised(**{**vars(left), name: getattr(left, name).clone()})
        spoilt = getattr(bad, name).view(torch.uint8)[at[0]]
        # A code's mantissa, or a scale's exponent; where sums are coarse the sign of a code.
        spoilt[at[1] if name == "codes" else 7] ^= 0x80 if name == "codes" and CUT_OFF else 2
        made = multiply_quantised(bad, right, r)
        found = readings(made.sums, left.along, left.row_norms, right.norm, 200, OF_FP8)
        assert [i for i, reading in enumerate(found.tolist()) if not reading <= 1] == [6], name


def test_what_does_not_fit_is_refused_by_name() -> None:
    a, b, r = torch.ones(2, 3).bfloat16(), torch.ones(3, 4).bfloat16(), torch.ones(4)
    with pytest.raises(ValueError, match="right is"):
        multiply(a, b.float(), r)
    with pytest.raises(ValueError, match="right over 4"):
        multiply(a, b.t(), r)
    with pytest.raises(ValueError, match="signs has shape"):
        multiply(a, b, torch.ones(3))
    tiled = quantise(torch.ones(4, 3), torch.ones(3), tiled=True)
    with pytest.raises(ValueError, match="must be 1x128"):
        multiply_quantised(tiled, tiled, r)


def test_nothing_times_something() -> None:
    made = multiply(torch.empty(0, 3).bfloat16(), torch.ones(3, 4).bfloat16(), torch.ones(4))
    assert made.out.shape == (0, 4)
    assert made.sums.shape == (0,)
