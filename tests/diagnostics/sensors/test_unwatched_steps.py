"""Where watching every operator costs more than the budget allows, whole steps go unwatched, and coverage says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from diagnostics.sensors import spending
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.sampling import NOT_WATCHED, Sampler
from diagnostics.sensors.spending import Spending
from diagnostics.sensors.stopwatch import Stopwatch
from diagnostics.sensors.watch import Eyes


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching an operator takes a second by the account, whatever it takes here."""
    monkeypatch.setattr(spending, "watching", lambda looking_s, operators: 1.0 * operators)


class Trained:
    """A model with its guard, of which one step in four is watched once the first is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.guard = Guard(self.model, self.optimizer, budget=0.01)
        self.guard.sampler.period = 4
        monkeypatch.setattr(self.guard.sampler, "spent", lambda *_, **__: None)

    def steps(self, count: int) -> Iterator[tuple[bool, Any]]:
        """Each step, and whether it was watched."""
        for _ in range(count):
            watched = self.guard.sampler.watches
            with self.guard.step() as step:
                assert isinstance(_get_current_dispatch_mode(), Eyes) == watched
                self.model(torch.ones(4, 8)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield watched, step


def test_a_step_that_is_not_drawn_runs_as_if_there_were_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Trained(monkeypatch)
    found = list(job.steps(64))
    assert 4 < sum(watched for watched, _ in found) < 32
    assert all(step.clean and (step.checks > 0) == step.watched == watched for watched, step in found)
    assert all(step.operators > 0 for watched, step in found if watched)
    share = sum(watched for watched, _ in found) / 64
    rows = job.guard.coverage()
    assert {row.checked for row in rows if row.operation in ("addmm", "mm", "tanh")} == {share}
    assert all(NOT_WATCHED in row.reason for row in rows)
    rest = next(row for row in rows if row.operation == "at rest")
    assert 0 < rest.checked <= share  # the first step has no update before it


def test_a_guard_without_a_budget_watches_all_steps_and_coverage_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Trained(monkeypatch)
    job.guard.sampler.period = 1
    assert all(watched for watched, _ in job.steps(8))
    assert not any(NOT_WATCHED in row.reason for row in job.guard.coverage())


class Wrong(TorchDispatchMode):
    """Every product is wrong in one element."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            out[0, 0] += 100
        return out


def test_a_defect_that_stays_is_seen_when_its_step_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Trained(monkeypatch)
    with Wrong():
        for watched, step in job.steps(32):
            assert step.clean != watched


def test_what_was_found_wrong_at_rest_is_said_by_unwatched_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit flips between each two steps: unseen before an unwatched one, and once seen said by all later ones."""
    job, found = Trained(monkeypatch), []
    weight = job.model[0].weight
    for watched, step in job.steps(32):
        found.append((watched, bool(step.corrupted)))
        if len(found) > 1:  # the first update is at rest for step 1, which is drawn or not
            weight.data.view(torch.int32)[0, 0] ^= 1
    first = found.index(next(each for each in found if each[1]))
    assert found[first][0]
    assert all(corrupted for _, corrupted in found[first:])
    assert not any(corrupted for _, corrupted in found[:first])


def test_a_step_too_small_for_its_budget_is_watched_now_and_then(dear: None) -> None:
    model = nn.Linear(4, 4)
    guard = Guard(model, budget=0.01)
    for _ in range(3):
        with guard.step():
            model(torch.ones(2, 4)).sum().backward()
    assert guard.sampler.period > 1 == guard.sampler.share
    assert not guard.sampler.watches


class Device(Stopwatch):
    """A span of a device that is through when the test says so."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.done = seconds, False

    @property
    def launched(self) -> bool:
        return True

    @property
    def through(self) -> bool:
        return self.done

    def taken(self) -> float:
        return self.seconds


def test_of_a_device_a_watched_step_costs_what_it_takes_longer_than_the_others() -> None:
    """Whatever the host's clock says; and nothing waits for the device."""
    sampler = Sampler(0.01)
    account, clocks = Spending(sampler, None), []
    for _ in range(2000):
        watched = sampler.watches
        clocks.append(Device((5.0 if clocks else 1e3) if watched else 1.0))  # the first compiles its kernels
        account.over(clocks[-1], watched, 1e-3, 1e-3, 100)
        if len(clocks) > 1:
            clocks[-2].done = True  # one step behind
            account.settle()
    assert sampler.share == 1.0
    assert sampler.period == 1024  # 4 / (0.5 * 0.01) = 800


def test_a_device_that_is_behind_is_not_waited_for() -> None:
    sampler = Sampler(0.01)
    account, first, late = Spending(sampler, None), Device(5.0), Device(5.0)
    first.done = True
    account.over(first, True, 1e-3, 1e-3, 100)
    account.over(late, True, 1e-3, 1e-3, 100)
    for _ in range(10):
        account.over(Device(1.0), sampler.watches, 1e-3, 1e-3, 100)
    assert sampler.period == 1
    late.done = True
    account.settle()
    assert sampler.period > 1


def test_a_stopwatch_counts_each_span_once() -> None:
    clock, cpu = Stopwatch(), torch.device("cpu")
    with pytest.raises(ValueError, match="of the work"), clock.running(cpu):
        raise ValueError("of the work")
    assert clock.taken() > 0.0 == clock.taken()
    clock.end()  # nothing is under way
    assert (clock.taken(), clock.through, clock.launched) == (0.0, True, False)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the state's hashes were asked of."""
    from diagnostics.sensors import upkeep

    asked: list[Tensor] = []
    stamp = upkeep.stamp
    monkeypatch.setattr(upkeep, "stamp", lambda value: (asked.append(value), stamp(value))[1])
    return asked


def test_the_optimizer_is_looked_at_before_a_watched_step_only(
    monkeypatch: pytest.MonkeyPatch, hashed: list[Tensor]
) -> None:
    job = Trained(monkeypatch)
    counts, watched = [0], []
    for drawn, _ in job.steps(32):
        watched.append(drawn)
        counts.append(len(hashed))
    each = 4 * 4  # parameter, two moments, count of steps
    for step in range(1, 31):  # hashed after the update before it, and compared as it begins
        assert counts[step + 1] - counts[step] == each * (watched[step] + watched[step + 1])
