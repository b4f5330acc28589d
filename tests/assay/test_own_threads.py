"""Threads of one's own: what runs there is not seen, and the coverage says so."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import nn

import assay

X = torch.ones(3, 4)


def aside(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_forward_in_another_thread_is_listed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    stranger = nn.Linear(4, 4)
    guard = assay.Guard(model)
    with guard.step() as step:
        aside(lambda: (model[0](X), stranger(X)))
        model[1](X).sum().backward()
    assert step.clean
    rows = guard.coverage()
    assert [(row.module, row.operation, row.calls) for row in rows if "other than the one" in row.reason] == [
        ("0", "forward", 0)
    ]
    assert [(row.module, row.calls) for row in rows if row.operation == "addmm"] == [("1", 1)]

    plain = assay.Guard(model)  # the control: in the step's own thread
    with plain.step():
        model(X).sum().backward()
    assert not any("thread" in row.reason for row in plain.coverage())
    aside(lambda: model(X))  # and outside of a step
    assert not any("thread" in row.reason for row in plain.coverage())


def test_a_replica_of_data_parallel_training_is_listed() -> None:
    model = nn.Linear(4, 4)
    replica = model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    replica.weight, replica.bias = model.weight.clone(), model.bias.clone()
    guard = assay.Guard(model)
    with guard.step():
        aside(lambda: replica(X))
        model(X).sum().backward()
    assert [row.module for row in guard.coverage() if "thread" in row.reason] == ["Linear"]


def test_another_threads_modules_do_not_lend_their_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ReLU()})
    here, there = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            here.set()
            assert there.wait(60)
            return x

    model["waits"] = Waits()
    guard = assay.Guard(model)
    with guard.step():
        thread = threading.Thread(target=lambda: model["waits"](X))
        thread.start()
        assert here.wait(60)
        X.sigmoid()
        there.set()
        thread.join()
        model["a"](X).sum().backward()
    names = {row.operation: row.module for row in guard.coverage()}
    assert names["sigmoid"] == "<unnamed>"
    assert names["forward"] == "waits"
