"""Two real gloo ranks under DistributedDataParallel: what alarmed on one of them is committed on none."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import assay
from diagnostics.sensors import agreement, loops
from diagnostics.sensors.agreement import Agreement

WORLD = 2
STEPS = 4
STRUCK = 1


class Strike(TorchDispatchMode):
    """One element of every product is wrong."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            out.view(-1)[0] += 100
        return out


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
        fault: AbstractContextManager[Any] = Strike() if struck else nullcontext()
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
        if flipped and number == STRUCK and job.rank == 0:
            next(job.model.parameters()).data.view(torch.int32)[0, 0] ^= 1
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
}


def _rank(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("assay").addHandler(handler)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    found = {}
    for name, run in CASES.items():
        lines.clear()
        job = Job(rank)
        found[name] = run(job) | {"weights": job.weights, "log": list(lines)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


Found = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found in each case; both are started once for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diagnostics.sensors.loops"])
    processes = [context.Process(target=_rank, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * WORLD
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


def test_a_process_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    guard = assay.Guard(model)
    monkeypatch.setattr(dist, "all_reduce", None)
    for fault in (nullcontext(), Strike()):
        with guard.step() as step, fault:
            model(torch.ones(3, 4)).sum().backward()
        assert assay.clean_everywhere(step) is step.clean is isinstance(fault, nullcontext)


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
