"""No false alarm where a recomputation rightly differs, or runs otherwise than the forward did."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from checkpointed import Block, Flip, Stack, compared, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from diagnostics.sensors import fingerprints
from diagnostics.sensors.fingerprints import UNMATCHED
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.origins import Origins

REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


def step_of(guard: Guard, run: Callable[[], Any], key: int = 1) -> tuple[int, int]:
    """How much a clean step compares, and how much of what it made again it does not."""
    with guard.step(key) as step:
        run()
    assert step.alarms == []
    assert guard.failures == 0
    return len(compared(guard)), step.skipped.get(UNMATCHED, 0)


def alarms_of(guard: Guard, run: Callable[[], Any]) -> set[str]:
    with guard.step(1) as step:
        run()
    return {alarm.sensor for alarm in step.alarms}


@REENTRANT
def test_dropout_is_compared_where_the_numbers_are_drawn_again(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tokens()
    counts = {}
    for preserve in (True, False):
        model = Stack(dropout=0.5, use_reentrant=reentrant, preserve_rng_state=preserve)
        counts[preserve] = step_of(Guard(model, again=0), lambda model=model: model(x).backward())
    assert counts[True][1] == 0
    assert counts[False][0] < counts[True][0]
    assert counts[False][1] > 0
    # The control: if numbers were taken for the same that are not, all that is made of them would alarm.
    monkeypatch.setattr(fingerprints, "_content", lambda t: ("holds", t.nbytes))
    assert alarms_of(Guard(model, again=0), lambda: model(x).backward()) == {"fingerprint"}


def test_a_fault_behind_a_dropout_is_seen() -> None:
    model, x = Stack(dropout=0.5, use_reentrant=True), tokens()
    with Flip("addmm", 2), Guard(model, again=0).step(1) as step:
        model(x).backward()
    assert [(a.sensor, a.module) for a in step.alarms] == [("fingerprint", "blocks.0.down")]


def test_with_and_without_early_stop() -> None:
    model, x = Stack(use_reentrant=False), tokens()
    early = step_of(Guard(model, again=0), lambda: model(x).backward())
    with set_checkpoint_early_stop(False):
        late = step_of(Guard(model, again=0), lambda: model(x).backward())
    assert late[0] == early[0] + 4  # of each block the last product and the residual stream's sum
    assert early[1] == late[1] == 0


@REENTRANT
@pytest.mark.parametrize("inner", [True, False])
def test_nested_regions(reentrant: bool, inner: bool) -> None:
    torch.manual_seed(0)
    first, second = Block(24), Block(24)

    def outer(x: Tensor) -> Tensor:
        return second(checkpoint(first, x, use_reentrant=inner).tanh())

    guard = Guard(nn.ModuleList([first, second]), again=0)

    def run() -> None:
        checkpoint(outer, tokens(), use_reentrant=reentrant).square().mean().backward()

    made, unmatched = step_of(guard, run)
    assert unmatched == 0
    assert compared(guard).count(("0", "silu")) >= 1
    assert compared(guard).count(("1", "silu")) >= 1
    assert made > 14
    with Flip("silu", 0), guard.step(1) as step:
        run()
    assert {(a.sensor, a.module, a.operation) for a in step.alarms} == {("fingerprint", "0", "silu")}


def every_other(counts: dict[Any, int], ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    counts[func] = counts.get(func, 0) + 1
    return CheckpointPolicy.MUST_SAVE if counts[func] % 2 else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("policy", ["products", "every other call"])
def test_a_policy_that_keeps_some_results(policy: str) -> None:
    """What is kept is not made again; what is made of it is compared, since it still is what the forward made."""
    chosen: Any = [torch.ops.aten.addmm.default] if policy == "products" else partial(every_other, {})
    contexts = partial(create_selective_checkpoint_contexts, chosen)
    model, x = Stack(use_reentrant=False, context_fn=contexts), tokens()
    guard = Guard(model, again=0)
    made, unmatched = step_of(guard, lambda: model(x).backward())
    assert unmatched == 0
    operations = {operation for _, operation in compared(guard)}
    assert made >= 6
    if policy == "products":
        assert operations >= {"silu", "mul", "add", "native_layer_norm"}
        assert "addmm" not in operations


@REENTRANT
def test_autocast_whose_casts_are_cached_over_two_batches(reentrant: bool) -> None:
    model, x = Stack(use_reentrant=reentrant), tokens()
    guard = Guard(model, again=0)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [model(x), model(x + 1)]
        for loss in losses:
            loss.backward()

    _, unmatched = step_of(guard, run)
    assert unmatched == 0
    assert compared(guard).count(("blocks.1", "silu")) == 2
    with Flip("silu", 1), guard.step(1) as step:
        run()
    assert [(a.module, a.operation) for a in step.alarms] == [("blocks.1", "silu")]


@REENTRANT
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_of_transformers(reentrant: bool, attention: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).train()
    ids = torch.randint(0, 64, (2, 12))

    def grads() -> list[Tensor]:
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=ids, labels=ids).loss.backward()
    plain = grads()
    guard = Guard(model, again=0)
    made, unmatched = step_of(guard, lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert all(torch.equal(a, b) for a, b in zip(plain, grads(), strict=True))
    assert made > 40
    assert unmatched == 0
    with Flip("silu", 0), guard.step(1) as step:
        model(input_ids=ids, labels=ids).loss.backward()
    assert [(a.sensor, a.module) for a in step.alarms] == [("fingerprint", "model.layers.0.mlp.act_fn")]


class Remembers(nn.Module):
    """A state that its own forward changes: the recomputation reads another one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0
        self.register_buffer("state", torch.ones(24))
        self.linear = nn.Linear(24, 24)
        if how == "spectral norm":
            self.linear = nn.utils.parametrizations.spectral_norm(self.linear)
        if how == "batch norm":
            self.norm = nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.how == "in place":
            y = y * self.state.clone()  # autograd would refuse what was written since it was saved
            with torch.no_grad():
                self.state.add_(0.5)
        elif self.how == "through data":
            y = y * self.state
            self.state.data.copy_(y.detach().mean(0))
        elif self.how == "another tensor":
            y = y * self.state
            self.state = self.state * 1.5
        elif self.how == "a number":
            self.calls += 1
            y = y * (1.0 / self.calls)
        elif self.how == "batch norm":
            y = self.norm(y)
        elif self.how == "not written":
            room = torch.empty(48, 24)
            room[:10].copy_(y)
            y = y + (room * 0 + room)[:10]
        elif self.how == "own numbers":
            y = y + torch.rand(10, 24, generator=GENERATOR)
        return F.silu(y) * 2


