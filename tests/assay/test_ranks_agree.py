"""Two real gloo ranks under DistributedDataParallel: what alarmed on one of them is committed on none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_start import join, start
from struck import plus, product
from torch import nn

import assay
from diagnostics.sensors import agreement, loops
from diagnostics.sensors.agreement import Agreement

WORLD = 2
STEPS = 4
STRUCK = 1


class Job:
    """A replica; its rank's samples; a product struck on rank 0 in one step."""

    def __init__(self, rank: int) -> None:
        torch.manual_seed(0)
        self.rank = rank
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.parallel = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.weights = [self._weights()]  # before each step, and at the end

    def gradients(self, number: int) -> None:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(10 * number + self.rank))
        struck = number == STRUCK and self.rank == 0
        fault: AbstractContextManager[Any] = product(None, plus(100.0)) if struck else nullcontext()
        with fault:
            self.parallel(x).square().mean().backward()

    def end(self) -> None:
        self.optimizer.zero_grad()
        self.weights.append(self._weights())

    def _weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])


def by_callback(job: Job, flipped: bool = False) -> dict[str, Any]:
    """flipped: a weight's lowest bit changes on rank 0 after the struck step."""
    control = SimpleNamespace(should_training_stop=False)
    stops = []
    told: list[list[str]] = []
    callback = assay.TrainerCallback(on_alarm=lambda step: told.append([a.sensor for a in step.alarms[:1]]))
    callback.on_train_begin(None, None, None, model=job.parallel, optimizer=job.optimizer)
    for number in range(STEPS):
        callback.on_step_begin(None, None, None)
        job.gradients(number)
        callback.on_pre_optimizer_step(None, None, control, optimizer=job.optimizer)
        stops.append(control.should_training_stop)
        job.optimizer.step()
        job.end()
        if flipped and number == STRUCK:
            flip(job)
    callback.on_train_end(None, None, None)
    return {"dropped": callback.dropped, "told": told, "stops": stops}


def by_callback_alone(job: Job, flipped: bool = False) -> dict[str, Any]:
    """The control: every rank decides by itself."""
    agree = loops.agree
    loops.agree = lambda step: Agreement(  # type: ignore[assignment]
        None if step.clean else job.rank, job.rank if step.corrupted else None
    )
    try:
        return by_callback(job, flipped)
    finally:
        loops.agree = agree


def flip(job: Job) -> None:
    """On rank 0 a weight's lowest bit."""
    if job.rank == 0:
        next(job.model.parameters()).data.view(torch.int32)[0, 0] ^= 1


def ending(job: Job) -> dict[str, Any]:
    """An own loop that ends on every rank in the step after the flip; `alone`: where each would have by itself."""
    guard = assay.Guard(job.parallel, job.optimizer)
    steps, alone = [], []
    for number in range(STEPS):
        with guard.step() as step:
            job.gradients(STEPS + number)  # none of them struck
        steps.append(number)
        alone.append(step.corrupted)
        if assay.clean_everywhere(step):
            job.optimizer.step()
        elif assay.corrupted_anywhere(step):
            break
        job.end()
        if number == STRUCK:
            flip(job)
    return {"steps": steps, "alone": alone}


def asked(job: Job, group: dist.ProcessGroup | None) -> str:
    """What asking raises where rank 0 cannot read its step."""
    guard = assay.Guard(job.parallel)
    with guard.step() as step:
        job.gradients(0)
    if job.rank == 0:
        guard.log.worst = cannot_be_read  # type: ignore[method-assign]
    try:
        assay.clean_everywhere(step, group)
    except RuntimeError as error:
        return str(error)
    return ""


def cannot_be_read() -> float:
    raise RuntimeError("out of memory")


def unread(job: Job) -> dict[str, Any]:
    return {"raised": asked(job, None)}


