"""The rounding model: its table, its widening, and that clean products of any shape stay inside it."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.sensors.checks import operand
from diagnostics.sensors.checks.gemm import Addend, output_norms, row_readings
from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import (
    SCHEMA,
    WIDEST,
    Kappa,
    TableError,
    UnknownTolerance,
    Widening,
    parse_table,
    shipped_table,
)

CPU = torch.device("cpu")
FLAVOURS = ("normal", "ones", "positive", "outlier columns", "outlier rows", "lognormal", "sparse", "zero rows")


def matrix(flavour: str, m: int, n: int, scale: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=g)
    if flavour == "ones":
        x = torch.ones(m, n)
    elif flavour == "positive":
        x = x.abs()
    elif flavour == "outlier columns":
        x[:, ::7] *= 100
    elif flavour == "outlier rows":
        x[::5] *= 1000
    elif flavour == "lognormal":
        x = x * torch.exp(3 * torch.randn(m, n, generator=g))
    elif flavour == "sparse":
        x = x * (torch.rand(m, n, generator=g) < 0.03)
    elif flavour == "zero rows":
        x[::2] = 0
    return x * scale


def reading(c: torch.Tensor, a: torch.Tensor, w: torch.Tensor, key: int, factor: float = 1.0) -> float:
    kappa = shipped_table().kappa("cpu", str(c.dtype).removeprefix("torch."))
    return float(row_readings(c, Operand(a), Operand(w.t()), Signs(key, CPU), kappa).amax()) / factor


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(FLAVOURS),
    st.sampled_from(FLAVOURS),
    st.tuples(st.integers(1, 80), st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([1e-20, 1e-6, 1e-4, 1.0, 1e4]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**63),
)
def test_clean_products_never_alarm(
    left: str, right: str, shape: tuple[int, int, int], scale: float, dtype: torch.dtype, key: int
) -> None:
    m, k, n = shape
    a, w = matrix(left, m, k, scale, key % 1000).to(dtype), matrix(right, n, k, 1.0, key % 997).to(dtype)
    assert reading(F.linear(a, w), a, w, key) <= 1.0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(20, 31), st.sampled_from([1e-6, 1.0, 1e4]))
def test_every_high_flip_of_a_sizeable_fp32_element_alarms(seed: int, bit: int, scale: float) -> None:
    a, w = matrix("normal", 40, 96, scale, seed % 1009), matrix("normal", 64, 96, 1.0, seed % 1013)
    c = F.linear(a, w)
    row, column = divmod(int(c.abs().argmax()) if seed % 2 else 65 * (seed % 39), 64)
    if c[row, column].abs() < c[row].square().mean().sqrt():
        column = int(c[row].abs().argmax())
    c.view(torch.int32)[row, column] ^= torch.iinfo(torch.int32).min if bit == 31 else 1 << bit
    assert not (reading(c, a, w, seed) <= 1.0)
    assert not (reading(c, a, w, seed, factor=WIDEST) <= 1.0)
    # the negative control: a sensor whose tolerance is without bound sees no finite fault
    assert not math.isfinite(float(c.abs().sum())) or reading(c, a, w, seed, factor=1e30) <= 1.0 or bit == 30


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(FLAVOURS),
    st.sampled_from(FLAVOURS),
    st.tuples(st.integers(2, 40), st.integers(2, 150), st.integers(2, 150)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.one_of(st.none(), st.integers(17, 30)),
    st.integers(0, 2**32),
)
def test_a_bound_stands_for_readings_that_are_no_larger_and_hides_no_alarm(
    left: str,
    right: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    across: bool,
    bit: int | None,
    seed: int,
) -> None:
    m, k, n = shape
    a, w = matrix(left, m, k, 1.0, seed % 1000).to(dtype), matrix(right, n, k, 1.0, seed % 997).to(dtype)
    if across:  # as wgrad's operands lie
        a = a.t().contiguous().t()
    c = F.linear(a, w)
    if bit is not None:
        c.view(torch.int32 if dtype == torch.float32 else torch.int16)[seed % m, seed % n] ^= 1 << (
            bit if dtype == torch.float32 else bit - 16
        )
    signs, kappa = Signs(seed, CPU), shipped_table().kappa("cpu", str(dtype).removeprefix("torch."))
    known, weight = Operand(a), Operand(w.t())
    assert known.row_norms.shape == (m,)
    assert weight.norm >= 0
    exact = row_readings(c, known, weight, signs, kappa)
    with patch.object(operand, "_PART", 1):  # all matrices are large
        fresh = Operand(a)
        assert fresh.is_dear
        assert not known.is_dear
        assert bool((fresh.least_row_norms <= known.row_norms * 1.001).all())
        assert float(Operand(w.t()).least_norm) <= float(weight.norm) * 1.001
        found = row_readings(c, fresh, Operand(w.t()), signs, kappa)
    assert torch.equal(found <= 1, exact <= 1)
    assert bool((found >= exact * 0.999 - 0.01)[found <= 0.5].all())


@pytest.mark.parametrize("across", [(), (0,), (1,), (0, 1)])
def test_batches_that_lie_across_read_as_those_that_do_not(across: tuple[int, ...]) -> None:
    operands = [torch.randn(3, 40, 50).bfloat16(), torch.randn(3, 50, 30).bfloat16()]
    c, signs, kappa = operands[0] @ operands[1], Signs(1, CPU), shipped_table().kappa("cpu", "bfloat16")
    straight = row_readings(c, Operand(operands[0]), Operand(operands[1]), signs, kappa)
    turned = [Operand(t.mT.contiguous().mT if n in across else t) for n, t in enumerate(operands)]
    readings = row_readings(c, *turned, signs, kappa)
    assert bool((readings <= 1).all())
    assert torch.allclose(readings, straight, atol=0.1)  # sums of another order, rounded to 16 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_clean_products_need_no_norms_and_wrong_ones_do(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, w = matrix("normal", 700, 600, 1.0, 1).to(dtype), matrix("normal", 650, 600, 1.0, 2).to(dtype)
    c = F.linear(a, w)
    wrong = c.clone()
    wrong[5, 7] += 9 * c.abs().amax()
    assert not reading(wrong, a, w, 1) <= 1.0

    def measured(*_: object) -> torch.Tensor:
        raise AssertionError("norms were measured")

    monkeypatch.setattr(operand._Measured, "row_norms", property(measured))
    assert reading(c, a, w, 1) <= 0.75
    with pytest.raises(AssertionError, match="measured"):
        reading(wrong, a, w, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_alarms(bad: float) -> None:
    a, w = matrix("normal", 8, 16, 1.0, 1), matrix("normal", 12, 16, 1.0, 2)
    c = F.linear(a, w)
    c[3, 5] = bad
    assert not (reading(c, a, w, 1) <= 1.0)


def test_norm_estimate_comes_from_operands_alone() -> None:
    """A corrupted result must not raise its own threshold: the estimate never reads it, and holds the true norm."""
    a, w = matrix("outlier rows", 200, 64, 1.0, 1).bfloat16(), matrix("normal", 128, 64, 1.0, 2).bfloat16()
    true = torch.linalg.vector_norm(F.linear(a.float(), w.float()), dim=1)
    estimate = output_norms(Operand(a), Operand(w.t()), Signs(3, CPU))
    ratio = estimate / true
    assert float(ratio.amin()) > 0.8
    assert float(ratio.amax()) < 2.5


@pytest.mark.parametrize("control", [False, True])
def test_two_lanes_that_change_places_do_not_cancel(control: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: under signs of one size they do in half of the steps, in every row."""
    if control:
        monkeypatch.setattr("diagnostics.sensors.checks.signs.LEAST", 1.0)
    a, w = matrix("normal", 200, 256, 1.0, 1), matrix("normal", 256, 256, 1.0, 2)
    c = F.linear(a, w)
    swapped, opposed = c.clone(), c.clone()
    swapped[:, [3, 7]] = c[:, [7, 3]]
    opposed[:, 3] += 40.0
    opposed[:, 7] -= 40.0
    for bad in (swapped, opposed):
        missed = sum(reading(bad, a, w, key) <= 1.0 for key in range(40))
        assert 10 <= missed <= 30 if control else missed <= 1  # two weights may be equal to three digits


