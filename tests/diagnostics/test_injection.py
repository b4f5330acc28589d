"""Faults by coordinates: they hit what was asked, reproducibly, and the sensors see them without knowing of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_model import Sample, batch, gradients

from diagnostics.faults.corrupt import corrupt
from diagnostics.faults.inject import Injector
from diagnostics.faults.spec import KINDS, OPS, FaultSpec, FaultSpecError, Kind, Op
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.guarded_step import GuardedStep


def run(model: Sample, spec: FaultSpec, guard: Guard | None = None) -> tuple[Injector, GuardedStep]:
    model.zero_grad()
    guard = guard or Guard(model)
    injector = Injector(model, spec)
    with injector, guard.step(spec.seed) as step:
        model(batch(0)).backward()
    return injector, step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "fault"), list(itertools.product(OPS, KINDS)))
def test_every_kind_is_seen_where_it_happened(dtype: torch.dtype, op: Op, fault: Kind) -> None:
    model = Sample(dtype)
    guard = Guard(model)
    for seed in range(6):
        injector, step = run(model, FaultSpec(seed % 2, op, fault, 30, seed), guard)
        fired = injector.fired
        assert fired is not None
        assert fired["module"].startswith(f"layers.{seed % 2}.")
        assert fired["op"] == op
        assert not step.clean
        assert (fired["module"], op) in {(alarm.module, alarm.pass_) for alarm in step.alarms}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bit", [20, 21, 22, 23, 27, 31])
def test_high_bits_of_fp32_are_seen(op: Op, bit: int) -> None:
    model = Sample()
    guard = Guard(model)
    for seed in range(8):
        _, step = run(model, FaultSpec(None, op, "bitflip", bit, seed), guard)
        assert not step.clean


@pytest.mark.parametrize("op", OPS)
def test_without_sensors_the_same_fault_changes_the_gradients_unseen(op: Op) -> None:
    """The negative control, and the proof that the fault is real."""
    model = Sample()
    model(batch(0)).backward()
    clean = gradients(model)
    injector, step = run(model, FaultSpec(0, op, "tile", seed=3), Guard(model, enabled=False))
    assert injector.fired is not None
    assert step.clean
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(clean, gradients(model), strict=True))


def test_same_seed_same_fault() -> None:
    model = Sample()
    first, again, other = (run(model, FaultSpec(None, "wgrad", "bitflip", 22, seed))[0].fired for seed in (4, 4, 5))
    assert first == again != other


def test_it_fires_once_and_only_inside() -> None:
    model = Sample()
    injector, _ = run(model, FaultSpec(0, "fprop", "scale", seed=1))
    fired = injector.fired
    model.zero_grad()
    with Guard(model).step(0) as step:
        model(batch(0)).backward()
    assert step.clean
    assert injector.fired == fired


def test_an_expert_without_tokens_is_passed_over() -> None:
    """experts.2 never runs; whatever the seed draws, the fault happens."""
    model = Sample()
    for seed, op in itertools.product(range(12), OPS):
        injector, _ = run(model, FaultSpec(0, op, "tile", seed=seed))
        assert injector.fired is not None
        assert ".experts.2." not in injector.fired["module"]


def test_square_weights_do_not_confuse_the_passes() -> None:
    """tokens = in = out: dgrad and wgrad have one shape, and are told apart by their operands."""
    model = Sample(width=48)
    for op in ("dgrad", "wgrad"):
        injector = Injector(model, FaultSpec(0, op, "tile", seed=2))  # type: ignore[arg-type]
        with injector, Guard(model).step(0) as step:
            model(batch(0, tokens=48)).backward()
        assert injector.fired is not None
        assert (injector.fired["module"], op) in {(a.module, a.pass_) for a in step.alarms}


@given(st.integers(0, 31), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_bitflip_changes_one_bit_of_one_sizeable_element(bit: int, seed: int, dtype: torch.dtype) -> None:
    import random

    clean = torch.randn(20, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bad = clean.clone()
    told = corrupt(bad, FaultSpec(fault="bitflip", bit=bit), random.Random(seed))
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    delta = (clean.view(kind) ^ bad.view(kind)).flatten()
    width = 32 if dtype == torch.float32 else 16
    assert [int(d) & (2**width - 1) for d in delta if d] == [1 << (bit - 16 if width == 16 and bit >= 16 else bit)]
    row, column = told["element"]
    assert float(clean[row, column]) == told["old"]
    assert abs(told["old"]) >= 0.99 * float(clean.float().square().mean().sqrt())


@pytest.mark.parametrize("fault", ["stuck", "tile", "scale"])
def test_shapes_of_faults(fault: Kind) -> None:
    import random

    clean = torch.randn(64, 80, generator=torch.Generator().manual_seed(1))
    bad = clean.clone()
    told = corrupt(bad, FaultSpec(fault=fault), random.Random(1))
    changed = clean != bad
    assert int(changed.sum()) == told["changed"]
    columns = changed.any(0).nonzero().flatten()
    if fault == "stuck":
        assert told["changed"] == 64 * 5
        assert set(columns.diff().tolist()) == {16}
    else:
        assert told["changed"] == 256
        assert int(columns[-1] - columns[0]) == 15


def test_results_of_zeros_are_corrupted_too() -> None:
    import random

    for fault in ("bitflip", "stuck", "tile"):
        zeros = torch.zeros(20, 20)
        assert corrupt(zeros, FaultSpec(fault=fault), random.Random(0))["changed"] > 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "names"),
    [({"op": "forward"}, "op"), ({"fault": "zap"}, "fault"), ({"bit": 32}, "bit"), ({"layer": -1}, "layer")],
)
def test_senseless_coordinates_are_refused(bad: dict[str, object], names: str) -> None:
    with pytest.raises(FaultSpecError, match=names):
        FaultSpec(**bad)  # type: ignore[arg-type]


def test_a_layer_the_model_lacks_is_refused() -> None:
    with pytest.raises(FaultSpecError, match=r"layers 0\.\.1"):
        Injector(Sample(), FaultSpec(layer=2))
