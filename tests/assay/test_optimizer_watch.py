"""What `assay.Guard` says of the optimizer: its updates, and the state that must stay what it wrote."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import assay
from diagnostics.sensors import upkeep


class Trained:
    """A model with its optimizer and guard, taking clean steps."""

    def __init__(self, budget: float | None = None, **kind: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, **kind)
        self.guard = assay.Guard(self.model, self.optimizer, budget)

    def step(self) -> list[assay.Alarm]:
        with self.guard.step() as step:
            self.model(torch.ones(4, 8)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return step.alarms


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_the_state_at_rest_is_watched(kind: dict[str, bool]) -> None:
    job = Trained(**kind)
    assert [job.step() for _ in range(5)] == [[]] * 5
    weight = job.model[1].weight
    weight.data.view(torch.int32)[2, 3] ^= 1  # the lowest bit of one element
    assert [(a.sensor, a.module) for a in job.step()] == [("at rest", "1.weight")]
    assert job.step() == []
    job.optimizer.state[weight]["exp_avg"].view(torch.int32)[0, 0] ^= 1 << 20
    assert [(a.sensor, a.module) for a in job.step()] == [("at rest", "1.weight.exp_avg")]
    job.model.load_state_dict({k: v * 2 for k, v in job.model.state_dict().items()})
    assert job.step() == []
    weight.data.mul_(2)
    job.guard.forget()
    assert job.step() == []


def test_a_wrong_update_is_seen_when_its_parameter_is_drawn() -> None:
    """The optimizer's own arithmetic, corrupted once at every step: seen in those where the drawn one is hit."""

    class WrongUpdate(TorchDispatchMode):
        hit = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.addcdiv_.default and not self.hit and args[0].shape == (16, 8):
                args[0].view(torch.int32)[3, 5] ^= 1 << 12
                self.hit = True
            return out

    job = Trained(foreach=False)
    job.step()
    seen = 0
    for _ in range(40):
        with job.guard.step() as step:
            job.model(torch.ones(4, 8)).square().sum().backward()
        seen += [a.sensor for a in step.alarms] == ["optimizer"]
        with WrongUpdate():
            job.optimizer.step()
        job.optimizer.zero_grad()
    assert 2 <= seen <= 25  # one of four parameters is drawn a step


def test_a_budget_samples_what_the_optimizer_wrote_and_coverage_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of every parameter flips between steps: those alarm that were drawn, and without a budget all of them."""
    shares = []
    for budget in (None, 1e6):  # so large that the share changes only where the test says so
        job = Trained(budget)
        job.guard.sampler.share = 1.0 if budget is None else 0.3
        monkeypatch.setattr(job.guard.sampler, "spent", lambda *_: None)
        alarms = []
        for _ in range(20):
            alarms += job.step()
            for p in job.model.parameters():
                p.data.view(torch.int32)[(0,) * p.dim()] ^= 1
        rows = {row.operation: row for row in job.guard.coverage() if row.module == "<optimizer>"}
        assert rows["at rest"].calls == 19 * 4 * 4  # parameter, two moments, count of steps
        assert rows["update"].calls == 19
        assert all(("not drawn" in row.reason) == (row.checked < 1) for row in rows.values())
        shares.append((len(alarms) / (19 * 4), rows["at rest"].checked, rows["update"].checked))
    assert shares[0] == (1, 1, 1)
    assert all(0.1 < share < 0.6 for share in shares[1])


@pytest.mark.parametrize("each", [0.0, 100.0])
def test_the_budget_counts_what_hashing_the_state_takes(monkeypatch: pytest.MonkeyPatch, each: float) -> None:
    now = 0.0

    def hashed(_: Tensor) -> int:
        nonlocal now
        now += each  # seconds by the clock below
        return 0

    monkeypatch.setattr(upkeep, "stamp", hashed)
    monkeypatch.setattr(upkeep, "time", SimpleNamespace(perf_counter=lambda: now))
    job = Trained(1e3)  # ample for everything else
    for _ in range(3):
        job.step()
    assert (job.guard.sampler.share < 0.05) == (each > 0)