GENERATOR = torch.Generator().manual_seed(0)
STATES = [
    "in place",
    "through data",
    "another tensor",
    "a number",
    "batch norm",
    "spectral norm",
    "not written",
    "own numbers",
]


@REENTRANT
@pytest.mark.parametrize("how", STATES)
def test_a_state_that_the_forward_changed_is_no_fault(how: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Remembers(how), tokens()
    guard = Guard(model, again=0)
    for key in range(3):
        made, _ = step_of(guard, lambda: checkpoint(model, x, use_reentrant=reentrant).square().mean().backward(), key)
    assert made > 0 or how == "spectral norm"


def test_who_heard_of_no_write_would_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: writes through `.data` show in no count of autograd's."""
    monkeypatch.setattr(Origins, "wrote", lambda self, t: None)
    monkeypatch.setattr(
        Origins, "call", lambda self, t, name, call=Origins.call: t.shape == (24,) or call(self, t, name)
    )
    model, x = Remembers("through data"), tokens()

    def run() -> None:
        checkpoint(model, x, use_reentrant=True).square().mean().backward()

    assert alarms_of(Guard(model, again=0), run) == {"fingerprint"}


def test_a_backward_within_a_region_and_two_backwards_of_one_graph() -> None:
    torch.manual_seed(0)
    block = Block(24)

    def inner(x: Tensor) -> Tensor:
        y = block(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return (y * grad).tanh()

    def run() -> None:
        with set_checkpoint_early_stop(False):
            checkpoint(inner, tokens(), use_reentrant=False).sum().backward()
        loss = checkpoint(block, tokens(), use_reentrant=False).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    made, _ = step_of(Guard(block, again=0), run)
    assert made > 14


class Twice(torch.autograd.Function):
    """A function of autograd that was written by hand: its forward runs without gradients, also when made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x) * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 2 * (1 - torch.tanh(x).square())


@REENTRANT
def test_a_function_that_was_written_by_hand(reentrant: bool) -> None:
    linear = nn.Linear(24, 24)

    def region(x: Tensor) -> Tensor:
        return F.silu(Twice.apply(linear(x)) * torch.tensor(0.5)) * 3

    def run() -> None:
        checkpoint(region, tokens(), use_reentrant=reentrant).sum().backward()

    guard = Guard(linear, again=0)
    _, unmatched = step_of(guard, run)
    assert unmatched == 0
    assert {operation for _, operation in compared(guard)} >= {"addmm", "tanh", "mul"}
    for at in range(2):
        with Flip("tanh", at), guard.step(1) as step:
            run()
        assert [a.operation for a in step.alarms] == ["tanh"]


@REENTRANT
def test_a_router_that_fills_what_it_asked_for(reentrant: bool) -> None:
    """The inverse of a permutation is put into empty memory: what follows is compared, as it holds the same again."""
    model = nn.ModuleList(Block(24) for _ in range(2))
    order = torch.randperm(10)

    def region(at: int, x: Tensor) -> Tensor:
        way_home = torch.empty_like(order)
        way_home[order] = torch.arange(10)
        return model[at](x[order])[way_home]

    def run() -> None:
        x = tokens()
        for at in range(2):
            x = checkpoint(region, at, x, use_reentrant=reentrant)
        x.square().sum().backward()

    guard = Guard(model, again=0)
    step_of(guard, run)
    assert {("0", "silu"), ("1", "silu")} <= set(compared(guard))
    assert compared(guard).count(("<unnamed>", "index")) == (4 if reentrant else 2)


def test_inputs_that_were_moved_away_and_back_are_others() -> None:
    model, x = Stack(use_reentrant=False), tokens()
    guard = Guard(model, again=0)

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            loss = model(x)
        loss.backward()

    made, unmatched = step_of(guard, run)
    assert made == 0
    assert unmatched > 0
