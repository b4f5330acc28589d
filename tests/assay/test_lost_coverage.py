"""What a guard cannot judge, and what fails in it, is counted and said, and training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, SparseAdam

import assay
from diagnostics.sensors import saved, twin, upkeep
from diagnostics.sensors.checks import gemm, recompute
from diagnostics.sensors.readings import ReadingLog

REASON = "a sensor's own fault"


def fails(*_: Any) -> Any:
    raise ZeroDivisionError(REASON)


def reasons(guard: assay.Guard) -> dict[str, str]:
    return {row.operation: row.reason for row in guard.coverage() if row.checked < 1}


def train(
    model: nn.Module, optimizer: Optimizer, guard: assay.Guard, batch: Callable[[], Tensor], steps: int = 6
) -> None:
    for _ in range(steps):
        with guard.step() as step:
            model(batch()).square().sum().backward()
        assert step.clean, step.alarms
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("owner", "name", "failures"),
    [
        (gemm, "row_readings", 8),  # forward and two gradients of two layers, less one that nobody asks for
        (recompute, "gives_again", 5),
        (saved, "stamp", 1),
        (upkeep, "stamp", 1),
        (twin, "same", 1),
        (upkeep, "differ", 1),
        (ReadingLog, "append", 10),
    ],
)
def test_a_sensor_that_fails_is_lost_coverage_and_no_more(
    owner: Any, name: str, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, second = (nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(2))
    second.load_state_dict(model.state_dict())
    optimizer, x = AdamW(model.parameters()), torch.randn(4, 8)
    guard = assay.Guard(model, optimizer)
    train(model, optimizer, guard, lambda: x, 2)
    assert guard.failures == 0
    monkeypatch.setattr(owner, name, fails)
    train(model, optimizer, guard, lambda: x, 2)
    assert guard.failures >= failures
    guard.step()  # where what the optimizer's checks did is asked
    with guard.step():
        pass
    assert any(REASON in reason for reason in reasons(guard).values())
    plain = AdamW(second.parameters())
    for _ in range(4):
        second(x).square().sum().backward()
        plain.step()
        plain.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def test_a_step_whose_every_check_fails_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadingLog, "append", fails)
    guard, model = assay.Guard(nn.Linear(8, 8), again=0.0), nn.Linear(8, 8)
    with guard.step() as step:
        model(torch.ones(2, 8))
    assert step.clean
    assert (step.checks, step.failures, guard.failures) == (0, 1, 1)


class Scaled(nn.Module):
    """With a parameter that has no dimension, as CLIP's logit_scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * self.scale
        return out


def test_a_parameter_without_dimensions_is_repeated_as_any_other() -> None:
    model = Scaled()
    optimizer = AdamW(model.parameters())
    guard = assay.Guard(model, optimizer)
    train(model, optimizer, guard, lambda: torch.randn(4, 8), 12)
    assert guard.failures == 0
    assert set(reasons(guard)) == {"randn"}


class SparselyWeighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.eye(8).to_sparse()), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.sparse.mm(self.weight, x) + self.bias
        return out


@pytest.mark.parametrize("kind", ["gradient", "parameter"])
def test_what_is_sparse_in_an_optimizer_is_listed(kind: str) -> None:
    model: nn.Module = nn.Sequential(nn.Embedding(32, 8, sparse=True)) if kind == "gradient" else SparselyWeighted()
    optimizer: Optimizer = SparseAdam(model.parameters()) if kind == "gradient" else SGD(model.parameters(), lr=0.1)
    guard = assay.Guard(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: sparse tensors are experimental
        train(model, optimizer, guard, lambda: torch.randint(32, (4,)) if kind == "gradient" else torch.randn(8, 8))
    assert guard.failures == 0
    found = reasons(guard)
    assert "torch.sparse_coo" in found["update"]
    assert ("at rest" in found) == (kind == "parameter")


def test_quantised_tensors_are_listed() -> None:
    """Of one that is made within the step even a look at its bits would end the process."""
    model = nn.Linear(8, 8)
    guard = assay.Guard(model)
    with guard.step() as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = torch.quantize_per_tensor(torch.randn(4, 8), 0.1, 0, torch.qint8)
        (
            model(codes.dequantize()).sum()
            + torch.quantize_per_channel(torch.randn(4, 8), torch.full((4,), 0.1), torch.zeros(4), 0, torch.qint8)
            .dequantize()
            .sum()
        ).backward()
    assert step.clean
    assert guard.failures == 0
    found = reasons(guard)
    for name in ("quantize_per_tensor", "quantize_per_channel", "dequantize"):
        assert found[name] == "a quantised tensor"


def test_nested_tensors_are_listed() -> None:
    model = nn.Linear(8, 8)
    guard = assay.Guard(model)
    with guard.step() as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
        model(rows).to_padded_tensor(0.0).sum().backward()
    assert step.clean
    assert guard.failures == 0
    assert "a nested tensor" in reasons(guard).values()
