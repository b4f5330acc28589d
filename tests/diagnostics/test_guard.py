"""The guard on a training step: it changes no bit, stays quiet on clean steps, and sees what a kernel got wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sample_model import Sample, batch, gradients
from struck import Struck, plus, product
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diagnostics.sensors.guard import Guard
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.tolerance import WIDEST

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_guarded_and_unguarded_steps_are_bit_equal(dtype: torch.dtype) -> None:
    runs = []
    for enabled in (True, False):
        model = Sample(dtype)
        guard, optimizer = Guard(model, enabled=enabled), torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for k in range(5):
            model.zero_grad()
            with guard.step(k) as step:
                loss = model(batch(k))
                loss.backward()
            assert step.clean
            assert (step.checks > 0) == enabled
            losses.append(loss.detach())
            optimizer.step()
        runs.append((losses, gradients(model)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_clean_training_never_alarms(dtype: torch.dtype, scale: float) -> None:
    model = Sample(dtype)
    guard, optimizer = Guard(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for k in range(60):
        optimizer.zero_grad()
        x = batch(k) * scale
        x[:, 3] *= 50  # an outlier channel
        with guard.step(k) as step:
            model(x).backward()
        assert step.clean, step.alarms
        assert step.skipped == {}
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_product_of_a_step_is_checked(dtype: torch.dtype) -> None:
    """Whichever product is wrong, forward or backward, it is seen; a clean run of the same step is the control."""
    model = Sample(dtype)
    with product() as counter:
        model(batch(0)).backward()
    guard = Guard(model)
    for at in range(counter.count):
        model.zero_grad()
        with product(at, plus(1e3)), guard.step(7) as step:
            model(batch(0)).backward()
        assert not step.clean, f"product {at} of {counter.count}"
        assert all(alarm.module.startswith(("layers.", "head")) for alarm in step.alarms)
    with product(), guard.step(7) as step:
        model(batch(0)).backward()
    assert step.clean
    assert step.checks >= counter.count


def test_a_disabled_guard_sees_nothing() -> None:
    model = Sample()
    with product(0, plus(1e3)), Guard(model, enabled=False).step(1) as step:
        model(batch(0)).backward()
    assert step.clean
    assert step.checks == 0


def test_sensors_are_invisible_to_dispatch_modes() -> None:
    model = Sample(torch.bfloat16)
    with product() as bare:
        model(batch(0)).backward()
    with product() as guarded, Guard(model).step(0):
        model(batch(0)).backward()
    assert guarded.count == bare.count


def test_alarms_name_the_place() -> None:
    model = Sample()
    with product(2, plus(1e3)), Guard(model).step(0) as step:
        model(batch(0)).backward()
    first = step.alarms[0]
    assert (first.sensor, first.operation, first.pass_) == ("gemm", "mm", "fprop")
    assert first.module == "layers.0.experts.0.down"
    assert "of [48, 48]" in first.location
    assert step.worst >= first.reading > 1


def test_names_survive_casts() -> None:
    model = Sample(torch.bfloat16)
    guard = Guard(model, tolerance_scale=1e-6)
    with guard.step(0) as step:
        model(batch(0)).backward()
    names = {alarm.module for alarm in step.alarms}
    assert {"layers.0.mix", "layers.1.experts.1.down", "head"} <= names


class Halved(torch.autograd.Function):
    """Its forward shows no operator that has a node of its own, and its backward reads no weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].sinh()


class Halving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Halved.apply(x)


def test_the_backward_of_a_function_written_by_hand_goes_by_its_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Halving()), nn.Linear(4, 2))
    with Struck(torch.ops.aten.sinh, lambda out: out.add_(1)), Guard(model).step(0) as step:
        model(torch.randn(3, 4)).sum().backward()
    assert [(alarm.module, alarm.operation, alarm.pass_) for alarm in step.alarms] == [("1.0", "sinh", "backward")]


def test_same_key_same_readings() -> None:
    model = Sample(torch.bfloat16)
    guard = Guard(model)
    worst = []
    for key in (3, 3, 4):
        model.zero_grad()
        with guard.step(key) as step:
            model(batch(0)).backward()
        worst.append(step.worst)
    assert worst[0] == worst[1] != worst[2]


def test_an_earlier_step_keeps_what_it_saw() -> None:
    model = Sample()
    guard = Guard(model)
    with product(0, plus(1e3)), guard.step(0) as bad:
        model(batch(0)).backward()
    with guard.step(1) as good:
        model(batch(1)).backward()
    assert good.clean
    assert not bad.clean