def test_signs_are_a_function_of_key_and_length() -> None:
    one, same, other = Signs(5, CPU), Signs(5, CPU), Signs(6, CPU)
    assert torch.equal(one.vector(100), same.vector(100))
    assert torch.equal(one.probes(100, torch.bfloat16), same.probes(100, torch.bfloat16))
    assert not torch.equal(one.vector(100), other.vector(100))
    sizes = one.vector(100).abs()
    assert bool(((sizes >= 0.75) & (sizes < 1.25)).all())
    assert 0 < int((one.vector(100) > 0).sum()) < 100


def test_shipped_table_is_sound_and_says_where_it_is_from() -> None:
    table = shipped_table()
    assert {("cpu", "float32", "mm"), ("cpu", "bfloat16", "mm")} <= set(table.entries)
    assert all("measured" in kappa.provenance for kappa in table.entries.values())
    with pytest.raises(UnknownTolerance, match="float64"):
        table.kappa("cpu", "float64")
    of_gpus = {key: kappa for key, kappa in table.entries.items() if key[0] == "cuda"}
    assert {key[1:] for key in of_gpus} == {key[1:] for key in table.entries if key[0] == "cpu"} - {
        ("bfloat16", "cumsum")
    }
    assert all("NVIDIA" in kappa.provenance for kappa in of_gpus.values())
    for (_, _, kernel), kappa in of_gpus.items():
        assert kappa.accumulate >= of_gpus[("cuda", "float32", kernel)].accumulate


ROW = {"device_class": "cpu", "dtype": "float32", "kernel": "mm", "output": 0, "accumulate": 1e-7, "provenance": ""}


