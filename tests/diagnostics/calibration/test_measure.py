"""Calibration on little data: it finds the shipped constants, and another one for a kernel that is really worse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.calibration import gauge
from diagnostics.calibration.document import Machine, document, text, write
from diagnostics.calibration.measure import DeviceUnusable, Measured, Plan, measure
from diagnostics.calibration.operators import FAMILIES, Family, attention, products
from diagnostics.calibration.rules import DTYPES, RULES, Rounding
from diagnostics.calibration.values import KINDS, Draw
from diagnostics.sensors.tolerance import parse_table, shipped_table

CPU = torch.device("cpu")
MACHINE = Machine("a name", "a capability", "2.13.0", 1)
DAY = date(2026, 11, 26)
FP32 = (torch.float32,)


def measured(families: Mapping[str, Family], dtypes: tuple[torch.dtype, ...] = FP32, trials: int = 12) -> Measured:
    return measure(Plan(CPU, dtypes, families, trials, 5_000, shipped_table()), lambda line: None)


@pytest.fixture(scope="module")
def quick() -> Measured:
    return measured(FAMILIES, tuple(DTYPES.values()))


def test_little_data_finds_the_shipped_constants_within_a_factor(quick: Measured) -> None:
    """Less data can only find less: never more than 1.3 times the shipped constant, whose data were other ones."""
    assert not quick.refused
    assert quick.constants[("float32", "mm")].accumulate >= shipped_table().kappa("cpu", "float32").accumulate / 2
    for (dtype, kernel), constant in quick.constants.items():
        shipped = shipped_table().kappa("cpu", dtype, kernel)
        assert constant.accumulate <= shipped.accumulate * 1.3, (dtype, kernel)
        if dtype == "float32" or constant.output:  # else the sums' share is nothing beside the roundings allowed
            assert constant.accumulate >= shipped.accumulate / 4, (dtype, kernel)
        assert shipped.output / 4 <= constant.output <= shipped.output * 1.3, (dtype, kernel)
        assert constant.worst <= constant.share
        assert constant.calls >= 5, (dtype, kernel)


def test_every_shipped_constant_is_measured_and_every_other_has_its_reason(quick: Measured) -> None:
    shipped = {key[1:] for key in shipped_table().entries}
    measurable = {(dtype, kernel) for dtype in DTYPES for kernel in RULES if not RULES[kernel].lacks(DTYPES[dtype])}
    assert shipped == measurable
    assert set(quick.constants) == shipped - {("float32", "fp8")}  # its products are the model's own
    assert {key for key in quick.skipped if key[1] == "nll_loss"} == {("float16", "nll_loss")}
    assert "subnormals" in quick.skipped[("float16", "nll_loss")]


def test_the_same_seed_gives_the_same_constants_and_another_other_data() -> None:
    family = {"products": FAMILIES["products"]}
    one, same = (measured(family).constants[("float32", "mm")] for _ in range(2))
    assert one == same
    mine, theirs = (Draw(CPU, seed, "x", 1).values(3, 4, dtype=torch.float32, kind="normal") for seed in (1, 2))
    assert not torch.equal(mine, theirs)
    for kind in KINDS:
        assert bool(Draw(CPU, 1, kind).values(6, 9, dtype=torch.float32, kind=kind).isfinite().all())


class Worse(TorchDispatchMode):
    """Products that are off by a share of themselves, as an accumulator with fewer bits is."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        products = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm
        return out * (1 + self.share) if func.overloadpacket in products else out


def worse_by(share: float) -> Mapping[str, Family]:
    def run(draw: Draw, dtype: torch.dtype) -> None:
        with Worse(share):
            products(draw, dtype)

    return {"worse": Family(("mm",), run)}