def test_too_tight_a_tolerance_is_recalibrated_and_capped() -> None:
    model = Sample()
    guard = Guard(model, tolerance_scale=0.001)
    seen: set[tuple[str, str]] = set()
    for attempt in range(3):
        with guard.step(attempt) as step:
            model(batch(0)).backward()
        if attempt == 0:
            assert not step.clean
        else:
            assert step.clean
        guard.recalibrate(step.alarms)
        seen |= {(alarm.sensor, alarm.pass_) for alarm in step.alarms}
    assert guard.widening.count == len(seen)
    assert {("gemm", "fprop"), ("gemm", "dgrad"), ("gemm", "wgrad")} <= seen
    assert guard.widening.factor("gemm", "fprop") <= WIDEST


def test_recalibration_cannot_hide_a_fault() -> None:
    model = Sample()
    guard = Guard(model)
    for key in range(4):
        model.zero_grad()
        with product(0, plus(1e3)), guard.step(key) as step:
            model(batch(0)).backward()
        guard.recalibrate(step.alarms)
    assert not step.clean


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_alarm(bad: float) -> None:
    model = Sample()
    guard = Guard(model)
    flat = torch.ones(1000)
    with guard.step(0) as clean:
        guard.check_finite("gradients", flat)
        clean.observe("loss", 3.0)
    assert clean.clean
    flat[500] = bad
    with guard.step(1) as step:
        guard.check_finite("gradients", flat)
    assert not step.clean
    assert step.alarms[0].sensor == "finite"
    assert step.alarms[0].module == "gradients"
    with guard.step(2) as step:
        step.observe("loss", torch.tensor(bad))
    assert not step.clean
    assert math.isnan(step.worst)


def test_what_lies_beside_the_graph_must_stay_what_it_was() -> None:
    model = Sample()
    guard = Guard(model)
    for wrong in (False, True):
        counts = torch.tensor([4, 4, 4])
        with guard.step(0) as step:
            model(batch(0)).backward()
            counts[1] += wrong
            guard.check_equal("counts", counts, 4)
        found = [(alarm.sensor, alarm.module, alarm.reading) for alarm in step.alarms]
        assert found == ([("kept", "counts", 2.0)] if wrong else [])


def test_statistics_are_evidence_never_alarms() -> None:
    guard = Guard(Sample())
    for key in range(20):
        with guard.step(key) as step:
            step.observe("loss", 3.0 + 0.01 * (key % 5))
        assert step.clean
    with guard.step(20) as step:
        step.observe("loss", 30.0)
    assert step.clean
    assert step.evidence[0].z > 100
    with guard.step(20) as redo:
        redo.observe("loss", 3.02)
    assert abs(redo.evidence[0].z) < 2


def test_whatever_is_observed_for_the_statistics_alone_raises_no_alarm() -> None:
    """And what `observe` is given does, where it is not finite: the control."""
    guard = Guard(Sample())
    for key in range(20):
        with guard.step(key) as step:
            step.observe("loss", 3.0 + 0.01 * (key % 5))
            step.observe_all(("a", "b"), torch.tensor([1.0, 2.0 + 0.01 * (key % 3)]))
            step.observe_all(["c"], [4.0])
        assert (step.clean, step.checks) == (True, 1)
    flat = torch.ones(3)
    with guard.step(20) as step:
        guard.check_finite("gradients", flat)
        step.observe_all(("a", "b"), torch.tensor([math.nan, 1e30]))
        step.observe_all(["c"], [math.inf])
    assert (step.clean, step.checks) == (True, 1)
    assert [statistic.name for statistic in step.unusual(3)][2] == "b"
    assert step.unusual(3)[2].z > 1e6
    with guard.step(21) as step:
        step.observe("loss", math.inf)
    assert not step.clean
    with guard.step(22) as replay:
        replay.observe("loss", 3.0, remember=False)
    assert (replay.clean, replay.evidence) == (True, [])


def test_under_autocast_and_checkpointing() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    guard = Guard(model)
    with guard.step(0) as step:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = checkpoint(model, torch.randn(16, 32), use_reentrant=False).float().square().sum()
        loss.backward()
    assert step.clean
    assert step.checks >= 5  # two forwards, one dgrad, two wgrads; the recomputation adds its own


@pytest.mark.parametrize("bit", [0, 22, 30])
def test_what_autograd_keeps_is_watched(bit: int) -> None:
    """One bit of a saved activation flips between forward and backward: both sides of every product agree on it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.between = torch.relu(self.first(x))
            return self.second(self.between)

    model = Two()
    for again, seen in ((1.0, True), (0.0, False)):  # without the hash nobody sees it: the control
        guard = Guard(model, again=again)
        with guard.step(1) as clean:
            model(batch(0, 4, 8)).sum().backward()
        assert clean.clean
        with guard.step(1) as step:
            loss = model(batch(0, 4, 8)).sum()
            with quiet():  # as memory does: no operator of the step writes
                model.between.data.view(torch.int32)[1, 2] ^= 1 << bit
            loss.backward()
        assert {alarm.sensor for alarm in step.alarms} == ({"saved"} if seen else set())