def unread_alone(job: Job) -> dict[str, Any]:
    """The control: rank 0 raises and does not take part."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    send = agreement._first_ranks
    if job.rank == 0:
        agreement._first_ranks = lambda *_: []
    try:
        return {"raised": asked(job, group)}
    finally:
        agreement._first_ranks = send


def once(job: Job) -> dict[str, Any]:
    """How many collectives there were after each question; the ranks ask in different orders."""
    guard = assay.Guard(job.parallel)
    with guard.step() as step:
        job.gradients(0)
    reduce, made, after = dist.all_reduce, [], []
    dist.all_reduce = lambda *given: made.append(reduce(*given))
    try:
        questions = [assay.clean_everywhere, assay.corrupted_anywhere, assay.clean_everywhere]
        for question in questions[job.rank :] + questions[: job.rank]:
            question(step)
            after.append(len(made))
    finally:
        dist.all_reduce = reduce
    return {"collectives": after}


def lost(job: Job) -> dict[str, Any]:
    """Rank 0 ends within the step, after its gradients are summed."""
    guard = assay.Guard(job.parallel)
    with guard.step() as step:
        job.gradients(0)
    if job.rank == 0:
        return {}
    try:
        assay.clean_everywhere(step)
    except RuntimeError as error:
        return {"raised": str(error)}
    return {"raised": ""}


def by_hand(clean: Callable[[assay.GuardedStep], bool]) -> Callable[[Job], dict[str, Any]]:
    def run(job: Job) -> dict[str, Any]:
        guard = assay.Guard(job.parallel, job.optimizer)
        dropped = 0
        for number in range(STEPS):
            with guard.step() as step:
                job.gradients(number)
            if clean(step):
                job.optimizer.step()
            else:
                dropped += 1
            job.end()
        return {"dropped": dropped}

    return run


CASES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "callback": by_callback,
    "callback, each alone": by_callback_alone,
    "flipped": partial(by_callback, flipped=True),
    "flipped, each alone": partial(by_callback_alone, flipped=True),
    "own loop": by_hand(assay.clean_everywhere),
    "own loop, each alone": by_hand(lambda step: step.clean),
    "own loop, ended": ending,
    "unread": unread,
    "unread, each alone": unread_alone,
    "once": once,
    "lost": lost,  # the last: there is no group left
}


def _rank(rank: int, folder: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("assay").addHandler(handler)
    join(rank, WORLD, folder)
    found = {}
    for name, run in CASES.items():
        lines.clear()
        job = Job(rank)
        found[name] = run(job) | {"weights": job.weights, "log": list(lines)}
    torch.save(found, folder / f"{rank}.pt")
    if rank == 0:
        os._exit(0)


Found = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found in each case; both are started once for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    start(_rank, WORLD, folder, preload="diagnostics.sensors.loops", seconds=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", ["callback", "own loop"])
def test_a_step_that_alarmed_on_one_rank_is_committed_on_none(ranks: Found, case: str) -> None:
    for found in ranks:
        weights = found[case]["weights"]
        assert found[case]["dropped"] == 1
        assert [torch.equal(a, b) for a, b in pairwise(weights)] == [number == STRUCK for number in range(STEPS)]
    here, there = (found[case]["weights"] for found in ranks)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("case", ["callback", "own loop"])
def test_ranks_that_decide_alone_differ_for_ever(ranks: Found, case: str) -> None:
    """The control: the averaged gradient is committed on the rank that saw nothing."""
    assert [found[f"{case}, each alone"]["dropped"] for found in ranks] == [1, 0]
    here, there = (found[f"{case}, each alone"]["weights"] for found in ranks)
    equal = [torch.equal(a, b) for a, b in zip(here, there, strict=True)]
    assert equal == [number <= STRUCK for number in range(STEPS + 1)]
    agreed = ranks[1][case]["weights"]
    assert not torch.equal(there[STRUCK + 1], agreed[STRUCK + 1])


def test_a_rank_that_saw_nothing_says_which_one_did(ranks: Found) -> None:
    assert [len(found["callback"]["log"]) for found in ranks] == [1, 1]
    assert "the first: Alarm(sensor='gemm'" in ranks[0]["callback"]["log"][0]
    assert "it alarmed on rank 0, not on this one" in ranks[1]["callback"]["log"][0]
    assert [found["callback"]["told"] for found in ranks] == [[["gemm"]], []]
    assert ranks[0]["own loop"]["log"] == []  # the loop has the alarms
    assert "it alarmed on rank 0, not on this one" in ranks[1]["own loop"]["log"][0]


def test_all_ranks_stop_when_the_state_of_one_is_wrong(ranks: Found) -> None:
    """Control: alone the other one goes on, and would wait for the first for ever."""
    stops = [number > STRUCK for number in range(STEPS)]
    assert [found["flipped"]["stops"] for found in ranks] == [stops, stops]
    assert [found["flipped, each alone"]["stops"] for found in ranks] == [stops, [False] * STEPS]
    here, there = ([line for line in found["flipped"]["log"] if "corrupted" in line] for found in ranks)
    assert "0.weight first (at rest), 1 in all" in here[0]
    assert "on rank 0, not on this one" in there[0]


def test_a_loop_of_ones_own_ends_on_all_ranks_in_the_same_step(ranks: Found) -> None:
    """Control: by itself the other rank would not have ended, and waited for the first for ever."""
    assert [found["own loop, ended"]["steps"] for found in ranks] == [[0, 1, 2]] * WORLD
    assert [found["own loop, ended"]["alone"] for found in ranks] == [[False, False, True], [False] * 3]
    told = [[line for line in found["own loop, ended"]["log"] if "corrupted" in line] for found in ranks]
    assert told == [[], ["the state itself is corrupted on rank 0, not on this one"]]


def test_where_one_rank_cannot_read_its_step_all_raise(ranks: Found) -> None:
    """Control: a rank that raises and takes no part leaves the other waiting until its group gives up."""
    here, there = (found["unread"]["raised"] for found in ranks)
    assert here == "out of memory"
    assert there == "rank 0 could not read whether its step is clean: its own error says why"
    here, there = (found["unread, each alone"]["raised"] for found in ranks)
    assert here == "out of memory"
    assert "imed out" in there


def test_over_gloo_a_rank_that_ended_is_known_at_once(ranks: Found) -> None:
    raised = ranks[1]["lost"]["raised"]  # closed or reset, as it happens
    assert raised
    assert "imed out" not in raised


def test_ranks_speak_once_of_a_step(ranks: Found) -> None:
    assert [found["once"]["collectives"] for found in ranks] == [[1, 1, 1]] * WORLD


def test_a_process_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    guard = assay.Guard(model)
    monkeypatch.setattr(dist, "all_reduce", None)
    for fault in (nullcontext(), product(None, plus(100.0))):
        with guard.step() as step, fault:
            model(torch.ones(3, 4)).sum().backward()
        assert assay.clean_everywhere(step) is step.clean is isinstance(fault, nullcontext)
        assert assay.corrupted_anywhere(step) is step.corrupted is False


def test_ranks_agree_about_whole_steps_only() -> None:
    model = nn.Linear(4, 4)
    guard = assay.Guard(model)
    with guard.step() as step:
        model(torch.ones(3, 4)).sum().backward()
        with pytest.raises(RuntimeError, match="after its `with` block, on every rank"):
            assay.clean_everywhere(step)
    with pytest.raises(RuntimeError, match="never entered"):
        assay.clean_everywhere(guard.step())


@pytest.mark.parametrize(
    ("backends", "near", "taken"),
    [
        ("cpu:gloo,cuda:gloo", "cuda:3", "cuda:3"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cuda:nccl", "cuda:3", "cuda:3"),
        ("cuda:nccl", "cpu", "cuda"),  # parameters on the host, gradients over NCCL
    ],
)
def test_the_number_lies_where_the_backend_takes_it(
    backends: str, near: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda _: backends)
    assert agreement._device(torch.device(near), None) == torch.device(taken)
