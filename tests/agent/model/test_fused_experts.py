"""A layer's experts as one operation: each product is checked, faults lie below the checks, idle experts stay alone."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from agent.model import PRESETS
from agent.model.fused import Weights, routed_experts
from agent.model.moe import MoE
from diagnostics.faults.inject import Injector
from diagnostics.faults.spec import KINDS, OPS, FaultSpec, Kind, Op
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.guarded_step import GuardedStep

experts_module = importlib.import_module("agent.model.fused.experts")
CONFIG = replace(PRESETS["tiny"].config, hidden_size=32, moe_intermediate_size=24)
DTYPES = [torch.float32, torch.bfloat16]
KINDS_OF_PRODUCT = ("gate", "up", "down")


class Layers(nn.Module):
    """Named as the model names its layers; only the routed experts hang below them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        moe = MoE(CONFIG, dtype)
        generator = torch.Generator().manual_seed(1)
        for parameter in moe.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": moe.experts})])
        self._run = moe._routed
        self.dtype = dtype

    def forward(self, sizes: list[int]) -> Tensor:
        """[sum(sizes), hidden] drawn -> loss."""
        rows = torch.randn(sum(sizes), CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
        return self._run(rows.to(self.dtype).requires_grad_(), sizes).float().square().mean()


BUSY = [64] * CONFIG.n_routed_experts
SOME = [64, 0, 0, 128, 0, 0, 0, 64]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def guarded(model: Layers, sizes: list[int], key: int = 1) -> GuardedStep:
    guard = Guard(model)
    with guard.step(key) as step:
        model(sizes).backward()
    return step


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_product_is_checked_under_its_name_and_no_bit_changes(dtype: torch.dtype) -> None:
    model = Layers(dtype)
    model(SOME).backward()
    clean = gradients(model)
    guard = Guard(model, tolerance_scale=1e-30)  # so that every check alarms and says where it was
    with guard.step(1) as step:
        model(SOME).backward()
    assert not step.skipped
    sites = Counter((alarm.module, alarm.pass_) for alarm in step.alarms)
    busy = [number for number, size in enumerate(SOME) if size]
    names = [f"layers.0.experts.{number}.{kind}" for number in busy for kind in KINDS_OF_PRODUCT]
    assert sites == Counter(itertools.product(names, OPS))
    assert guarded(model, SOME).clean
    model.zero_grad()
    model(SOME).backward()
    found = gradients(model)
    assert found.keys() == clean.keys() == {f"{name}.weight" for name in names}
    assert all(torch.equal(found[name], clean[name]) for name in clean)


def test_without_the_announcement_a_weight_s_gradient_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a guard sees the operator, of which no operand is a weight."""
    model = Layers(torch.float32)
    for announced, named in ((True, 24), (False, 0)):
        if not announced:
            monkeypatch.setattr(experts_module, "watchers", lambda weight: ())
        guard = Guard(model)
        with guard.step(1):
            model(BUSY).backward()
        rows = [row for row in guard.coverage() if row.operation == "mm" and row.pass_ == "wgrad"]
        assert len([row for row in rows if row.checked == 1.0]) == named


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "fault"), list(itertools.product(OPS, KINDS)))
def test_every_fault_is_seen_where_it_happened(dtype: torch.dtype, op: Op, fault: Kind) -> None:
    model = Layers(dtype)
    guard = Guard(model)
    for seed in range(4):
        with Injector(model, FaultSpec(0, op, fault, 30, seed)) as injector, guard.step(seed) as step:
            model(SOME).backward()
        assert injector.fired is not None
        assert injector.fired["dtype"] == str(dtype).removeprefix("torch.")
        assert [(a.module, a.pass_) for a in step.alarms][:1] == [(injector.fired["module"], op)]


@pytest.mark.parametrize("op", OPS)
def test_every_product_of_every_expert_can_be_hit(op: Op) -> None:
    """Whichever the seed draws: all gates are made before the first down, and none is taken for having been idle."""
    model, hit = Layers(torch.float32), set()
    for seed in range(160):
        with Injector(model, FaultSpec(0, op, "tile", seed=seed)) as injector:
            model(BUSY).backward()
        assert injector.fired is not None
        hit.add(injector.fired["module"])
    assert len(hit) == 3 * CONFIG.n_routed_experts


def test_what_is_checked_is_what_the_input_s_gradient_is_made_of() -> None:
    """A fault in any dgrad, those of gate and up that are summed among them, reaches the gradient."""
    model = Layers(torch.float32)
    rows = torch.randn(64, CONFIG.hidden_size, requires_grad=True)
    sizes = [64] + [0] * 7

    def by_rows() -> Tensor:
        return torch.autograd.grad(model._run(rows, sizes).square().sum(), rows)[0]

    clean, hit = by_rows(), set()
    for seed in range(12):
        with Injector(model, FaultSpec(0, "dgrad", "tile", seed=seed)) as injector:
            spoiled = by_rows()
        assert injector.fired is not None
        hit.add(injector.fired["module"].rpartition(".")[2])
        assert not torch.equal(spoiled, clean)
    assert hit == set(KINDS_OF_PRODUCT)
    assert torch.equal(by_rows(), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_get_gradients_of_their_own_type_in_equal_bits(dtype: torch.dtype) -> None:
    model = Layers(dtype)
    model(BUSY).backward()
    first = gradients(model)
    model(BUSY).backward()
    again = gradients(model)
    assert all(grad.dtype == torch.float32 for grad in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_nobody_has_rows() -> None:
    model = Layers(torch.float32)
    out = model._run(torch.zeros(0, CONFIG.hidden_size, requires_grad=True), [0] * 8)
    out.sum().backward()
    assert out.shape == (0, CONFIG.hidden_size)
    assert not gradients(model)


@pytest.mark.parametrize("sizes", [[3], [3, 1], [3, 2, 0], [2, 2], []])
def test_sizes_that_are_not_those_of_the_rows_are_refused(sizes: list[int]) -> None:
    one = Weights(torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(6, 4))
    assert routed_experts(torch.zeros(5, 6), [3, 2], [one, one]).shape == (5, 6)
    with pytest.raises(ValueError, match="sizes"):
        routed_experts(torch.zeros(5, 6), sizes, [one, one])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_the_last_bit_of_a_product_is_seen_by_making_it_again(dtype: torch.dtype, op: Op) -> None:
    model = Layers(dtype)
    for again, clean in ((1.0, False), (0.0, True)):  # the second is the control: below the identity's floor
        guard = Guard(model, again=again)
        with (
            Injector(model, FaultSpec(0, op, "bitflip", 0 if dtype == torch.float32 else 16, seed=2)) as injector,
            guard.step(1) as step,
        ):
            model(SOME).backward()
        assert injector.fired is not None
        assert step.clean is clean
        assert {alarm.sensor for alarm in step.alarms} == (set() if clean else {"recompute"})
        assert not guard.failures
