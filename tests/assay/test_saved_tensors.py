"""What autograd saves under a guard: torch's own rules hold as without one, and only a device's faults are alarms."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import graph

import assay
from diagnostics.sensors import aside, saved
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.written import Written

AUTOGRAD: Any = torch._C._autograd


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def gradients(of: nn.Module) -> list[Tensor]:
    return [p.grad for p in of.parameters() if p.grad is not None]


def reasons(guard: assay.Guard) -> list[str]:
    return [row.reason for row in guard.coverage() if row.operation.startswith("saved tensor") and row.checked < 1]


@contextmanager
def without_gc() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parameter(m: nn.Sequential, hidden: Tensor) -> Tensor:
    return m[2].weight


def result(m: nn.Sequential, hidden: Tensor) -> Tensor:
    return hidden


def view(m: nn.Sequential, hidden: Tensor) -> Tensor:
    return hidden.t()[1]


def hidden_to_autograd(m: nn.Sequential, hidden: Tensor) -> Tensor:
    return hidden.data


@pytest.mark.parametrize("again", [1.0, 1 / 16, 0.0, None])
@pytest.mark.parametrize("what", [parameter, result, view, hidden_to_autograd])
def test_what_was_modified_in_place_is_torchs_own_error(
    what: Callable[[nn.Sequential, Tensor], Tensor], again: float | None
) -> None:
    """None: unguarded. A write through `.data` is none to torch, drawn or not."""
    m = model()
    guard = None if again is None else assay.Guard(m, again=again)
    raises = nullcontext() if what is hidden_to_autograd else pytest.raises(RuntimeError, match="by an inplace operat")
    with raises, guard.step() if guard is not None else nullcontext():
        hidden = m[1](m[0](torch.randn(3, 4)))
        loss = m[2](hidden).sum()
        loss.backward(retain_graph=True)
        with torch.no_grad():
            what(m, hidden).mul_(2)
        loss.backward()


def test_data_that_is_replaced_is_followed_as_torch_does() -> None:
    """The gradient by x is that of the new values, and no alarm says so."""
    found = []
    for enabled in (False, True):
        m, x = nn.ParameterList([torch.eye(4)]), torch.ones(3, 4, requires_grad=True)
        guard = assay.Guard(m, enabled=enabled)
        with guard.step() as step:
            loss = (x @ m[0]).sum()
            m[0].data = torch.full((4, 4), 3.0)
            loss.backward()
        assert step.clean
        found.append(x.grad)
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], torch.full((3, 4), 12.0))
    assert torch.equal(found[0], found[1])
    assert saved.REWRITTEN in reasons(guard)


@pytest.mark.parametrize("kept_itself", [False, True])
def test_a_graph_without_a_backward_is_freed_at_once(kept_itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the garbage collector, which knows nothing of tensors' sizes. Control: the saved result itself is kept."""
    if kept_itself:
        monkeypatch.setattr(saved, "_without_graph", lambda tensor: tensor)
    m = model()
    guard = assay.Guard(m)
    with without_gc():
        with guard.step():
            metric = m(torch.randn(6, 4)).exp()
            made = weakref.ref(metric)
            del metric
            alive = made() is not None
        assert alive is kept_itself


def test_gradients_of_gradients_are_those_of_an_unguarded_step() -> None:
    found = []
    for enabled in (False, True):
        m, x = model(), torch.ones(3, 4, requires_grad=True)
        with assay.Guard(m, enabled=enabled).step() as step:
            (slope,) = torch.autograd.grad(m(x).exp().sum(), x, create_graph=True)
            slope.square().sum().backward()
        assert step.clean
        assert x.grad is not None
        found.append([x.grad, *gradients(m)])
    assert len(found[0]) == 1 + 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def squared(m: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = m(x).square().sum()
    return out


def disabled(m: nn.Module, x: Tensor) -> Tensor:
    with graph.disable_saved_tensors_hooks("none of these here"):
        squared(m, x).backward()
    return gradients(m)[0]


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(lambda x: squared(m, x))(x),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "gradients of each sample": lambda m, x: torch.func.vmap(torch.func.grad(lambda x: squared(m, x)))(x),
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](x)[0],
    "hooks disabled": disabled,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_guard_steps_aside_where_hooks_may_not_stand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transform, m, x = TRANSFORMS[name], model(), torch.randn(3, 4)
    plain = transform(m, x).clone()
    m.zero_grad()
    guard = assay.Guard(m)
    with guard.step() as step:
        assert torch.equal(transform(m, x), plain)
        m.zero_grad()
        squared(m, x).backward()  # here the hooks stand again
    assert step.clean
    assert guard.failures == 0
    assert any(reason.startswith("saved tensors: no hooks may stand here") for reason in reasons(guard))
    assert any(row.operation == "saved tensor" and row.checked == 1 for row in guard.coverage())
    monkeypatch.setattr(aside, "_patch", lambda: None)
    monkeypatch.setattr(aside, "_restore", lambda: None)
    with pytest.raises(RuntimeError, match=r"saved tensor hooks|none of these"), guard.step():
        transform(m, x)


