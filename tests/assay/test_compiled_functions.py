"""Functions under torch.compile give the same bits in a guarded step, compiled before it, or first of all within it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import assay
from diagnostics.sensors import guarded_step
from diagnostics.sensors.checks import registry
from diagnostics.sensors.watch import Eyes, Keeper

BACKENDS = ["eager", "aot_eager", *(["inductor"] if shutil.which("g++") else [])]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def plain(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x).sin().cos() * 2


def broken(inner: nn.Module, x: Tensor) -> Tensor:
    """In three pieces, with operators that run between them."""
    x = x.sin()
    torch._dynamo.graph_break()
    x = inner(x).cos() * 2
    torch._dynamo.graph_break()
    return (x @ x.mT).exp()


def run(inner: nn.Module, f: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    inner.zero_grad()
    x = X.clone().requires_grad_()
    y = f(inner, inner(x).tanh())
    y.sum().backward()
    return [y.detach(), *(p.grad.clone() for p in (x, *inner.parameters()) if p.grad is not None)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f", [plain, broken])
@pytest.mark.parametrize("when", ["ran before", "made before", "made within"])
def test_a_compiled_function_gives_its_own_bits(backend: str, f: Callable[..., Tensor], when: str) -> None:
    inner = model()
    want = run(inner, torch.compile(f, backend=backend))
    torch._dynamo.reset()
    compiled: Any = None if when == "made within" else torch.compile(f, backend=backend)
    if when == "ran before":
        run(inner, compiled)
    guard = assay.Guard(inner)
    for _ in range(3):
        with guard.step() as step:
            compiled = torch.compile(f, backend=backend) if compiled is None else compiled
            got = run(inner, compiled)
        assert step.clean, step.alarms
        assert equal(want, got)
    assert guard.failures == 0
    assert [row.operation for row in guard.coverage() if "torch.compile" in row.reason] == ["fused kernels"]
    assert all(row.checked == 1 for row in guard.coverage() if row.operation in ("mm", "addmm"))


class Counted:
    """A backend whose results are not those of what was written: twice as large."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return lambda *given: tuple(out * 2 if isinstance(out, Tensor) else out for out in graph(*given))


@pytest.mark.parametrize("before", [True, False])
def test_what_is_compiled_runs_compiled_and_is_compiled_once(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counted()
    compiled: Any = torch.compile(lambda x: x.sin().cos(), backend=backend)
    want = X.sin().cos() * 2
    if before:
        compiled(X)
    guard = assay.Guard(model())
    for _ in range(12):  # more than torch would compile one function anew
        with guard.step():
            assert torch.equal(compiled(X), want)
        assert torch.equal(compiled(X), want)
    assert backend.graphs == 1
    torch._dynamo.reset()
    monkeypatch.setattr(Eyes, "ignore_compile_internals", classmethod(lambda cls: False))
    with guard.step():
        assert torch.equal(compiled(X), X.sin().cos())  # the control: as it was written


class Traced(Keeper):
    """Does not step aside for the compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        depth = torch._C._len_torch_dispatch_stack()
        if not depth or torch._C._get_dispatch_stack_at(depth - 1) is self._eyes:
            return func(*args, **(kwargs or {}))
        return None


def test_the_compiler_must_not_trace_into_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin().cos() * 2

    guard = assay.Guard(model())
    monkeypatch.setattr(guarded_step, "has_compiled", lambda: False)  # as when the step itself compiles the first time
    with guard.step():
        assert torch.equal(torch.compile(f, backend="eager")(X), f(X))
    torch._dynamo.reset()
    monkeypatch.setattr(guarded_step, "Keeper", Traced)
    with guard.step():
        assert not torch.equal(torch.compile(f, backend="eager")(X), f(X))


def flex() -> Tensor:
    q = X.reshape(1, 1, 5, 8).repeat(1, 2, 1, 1)
    return flex_attention(q, q, q)  # type: ignore[no-any-return]


def cond() -> Tensor:
    return torch.cond(X.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (X,))  # type: ignore[no-any-return]


@pytest.mark.parametrize("f", [flex, cond])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_higher_order_operators_run_and_are_listed(
    f: Callable[[], Tensor], before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before:
        f()
    guard = assay.Guard(model())
    with guard.step() as step:
        got = f()
    assert step.clean
    assert torch.equal(got, f())
    assert guard.failures == 0
    listed = [row for row in guard.coverage() if "higher-order" in row.reason]
    assert [(row.operation, row.checked, row.calls) for row in listed] == [
        ("flex_attention" if f is flex else "cond", 0.0, 1)
    ]
    assert registry.plan_of(torch.ops.aten.sin.default) is not None
    monkeypatch.setattr(Eyes, "supports_higher_order_operators", False)
    with pytest.raises(NotImplementedError, match="HigherOrderOperator"), guard.step():
        f()
