"""What `assay.Guard` says of the optimizer: its updates, and the state that must stay what it wrote."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from struck import Struck
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import assay
from diagnostics.sensors import stopwatch, upkeep


class Trained:
    """A model with its optimizer and guard, taking clean steps."""

    def __init__(self, budget: float | None = None, **kind: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, **kind)
        self.guard = assay.Guard(self.model, self.optimizer, budget)

    def step(self, forget: bool = False) -> list[assay.Alarm]:
        with self.guard.step() as step:
            self.model(torch.ones(4, 8)).square().sum().backward()
        if forget:
            self.guard.forget()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return step.alarms

    def where(self) -> list[tuple[str, str]]:
        """Where a step's alarms are, which is committed all the same."""
        return [(alarm.sensor, alarm.module) for alarm in self.step()]


def flip(tensor: Tensor, bit: int = 0) -> None:
    tensor.data.view(torch.int32)[(0,) * tensor.dim()] ^= 1 << bit


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_the_state_at_rest_is_watched(kind: dict[str, bool]) -> None:
    job = Trained(**kind)
    assert [job.step() for _ in range(5)] == [[]] * 5
    weight = job.model[1].weight
    weight.data.view(torch.int32)[2, 3] ^= 1  # the lowest bit of one element
    assert job.where() == [("at rest", "1.weight")]
    job.guard.forget()
    assert job.step() == []
    job.optimizer.state[weight]["exp_avg"].view(torch.int32)[0, 0] ^= 1 << 20
    assert job.where() == [("at rest", "1.weight.exp_avg")]
    job.optimizer.load_state_dict(job.optimizer.state_dict())
    assert job.step() == []
    job.model.load_state_dict({k: v * 2 for k, v in job.model.state_dict().items()})
    assert job.step() == []
    weight.data.mul_(2)
    job.guard.forget()
    assert job.step() == []


@pytest.mark.parametrize("remembered", [True, False])
def test_what_was_found_wrong_stays_wrong_through_later_updates(remembered: bool) -> None:
    """Control: each step forgets what the one before was told, and training goes on from the flipped weight."""
    job = Trained()
    job.step()
    flip(job.model[1].weight)
    first = job.where()
    assert first == [("at rest", "1.weight")]
    for _ in range(4):
        assert job.guard.upkeep is not None
        if not remembered:
            job.guard.upkeep._told.clear()
        assert job.where() == (first if remembered else [])
    flip(job.model[0].bias)
    assert job.where() == [*(first if remembered else []), ("at rest", "0.bias")]


@pytest.mark.parametrize(("of", "cured"), [("parameter", "model"), ("moment", "optimizer")])
def test_only_what_is_loaded_is_right_again(of: str, cured: str) -> None:
    job = Trained()
    job.step()
    weight = job.model[0].weight
    saved = copy.deepcopy({"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()})
    flip(weight if of == "parameter" else job.optimizer.state[weight]["exp_avg"])
    assert len(job.where()) == 1
    for part in sorted(saved, key=lambda part: part == cured):
        getattr(job, part).load_state_dict(saved[part])
        assert len(job.where()) == (part != cured)


@pytest.mark.parametrize(("moments", "parts"), [(True, ["model", "optimizer"]), (False, ["model"])])
def test_a_wrong_update_stays_wrong_until_all_that_it_wrote_is_loaded(moments: bool, parts: list[str]) -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if moments else 0.0, foreach=False)
    guard = assay.Guard(model, optimizer)

    def look() -> list[str]:
        with guard.step() as step:
            model(torch.ones(2, 4)).sum().backward()
        assert step.corrupted is (step.alarms != [])
        return [alarm.sensor for alarm in step.alarms]

    assert look() == []
    optimizer.step()
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert look() == []
    with Struck(torch.ops.aten.add_, lambda out: flip(out, 12)):
        optimizer.step()
    for _ in range(3):
        assert look() == ["optimizer"]
        optimizer.step()
    for part in parts:
        assert look() == ["optimizer"]
        {"model": model, "optimizer": optimizer}[part].load_state_dict(saved[part])
    assert look() == []


def test_what_was_found_wrong_is_not_kept_alive() -> None:
    job = Trained()
    job.step()
    state = job.optimizer.state[job.model[0].weight]
    flip(state["exp_avg"])
    assert job.where() == [("at rest", "0.weight.exp_avg")]
    freed = weakref.ref(state["exp_avg"])
    state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    gc.collect()
    assert freed() is None
    assert job.where() == [("at rest", "0.weight.exp_avg")]  # until somebody says that the new one is right
    job.guard.forget()
    assert job.where() == []


def test_a_write_on_purpose_is_forgotten_before_or_after_its_alarm_and_a_wrong_update_is_not() -> None:
    job = Trained()
    job.step()
    for late in (False, True):
        job.model[0].weight.data.mul_(2)
        if not late:
            job.guard.forget()
        assert len(job.where()) == late
        job.guard.forget()
        assert job.where() == []
    assert job.guard.upkeep is not None
    job.guard.upkeep._judge(False, "0.weight", job.model[0].weight)  # the update that was made last
    job.guard.forget()  # a loop that writes after every update
    assert job.where() == [("optimizer", "0.weight")]


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
        job.guard.forget()
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
        monkeypatch.setattr(job.guard.sampler, "spent", lambda *_, **__: None)
        alarms = []
        for _ in range(20):
            alarms += job.step(forget=True)
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

    def clock() -> float:
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(upkeep, "stamp", hashed)
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=clock))
    job = Trained(5)  # ample for everything else
    for _ in range(3):
        job.step()
    assert (job.guard.sampler.chance < 0.05) == (each > 0)