def test_torchs_functions_are_its_own_again_after_a_step_that_failed() -> None:
    before, registers = graph.disable_saved_tensors_hooks, AUTOGRAD.SavedTensor.register_hooks
    guard, during = assay.Guard(model()), []

    def fails() -> None:
        with guard.step():
            during.append(graph.disable_saved_tensors_hooks)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert during[0] is not before
    assert graph.disable_saved_tensors_hooks is before
    assert AUTOGRAD.SavedTensor.register_hooks is registers


@pytest.mark.parametrize("outer", [graph.save_on_cpu, graph.allow_mutation_on_saved_tensors])
def test_others_hooks_are_not_replaced(outer: Callable[[], Any]) -> None:
    m = model()
    guard = assay.Guard(m)
    with outer():
        top = AUTOGRAD._top_saved_tensors_default_hooks(True)
        with guard.step() as step:
            assert AUTOGRAD._top_saved_tensors_default_hooks(True) == top
            m(torch.ones(3, 4)).sum().backward()
    assert step.clean
    assert any("other hooks" in reason for reason in reasons(guard))


def test_others_hooks_on_one_saved_tensor_take_it_over() -> None:
    m, seen = model(), []
    guard = assay.Guard(m)

    def half(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor / 2

    with guard.step() as step:
        out = m(torch.ones(3, 4)).exp()
        out.grad_fn._raw_saved_result.register_hooks(half, lambda packed: packed * 2)
        with pytest.raises(RuntimeError, match="already been set"):
            out.grad_fn._raw_saved_result.register_hooks(half, half)
        out.sum().backward()
    assert step.clean
    assert torch.equal(seen[0], out)
    assert len(gradients(m)) == 4


def fake(m: nn.Module) -> None:
    with FakeTensorMode():
        weight = torch.empty(4, 4, requires_grad=True)
        (weight @ torch.ones(4, 4)).exp().sum().backward()


TRACED: dict[str, Callable[[nn.Module], Any]] = {
    "fake tensors": fake,
    "export": lambda m: torch.export.export(m, (torch.ones(3, 4),)),
    "meta tensors": lambda m: nn.Linear(4, 4, device="meta")(torch.ones(3, 4, device="meta")).exp().sum().backward(),
}


@pytest.mark.parametrize("name", TRACED)
def test_what_has_no_values_passes_by(name: str) -> None:
    m = model()
    guard = assay.Guard(m)
    with guard.step() as step:
        TRACED[name](m)
        m(torch.ones(3, 4)).sum().backward()
    assert step.clean
    assert guard.failures == 0


class Codebook(nn.Module):
    """Moves a slice of its buffer in the forward, as vector quantisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("book", torch.randn(2, 8, 4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        out = torch.zeros_like(hidden)
        for each in self.book:
            out = out + (hidden @ each.t()).softmax(1) @ each
            each.data.lerp_(torch.zeros_like(each), 0.1)
            out = out * (hidden @ each.t()).mean()  # saved again, at the same version
        return out


NORM = nn.BatchNorm1d(4)  # of nobody that the guard knows

WRITERS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]]] = {
    "batch norm": lambda: (nn.Linear(4, 4), lambda m, x: NORM(m(x)) + NORM(x)),
    "instance norm": lambda: (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), lambda m, x: m(x[None])),
    "random slopes": lambda: (nn.Sequential(nn.Linear(4, 4), nn.RReLU()), lambda m, x: m(x)),
    "codebook": lambda: (Codebook(), lambda m, x: m(x)),
}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_what_operators_write_unknown_to_autograd_is_no_alarm(
    name: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: nobody tells the guard of such writes either."""
    if not told:
        monkeypatch.setattr(Written, "note", lambda *_: None)
    torch.manual_seed(1)
    m, forward = WRITERS[name]()
    guard = assay.Guard(m)
    with guard.step() as step:
        forward(m, torch.randn(3, 4)).square().sum().backward()
    assert {alarm.sensor for alarm in step.alarms} == (set() if told else {"saved"})
    assert guard.failures == 0
    assert any(saved.REWRITTEN in reason for reason in reasons(guard)) is told


@pytest.mark.parametrize("spoilt", [False, True])
def test_statistics_that_are_used_and_not_written_are_compared(spoilt: bool) -> None:
    m, norm = nn.Linear(4, 4), nn.BatchNorm1d(4).eval()
    guard = assay.Guard(m)
    with guard.step() as step:
        loss = norm(m(torch.randn(3, 4))).sum()
        if spoilt:
            with quiet():
                norm.running_var.data.view(torch.int32)[1] ^= 1 << 20
        loss.backward()
    assert {alarm.sensor for alarm in step.alarms} == ({"saved"} if spoilt else set())
