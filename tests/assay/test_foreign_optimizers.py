"""Optimizers that are not torch's plain ones, and hooks about the step: no false alarm, no bit changed, none hidden."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from struck import Struck
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import assay
from diagnostics.sensors import twin
from diagnostics.sensors.coverage import CoverageRow
from diagnostics.sensors.upkeep import ARGUMENTS, CLOSURE, DRAWS, EARNED, NOT_BY_ITSELF, Upkeep

Make = Callable[[nn.Module], Optimizer]


class Noisy(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad + 1e-3 * torch.randn_like(p), alpha=-0.1)


class BornNoisy(SGD):
    """Draws when it is made, from every generator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn = (torch.rand(1), random.random(), np.random.rand())


class ClipsAll(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1e-3)
        super().step(closure)


class Projects(SGD):
    """Its base's hooks run within its own step once somebody has made one of the base."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(0.5)
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.clamp_(-0.1, 0.1)


class Plain(SGD):
    """Of each parameter by itself, but no class of torch's. Counts its steps where no state dict has them."""

    count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-0.1 / self.count)


def wrong_add() -> Struck:
    """A bit of every update."""
    return Struck(torch.ops.aten.add_, lambda out: out.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 12))


class Job:
    def __init__(self, make: Make, enabled: bool = True, after: Callable[[nn.Module, Optimizer], None] | None = None):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        self.optimizer = make(self.model)
        self.guard = assay.Guard(self.model, self.optimizer, enabled=enabled)
        if after is not None:
            after(self.model, self.optimizer)

    def look(self) -> list[str]:
        with self.guard.step() as step:
            self.model(torch.ones(6, 8)).square().mean().backward()
        return [alarm.sensor for alarm in step.alarms]

    def steps(self, count: int = 4) -> list[str]:
        """The alarms of as many steps, and of a last look."""
        found = []
        for _ in range(count):
            found += self.look()
            self.optimizer.step()
            self.optimizer.zero_grad()
        found += self.look()
        self.optimizer.zero_grad()
        return found

    def row(self, operation: str = "update") -> CoverageRow:
        return next(row for row in self.guard.coverage() if (row.module, row.operation) == ("<optimizer>", operation))


def generators() -> list[Tensor]:
    return [torch.rand(2), torch.tensor(random.random()), torch.tensor(np.random.rand())]


def results(job: Job) -> list[Tensor]:
    return [*job.model.parameters(), *generators()]


def by(kind: type[Optimizer], **options: Any) -> Make:
    return lambda model: kind(model.parameters(), **{"lr": 0.1} | options)


