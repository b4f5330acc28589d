"""Announced products: checked in all passes against what the kernel saw; faults lie below; bits stay as they are."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.model.linear import Linear
from diagnostics.faults.inject import Injector
from diagnostics.faults.spec import KINDS, OPS, FaultSpec, Kind, Op
from diagnostics.sensors.announced import Announced, announce, watchers
from diagnostics.sensors.coverage import NothingToCheck
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.guarded_step import GuardedStep


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = Linear(width, 2 * width, torch.float8_e4m3fn)
        self.down = Linear(2 * width, width, torch.float8_e4m3fn)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Sample(nn.Module):
    """[tokens, 96] -> scalar loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 96)
        self.layers = nn.ModuleList(Layer(96) for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def batch() -> Tensor:
    return torch.randn(70, 96, generator=torch.Generator().manual_seed(7))


def gradients(model: Sample) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def test_every_pass_is_checked_and_no_bit_changes() -> None:
    model = Sample()
    model(batch()).backward()
    clean = gradients(model)
    guard = Guard(model, again=0)
    with guard.step(1) as step:
        model(batch()).backward()
    assert all(torch.equal(a, b) for a, b in zip(clean, gradients(model), strict=True))
    assert step.clean
    assert not step.skipped
    assert step.checks == 4 * 3 + 2  # first's input needs no gradient


@pytest.mark.parametrize("guard_first", [True, False])
@pytest.mark.parametrize(("op", "fault"), list(itertools.product(OPS, KINDS)))
def test_every_fault_is_seen_where_it_happened(op: Op, fault: Kind, guard_first: bool) -> None:
    """Whichever of the two was entered first, the fault lies below the sensor."""
    model = Sample()
    guard = Guard(model)
    for seed in range(4):
        injector = Injector(model, FaultSpec(seed % 2, op, fault, 20, seed))
        step: GuardedStep = guard.step(seed)
        around = (step, injector) if guard_first else (injector, step)
        with around[0], around[1]:
            torch.autograd.backward(model(batch()))
        assert injector.fired is not None
        assert injector.fired["module"].startswith(f"layers.{seed % 2}.")
        assert [(a.module, a.operation, a.pass_) for a in step.alarms][:1] == [(injector.fired["module"], "fp8", op)]


@pytest.mark.parametrize("op", OPS)
def test_without_sensors_the_fault_changes_the_gradients_unseen(op: Op) -> None:
    """The negative control, and the proof that the fault is real."""
    model = Sample()
    model(batch()).backward()
    clean = gradients(model)
    with Injector(model, FaultSpec(0, op, "tile", seed=3)) as injector, Guard(model, enabled=False).step(1) as step:
        model(batch()).backward()
    assert injector.fired is not None
    assert step.clean
    assert any(not torch.equal(a, b) for a, b in zip(clean, gradients(model), strict=True))


def test_after_the_injector_closed_nothing_is_corrupted() -> None:
    model = Sample()
    model(batch()).backward()
    clean = gradients(model)
    with Injector(model, FaultSpec(0, "wgrad", "tile", seed=3)) as injector:
        loss = model(batch())
    loss.backward()
    assert injector.fired is None
    assert all(torch.equal(a, b) for a, b in zip(clean, gradients(model), strict=True))


def test_the_check_compares_with_what_the_kernel_saw() -> None:
    """Against the operands before they were quantised the same clean product would alarm: the control."""
    weight = nn.Parameter(torch.randn(40, 96))
    guard = Guard(nn.ParameterList([weight]))
    left, right = torch.randn(64, 96), weight.detach().t()
    rounded = left.to(torch.float8_e4m3fn).float()
    for shown, clean in ((rounded, True), (left, False)):
        with guard.step(1) as step:
            seen = Announced("fp8", "fprop", weight, lambda shown=shown: (shown, right))  # type: ignore[misc]
            announce(seen, rounded @ right, watchers(weight))
        assert step.clean is clean


def test_a_kernel_without_a_tolerance_is_skipped_and_said() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    guard = Guard(nn.ParameterList([weight]), again=0)
    with pytest.raises(NothingToCheck, match="unheard"), guard.step(1):
        announce(Announced("unheard", "fprop", weight, lambda: (weight, weight)), torch.eye(4), watchers(weight))
    assert ("unheard", 0.0) in [(row.operation, row.checked) for row in guard.coverage()]


def test_nobody_watches() -> None:
    assert watchers(nn.Parameter(torch.zeros(1))) == ()


def test_what_can_be_made_again_is_compared_bit_for_bit() -> None:
    """The last bit of one element lies far below the identity's floor; without `again`, the control, it is not seen."""
    weight = nn.Parameter(torch.randn(40, 96))
    guard = Guard(nn.ParameterList([weight]))
    left, right = torch.randn(64, 96), weight.detach().t()
    for again, alarms in ((lambda: left @ right, ["recompute"]), (None, [])):
        out = left @ right
        out.view(torch.int32)[3, 5] ^= 1
        with guard.step(1) as step:
            announce(Announced("mm", "fprop", weight, lambda: (left, right), again), out, watchers(weight))
        assert [alarm.sensor for alarm in step.alarms] == alarms