def table(*rows: object, schema: str = SCHEMA) -> str:
    return json.dumps({"schema": schema, "kappas": rows})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (table(ROW, ROW), "twice"),
        (table(ROW | {"accumulate": 0}), r"0\.\.1"),
        (table(ROW | {"output": math.nan}), r"0\.\.1"),
        (table(ROW | {"output": 10**400}), r"0\.\.1"),
        (table(ROW | {"output": "0"}), r"kappas\[0\]\.output is '0', must be a number"),
        (table(ROW | {"accumulate": True}), r"accumulate is True, must be a number"),
        (table(ROW, ROW | {"kernel": None}), r"kappas\[1\]\.kernel is None, must be text"),
        (table({}), r"kappas\[0\]\.device_class is None"),
        (table(3), r"kappas\[0\] is not an object"),
        (table(ROW, schema="assay.tolerances/2"), "schema is not assay.tolerances/1"),
        (json.dumps({"schema": SCHEMA}), "kappas is not a list"),
        ("[]", "not a table of tolerances"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_tables_are_refused(text: str, told: str) -> None:
    with pytest.raises(TableError, match=told):
        parse_table(text)
    assert parse_table(table(ROW)).kappa("cpu", "float32").accumulate == 1e-7


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(ROW, _JSON)), max_size=3))
def test_any_document_is_a_table_or_says_what_is_wrong(rows: list[dict[str, object]]) -> None:
    """Nothing but TableError comes out, and what is accepted can be used."""
    entries: dict[tuple[str, str, str], Kappa] = {}
    with suppress(TableError):
        entries = parse_table(table(*({**ROW, **row} for row in rows))).entries
    for key, kappa in entries.items():
        assert all(isinstance(part, str) for part in key)
        assert 0 <= kappa.output < 1
        assert 0 < kappa.accumulate < 1


def test_a_table_lies_over_another() -> None:
    mine = parse_table(table(ROW | {"accumulate": 5e-7}))
    both = mine.over(shipped_table())
    assert both.kappa("cpu", "float32").accumulate == 5e-7
    assert both.entries.keys() == shipped_table().entries.keys()
    assert {key for key in both.entries if both.entries[key] != shipped_table().entries[key]} == set(mine.entries)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(FLAVOURS),
    st.sampled_from(FLAVOURS),
    st.tuples(st.integers(1, 60), st.integers(1, 200), st.integers(1, 200)),
    st.sampled_from([1e-7, 1e-6, 1e-4, 1e-2, 1.0, 4.0]),
    st.integers(0, 2**63),
)
def test_clean_fp16_products_never_alarm_down_to_subnormals_and_up_to_the_largest(
    left: str, right: str, shape: tuple[int, int, int], scale: float, key: int
) -> None:
    m, k, n = shape
    a = matrix(left, m, k, scale, key % 1000).clamp(-6e4, 6e4).half()
    w = matrix(right, n, k, 1.0, key % 997).clamp(-6e4, 6e4).half()
    c = F.linear(a, w)
    if bool(c.isfinite().all()):
        assert reading(c, a, w, key) <= 1.0


def test_fp16_needs_what_was_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without room for the rounding of subnormals clean products alarm."""
    a, w = matrix("normal", 50, 8, 1e-6, 1).half(), matrix("normal", 64, 8, 1.0, 2).half()
    assert reading(F.linear(a, w), a, w, 1) <= 1.0
    flipped = F.linear(a, w)
    flipped.view(torch.int16)[3, 5] ^= 1 << 13
    assert not reading(flipped, a, w, 1) <= 1.0
    monkeypatch.setattr("diagnostics.sensors.checks.gemm.subnormal_norm", lambda c: 0.0)
    assert not reading(F.linear(a, w), a, w, 1) <= 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_addend_beside_an_operand_of_zeros_is_quiet(dtype: torch.dtype) -> None:
    """A dead layer's product is its bias. The estimate of norms once read NaN there."""
    a, w = torch.zeros(3, 8, dtype=dtype), matrix("normal", 8, 36, 1.0, 1).to(dtype)
    bias = matrix("normal", 3, 36, 1e4, 2).to(dtype)
    signs, kappa = Signs(1, CPU), shipped_table().kappa("cpu", str(dtype).removeprefix("torch."))
    out = torch.addmm(bias, a, w)
    plus = Addend.of(bias, 1.0, 36, signs, True)
    for c, quiet in ((out, True), (out.neg(), False)):
        readings = row_readings(c, Operand(a), Operand(w), signs, kappa, 1.0, plus)
        assert bool((readings <= 1.0).all()) == quiet


@given(st.floats(1e-4, 10), st.lists(st.floats(0, 1e12) | st.just(math.nan) | st.just(math.inf), max_size=20))
def test_widening_only_grows_and_is_capped(scale: float, readings: list[float]) -> None:
    widening = Widening(scale)
    for value in readings:
        before, count = widening.factor("gemm", "fprop"), widening.count
        changed = widening.widen("gemm", "fprop", value)
        after = widening.factor("gemm", "fprop")
        assert before <= after <= max(scale, WIDEST)
        assert changed == (after > before)
        assert widening.count == count + changed
    assert widening.factor("gemm", "wgrad") == scale


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_widening_refuses_a_senseless_scale(scale: float) -> None:
    with pytest.raises(ValueError, match="tolerance scale"):
        Widening(scale)
