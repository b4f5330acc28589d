"""What a guarded step leaves behind is what an unguarded one does: buffers, gradients, the process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from struck import Struck
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import assay
from diagnostics.sensors.checks import recompute


def left_by(model: nn.Module, work: Callable[[], Any], guard: assay.Guard | None) -> list[Tensor]:
    """Gradients and buffers after two steps, and whatever the work returns."""
    torch.manual_seed(0)
    model.zero_grad()
    found: list[Any] = []
    for _ in range(2):
        if guard is None:
            found.append(work())
        else:
            with guard.step() as step:
                found.append(work())
            assert step.clean, step.alarms
            assert guard.failures == 0, guard.coverage()
    kept = [*model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [t.detach().clone() for t in (*kept, *found) if isinstance(t, Tensor)]


def normalising(kind: type[nn.Module], *shape: int) -> tuple[nn.Module, Callable[[], Any]]:
    model = nn.Sequential(kind(6), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(shape)
    model(x)
    return model, lambda: model(x).square().mean().backward()


def recurrent(kind: Any, hidden: int) -> tuple[nn.Module, Callable[[], Any]]:
    model = kind(4, hidden)
    x = torch.randn(5, 3, 4)
    return model, lambda: model(x)[0].square().mean().backward()


def written(work: Callable[[Tensor], Any]) -> tuple[nn.Module, Callable[[], Any]]:
    """Work on a fresh matrix, which it returns."""
    x = torch.randn(8, 16)

    def run() -> Tensor:
        mine = x.clone()
        work(mine)
        return mine

    return nn.Linear(2, 2), run


def labelled() -> tuple[nn.Module, Callable[[], Any]]:
    """Targets of several lengths: paths of the shorter ones leave memory unwritten."""
    model = nn.Linear(8, 12)
    x, targets = torch.randn(20, 3, 8), torch.randint(1, 12, (3, 9))
    lengths = torch.tensor([20, 14, 7]), torch.tensor([9, 4, 2])
    return model, lambda: F.ctc_loss(model(x).log_softmax(-1), targets, *lengths).backward()


def zeros() -> tuple[nn.Module, Callable[[], Any]]:
    """torch's gradient of sgn is zeros that have no memory: to read them would end the process."""
    model, x = nn.Linear(4, 4), torch.randn(3, 4)

    def work() -> None:
        y = model(x)
        (y.sgn() * y).sum().backward()

    return model, work


def measured_twice() -> tuple[nn.Module, Callable[[], Any]]:
    x, w = torch.zeros(32, 32), torch.randn(32, 32)

    def work() -> Tensor:
        x.data.zero_()
        first = x @ w
        x.data.copy_(torch.arange(1024.0).view(32, 32))  # which no version counts
        return first + x @ w

    return nn.Linear(2, 2), work


CASES: dict[str, Callable[[], tuple[nn.Module, Callable[[], Any]]]] = {
    "batch norm": lambda: normalising(nn.BatchNorm1d, 5, 6),
    "batch norm of images": lambda: normalising(nn.BatchNorm2d, 3, 6, 4, 4),
    "instance norm": lambda: normalising(lambda n: nn.InstanceNorm1d(n, track_running_stats=True), 3, 6, 5),  # type: ignore[arg-type]
    "GRU of 16": lambda: recurrent(nn.GRU, 16),
    "GRU of 20": lambda: recurrent(nn.GRU, 20),
    "LSTM of 16": lambda: recurrent(nn.LSTM, 16),
    "a part in place": lambda: written(lambda x: x[:, :10].sigmoid_()),
    "a part as out": lambda: written(lambda x: torch.sigmoid(x[:, :10], out=x[:, :10])),
    "its own running sum": lambda: written(lambda x: torch.cumsum(x, 1, out=x)),
    "its own order": lambda: written(lambda x: torch.sort(x, 1, out=(x, torch.empty(8, 16, dtype=torch.long)))),
    "memory nobody wrote": lambda: written(lambda x: torch.empty_permuted((300, 300), (1, 0))),
    "CTC": labelled,
    "zeros without memory": zeros,
    "written past its version": measured_twice,
}


@pytest.mark.parametrize("again", [1.0, 1 / 16])
@pytest.mark.parametrize("case", CASES)
def test_a_guarded_step_leaves_what_an_unguarded_one_leaves(case: str, again: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model, work = CASES[case]()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        plain = left_by(model, work, None)
        model.load_state_dict(start)
        guarded = left_by(model, work, assay.Guard(model, again=again))
    assert len(plain) == len(guarded)
    assert all(torch.equal(a, b) for a, b in zip(plain, guarded, strict=True))


def test_running_statistics_would_be_updated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an operator that is run again on what it writes to."""
    torch.manual_seed(1)
    model, work = normalising(nn.BatchNorm1d, 5, 6)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    plain = left_by(model, work, None)
    model.load_state_dict(start)
    monkeypatch.setattr(recompute, "_with_copies", lambda func, args, kwargs: (args, kwargs))
    guard = assay.Guard(model)
    for _ in range(2):
        with guard.step():
            work()
    assert not torch.equal(plain[0], next(model.buffers()))


def scaled(name: str) -> Struck:
    """One operator's results without dimensions."""
    return Struck(getattr(torch.ops.aten, name), lambda out: out.dim() or out.mul_(1e6))


@pytest.mark.parametrize("name", ["_to_copy", "clone", "copy_"])
def test_a_copy_of_one_number_is_compared(name: str) -> None:
    work: dict[str, Callable[[Tensor], Tensor]] = {
        "_to_copy": lambda loss: loss.double(),
        "clone": lambda loss: loss.clone(),
        "copy_": lambda loss: torch.zeros(()).copy_(loss),
    }
    model = nn.Linear(4, 4)
    for struck in (True, False):
        with scaled(name) if struck else nullcontext(), assay.Guard(model).step() as step:
            work[name](model(torch.ones(3, 4)).square().mean()).backward()
        assert step.clean != struck


def test_statistics_that_were_written_wrong_alarm() -> None:
    class Wrong(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "native_batch_norm":
                args[3].view(torch.int32)[2] ^= 1
            return out

    model = nn.BatchNorm1d(6)
    with Wrong(), assay.Guard(model).step() as step:
        model(torch.randn(5, 6)).square().mean().backward()
    assert {alarm.operation.partition(".")[0] for alarm in step.alarms} == {"native_batch_norm"}