@pytest.mark.parametrize("broken", [None, "moved", "restore"])
@pytest.mark.parametrize("kind", [Noisy, BornNoisy])
def test_no_random_number_is_taken_from_the_training(
    kind: type[Optimizer], broken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls: nobody asks whether the step drew, or puts the generators back."""
    if broken is not None:
        monkeypatch.setattr(twin.Randomness, broken, lambda _: False)
    plain, guarded = Job(by(kind), enabled=False), None
    plain.steps()
    expected = results(plain)
    guarded = Job(by(kind))
    alarms = guarded.steps()
    equal = all(torch.equal(a, b) for a, b in zip(expected, results(guarded), strict=True))
    assert equal is (broken != ("moved" if kind is Noisy else "restore"))
    assert guarded.guard.failures == 0
    if broken is None:
        assert alarms == []
        assert (guarded.row().checked, guarded.row().reason) == ((0, DRAWS) if kind is Noisy else (1, ""))


def test_what_is_no_matter_of_one_parameter_is_listed_and_no_alarm() -> None:
    job = Job(by(ClipsAll))
    assert job.steps(EARNED + 4) == []
    assert (job.row().checked, job.row().reason) == (0, NOT_BY_ITSELF)


def test_a_step_within_a_step_is_one() -> None:
    SGD([nn.Parameter(torch.ones(1))])  # from here on torch calls the hooks in SGD.step, too
    job = Job(by(Projects))
    assert job.steps() == []
    assert (job.row().checked, job.row().calls, job.row("at rest").calls) == (1, 4, 16)
    assert max(float(p.detach().max()) for p in job.model.parameters()) == pytest.approx(0.1)


@pytest.mark.parametrize("after", [0, EARNED - 1, EARNED, EARNED + 5])
def test_a_class_that_is_not_torchs_earns_its_alarms(after: int) -> None:
    job = Job(by(Plain))
    assert job.steps(after) == []
    job.look()
    with wrong_add():
        job.optimizer.step()
    assert job.look() == (["optimizer"] if after >= EARNED else [])
    job.guard.forget()
    assert job.steps(3) == []
    assert (job.row().reason == NOT_BY_ITSELF) is (after < EARNED)
    job.look()
    with wrong_add():
        job.optimizer.step()
    assert job.look() == []
    asked = job.row()
    assert job.steps(3) == []  # once more, and its updates are not asked for again
    assert job.row().reason == NOT_BY_ITSELF
    assert job.row().calls == asked.calls + 3
    assert job.row().checked * job.row().calls == pytest.approx(asked.checked * asked.calls)


def clips(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)


def clamps(model: nn.Module, optimizer: Optimizer) -> None:
    def clamp(*_: Any) -> None:
        for p in model.parameters():
            p.data.clamp_(-0.1, 0.1)

    optimizer.register_step_post_hook(clamp)


@pytest.mark.parametrize("to_the_ends", [True, False])
@pytest.mark.parametrize("hook", [clips, clamps])
def test_hooks_that_were_registered_after_the_guard(
    hook: Callable[[nn.Module, Optimizer], None], to_the_ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the guard's stay where they were registered."""
    if not to_the_ends:
        monkeypatch.setattr(Upkeep, "_to_the_ends", lambda _: None)
    job = Job(by(SGD), after=hook)
    assert set(job.steps()) == (set() if to_the_ends else {"optimizer" if hook is clips else "at rest"})
    assert job.row().checked == 1


@pytest.mark.parametrize("copied", [True, False])
def test_what_a_gradient_scaler_leaves_with_the_optimizer(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the second optimizer does not get it."""
    if not copied:
        monkeypatch.setattr(twin, "_is_small", lambda _: False)
    job = Job(by(Adam, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for _ in range(4):
        with job.guard.step() as step:
            scaler.scale(job.model(torch.ones(6, 8)).square().mean()).backward()
        found += [alarm.sensor for alarm in step.alarms]
        scaler.step(job.optimizer)
        scaler.update()
        job.optimizer.zero_grad()
    assert set(found) == (set() if copied else {"optimizer"})
    assert job.row().checked == 1


def test_what_a_step_is_called_with() -> None:
    job = Job(by(SGD))
    for given, reason in (((None,), ""), ((lambda: None,), CLOSURE)):
        assert job.look() == []
        job.optimizer.step(*given)
        assert job.look() == []
        assert job.row().reason == reason

    class Scaled(Plain):
        def step(self, closure: Any = None, scale: float | None = None) -> None:
            super().step(closure)

    job = Job(by(Scaled))
    assert job.look() == []
    job.optimizer.step(scale=2.0)  # type: ignore[call-arg]
    assert job.look() == []
    assert job.row().reason == ARGUMENTS


def test_a_step_that_fails_and_is_made_again_is_no_alarm() -> None:
    class Fails(Plain):
        fail = False

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            if self.fail:
                raise KeyError

    job = Job(by(Fails))
    assert job.steps(2) == []
    job.look()
    job.optimizer.step()
    job.optimizer.fail = True  # type: ignore[attr-defined]
    with pytest.raises(KeyError):
        job.optimizer.step()
    job.optimizer.fail = False  # type: ignore[attr-defined]
    job.optimizer.step()  # to the guard a step within the one that failed
    assert job.steps(2) == []
    assert (job.row().checked, job.row().calls, job.row("at rest").calls) == (1, 5, 16)


def test_hooks_of_every_optimizer_do_not_hear_of_the_second_one() -> None:
    heard = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: heard.append(optimizer))
    try:
        job = Job(by(SGD))
        assert job.steps(3) == []
    finally:
        handle.remove()
    assert heard == [job.optimizer] * 3
    assert job.row().checked == 1
