"""Where torch computes otherwise under a mode, a guarded step still gives the bits of an unguarded one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import assay
from diagnostics.sensors import watch

Run = Callable[[Tensor], list[Tensor]]


def first(f: Callable[[Tensor], Tensor]) -> Run:
    def run(x: Tensor) -> list[Tensor]:
        y = f(x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    return run


def second(f: Callable[[Tensor], Tensor]) -> Run:
    def run(x: Tensor) -> list[Tensor]:
        (g,) = torch.autograd.grad((f(x) * 1.3).sum(), x, create_graph=True)
        return [g.detach(), *torch.autograd.grad(g.sin().sum(), x)]

    return run


def filled(x: Tensor) -> Tensor:
    """The gradient is that of the value that is filled in."""
    return torch.linspace(0, 1, 16).repeat(64, 1).masked_fill(torch.arange(16) % 3 == 0, x.sum())


def filled_in_place(x: Tensor) -> Tensor:
    y = torch.linspace(0, 1, 16).repeat(64, 1) * x.mean()
    y[1:].masked_fill_(torch.arange(16) % 3 == 0, x.sum())
    return y


def from_below(f: Callable[[Tensor], Tensor]) -> Run:
    """Backwards by a door that no function mode sees, and no operator goes before."""

    def run(x: Tensor) -> list[Tensor]:
        y = f(x)
        torch.autograd.backward(y, torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        assert x.grad is not None
        return [x.grad]

    return run


RUNS: dict[str, Run] = {
    "prod": first(lambda x: x.prod(1)),
    "prod of all": second(lambda x: (x * 1.1).prod()),
    "prod twice": second(lambda x: x.prod(1)),
    "prod, backward": from_below(lambda x: x.prod(1)),
    "prod in a checkpoint": first(lambda x: checkpoint(lambda t: t.prod(1), x, use_reentrant=True)),  # type: ignore[no-any-return]
    "cumprod twice": second(lambda x: x.cumprod(1)),
    "determinants twice": second(lambda x: torch.linalg.det(x.reshape(64, 4, 4))),
    "max": first(lambda x: -x.max()),
    "min": first(lambda x: -x.min()),
    "median": first(lambda x: -x.median()),
    "filled": first(filled),
    "filled in place": first(filled_in_place),
}


def made(run: Run, model: nn.Module | None = None) -> tuple[list[Tensor], assay.Guard | None]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if model is None:
        return run(x), None
    guard = assay.Guard(model)
    with guard.step() as step:
        got = run(x)
    assert step.clean, step.alarms
    assert guard.failures == 0
    return got, guard


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Signs of zero too."""
    return all(torch.equal(p.view(torch.int32), q.view(torch.int32)) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_gradients_whose_formula_depends_on_modes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = made(RUNS[name])
    guarded, guard = made(RUNS[name], nn.Linear(2, 2))
    assert same(plain, guarded)
    assert guard is not None
    unseen = [row for row in guard.coverage() if "depends on whether a mode is active" in row.reason]
    assert unseen
    assert all(row.checked == 0 and row.calls > 0 for row in unseen)
    monkeypatch.setattr(watch, "_CHOOSES", frozenset())
    assert not same(plain, made(RUNS[name], nn.Linear(2, 2))[0])


class Idle(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_under_somebody_elses_mode_torch_takes_its_other_way_in_any_case() -> None:
    plain, _ = made(RUNS["prod"])
    with Idle():
        watched, _ = made(RUNS["prod"])
        guarded, guard = made(RUNS["prod"], nn.Linear(2, 2))
    assert not same(plain, watched)
    assert same(watched, guarded)
    assert guard is not None
    assert not any("whether a mode is active" in row.reason for row in guard.coverage())


def test_the_modes_come_back_when_a_node_raises() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    guard = assay.Guard(nn.Linear(2, 2))

    def refuse(results: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
        raise ZeroDivisionError

    with guard.step() as step:
        y = x.prod(1)
        y.mul(2)  # another operator: the node is known by now
        assert y.grad_fn is not None
        y.grad_fn.register_hook(refuse)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
        before = step.operators
        (x @ x).sum().backward()
        assert step.operators > before
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("module", ["layer", "encoder", "attention"])
def test_in_evaluation_torchs_transformer_takes_its_fast_path(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    model = {"layer": layer, "encoder": encoder, "attention": attention}[module].eval()
    x = torch.randn(2, 8, 32)
    given = (x, x, x) if module == "attention" else (x,)

    def run() -> Tensor:
        with torch.no_grad():
            out = model(*given)
        return out[0] if module == "attention" else out  # type: ignore[no-any-return]

    plain = run()
    guard = assay.Guard(model)
    with guard.step() as step:
        assert torch.equal(plain, run())
        assert torch._C._len_torch_function_stack() == 1
    assert step.clean
    fused = [row for row in guard.coverage() if row.operation.startswith(("_transformer_enc", "_native_multi"))]
    assert fused
    assert all(row.checked == 1 for row in fused)
    with pytest.raises((IndexError, AssertionError)), guard.step():
        model(*(torch.ones(()) for _ in given))
    assert torch._C._len_torch_function_stack() == 0

    monkeypatch.setattr(watch.Keeper, "follow", lambda *_: None)
    with guard.step():
        run()
    slow = assay.Guard(model)
    with slow.step():
        run()
    assert not any(row.operation.startswith(("_transformer_enc", "_native_multi")) for row in slow.coverage())


def test_in_training_the_transformer_is_guarded_as_ever() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 8, 32)

    def run() -> list[Tensor | None]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain = run()
    guard = assay.Guard(model)
    with guard.step() as step:
        got = run()
    assert step.clean
    assert all(p is not None and q is not None and torch.equal(p, q) for p, q in zip(plain, got, strict=True))


def test_complex_pseudo_inverses_and_residuals_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mode torch's own are wrong by their own size."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.complex64, requires_grad=True)

    def run() -> list[Tensor]:
        y = torch.linalg.pinv(x)
        (g,) = torch.autograd.grad(y.abs().sum(), x)
        solved = torch.linalg.lstsq(x.mT, torch.view_as_complex(torch.arange(20.0).reshape(5, 2, 2)), driver="gels")
        (h,) = torch.autograd.grad(solved.solution.abs().sum(), x)
        return [torch.view_as_real(each.detach()) for each in (y, g, h)] + [solved.residuals.detach()]

    plain = run()
    guard = assay.Guard(nn.Linear(2, 2))
    with guard.step() as step:
        assert same(plain, run())
    assert step.clean
    monkeypatch.setattr(watch, "_CONJUGATES", frozenset())
    with guard.step():
        wrong = run()
    assert not any(torch.allclose(a, b, rtol=0.01) for a, b in zip(plain, wrong, strict=True))