def test_a_kernel_that_is_worse_gets_a_larger_constant_and_one_that_is_wrong_gets_none() -> None:
    sound = measured(worse_by(0.0)).constants[("float32", "mm")].accumulate
    worse = measured(worse_by(3e-5)).constants[("float32", "mm")].accumulate
    assert worse > 4 * sound
    wrong = measured(worse_by(0.1), (torch.float32, torch.bfloat16))
    assert set(wrong.refused) == {("float32", "mm"), ("bfloat16", "mm")}
    assert "no rounding needs more" in wrong.refused[("float32", "mm")]
    assert not wrong.constants
    assert [row["kernel"] for row in document(wrong, MACHINE, DAY)["refused"]] == ["mm", "mm"]


def test_a_worse_16_bit_kernel_gets_a_larger_output_constant() -> None:
    bf16 = (torch.bfloat16,)
    sound, worse = (measured(worse_by(share), bf16).constants[("bfloat16", "mm")] for share in (0.0, 0.03))
    assert sound.output == 0.00163
    assert worse.output > 1.5 * sound.output


def test_a_kernel_that_a_dtype_does_not_have_is_skipped_with_the_reason() -> None:
    def run(draw: Draw, dtype: torch.dtype) -> None:
        if dtype == torch.float16:
            raise RuntimeError("not implemented for 'Half'\nand a page of C++")
        attention(draw, dtype)

    done = measured({"attention": Family(("sdpa", "sdpa_exp"), run)}, (torch.float32, torch.float16), trials=3)
    assert set(done.constants) == {("float32", "sdpa"), ("float32", "sdpa_exp")}
    assert set(done.skipped.values()) == {"not implemented for 'Half'"}
    rows = document(done, MACHINE, DAY)["skipped"]
    assert rows[0] == {"dtype": "float16", "kernel": "sdpa", "reason": "not implemented for 'Half'"}


def test_a_family_whose_operators_are_not_seen_has_no_constant() -> None:
    done = measured({"nothing": Family(("mm",), lambda draw, dtype: None)})
    assert not done.constants
    assert done.skipped == {("float32", "mm"): "no kernel that the sensors know ran"}


def test_a_device_that_cannot_add_is_refused() -> None:
    with pytest.raises(DeviceUnusable, match="device meta cannot be used"):
        measure(Plan(torch.device("meta"), FP32, FAMILIES, 1, 0, shipped_table()), lambda line: None)


def test_the_document_is_a_table_with_its_provenance(quick: Measured) -> None:
    made = document(quick, MACHINE, DAY)
    table = parse_table(text(made))
    assert {key[1:]: (kappa.output, kappa.accumulate) for key, kappa in table.entries.items()} == {
        key: (constant.output, constant.accumulate) for key, constant in quick.constants.items()
    }
    for (_, dtype, kernel), kappa in table.entries.items():
        constant = quick.constants[(dtype, kernel)]
        assert "measured 2026-11-26 on a name (a capability), torch 2.13.0, 1 thread, seed 5000" in kappa.provenance
        assert f"worst reading {constant.worst:.2f} of {constant.readings:,}" in kappa.provenance
        if dtype != "float32" and RULES[kernel].rounding is Rounding.EXACT:
            assert "exact" in kappa.provenance or "allows each element its rounding" in kappa.provenance
    assert made["measured"]["trials"] == 12
    here = Machine.of(CPU)
    assert (here.version, here.threads) == (torch.__version__, 1)


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    write(path, {"schema": "before"})

    def broken(descriptor: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr("diagnostics.calibration.document.os.fsync", broken)
    with pytest.raises(OSError, match="no room"):
        write(path, {"schema": "after"})
    assert json.loads(path.read_text()) == {"schema": "before"}
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_a_padded_logsumexp_is_no_overflow_and_a_gradient_nobody_asked_for_no_result() -> None:
    made, padded = torch.ones(2), torch.full((1,), torch.inf)
    assert gauge._finite((made, None))
    assert not gauge._finite((made, padded))
    assert gauge._values(torch.ops.aten._scaled_dot_product_efficient_attention.default, (made, padded)) is made
    statistics = made, padded
    assert gauge._values(torch.ops.aten.native_layer_norm.default, statistics) is statistics
