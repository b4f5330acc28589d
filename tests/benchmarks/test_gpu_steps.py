"""What `benchmarks.gpu` says of a model: bits, clean steps, struck products; each with what makes it say otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import _gpu_guard, gpu
from benchmarks._gpu_models import Case
from diagnostics.sensors.tolerance import ToleranceTable, shipped_table

TABLE = shipped_table()


def case(dropout: float = 0.0) -> Case:
    torch.manual_seed(0)
    embedding, inner = nn.Embedding(20, 16), nn.Linear(16, 32)
    model = nn.Sequential(embedding, inner, nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 20))
    tokens = torch.randint(0, 20, (64,))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(tokens), tokens)

    return Case("small", model, loss, embedding.weight, torch.optim.AdamW(model.parameters(), 1e-2))


def narrower(by: float) -> ToleranceTable:
    return ToleranceTable({k: replace(v, accumulate=v.accumulate * by) for k, v in TABLE.entries.items()})


def test_guarding_changes_no_bit_and_dropout_is_not_blamed_on_it() -> None:
    found = _gpu_guard.bits(case(), TABLE)
    assert (found.parameters, found.unrepeated, found.changed) == (6, [], [])
    random = _gpu_guard.bits(case(0.5), TABLE)
    assert {"loss", "4.weight"} <= set(random.unrepeated)
    assert random.changed
    assert random.by_guard == []
    assert replace(random, unrepeated=[]).by_guard == random.changed


def test_clean_steps_do_not_alarm_but_under_a_tolerance_that_is_too_small() -> None:
    found = _gpu_guard.clean(case(), TABLE, 3)
    assert (found.steps, found.alarms, found.failures) == (5, [], 0)
    assert 0 < found.largest <= 1
    assert found.losses[-1] < found.losses[0]
    assert all(line.startswith("1.00") for line in found.coverage)
    assert _gpu_guard.clean(case(), narrower(1e-4), 1).alarms


def test_struck_products_are_seen_but_under_a_tolerance_that_is_too_large() -> None:
    found = _gpu_guard.struck(case(), TABLE, 99)
    assert (found.products, found.missed, found.unnamed) == (6, [], [])
    blind = _gpu_guard.struck(case(), narrower(1e7), 99)
    assert len(blind.missed) == blind.products == 6
    assert _gpu_guard.struck(case(), TABLE, 2).products == 2


def test_figures_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CASES", {"small": lambda device: case()})
    figures = list(gpu.of_model("small", torch.device("cpu"), 1, 2))
    assert [figure.value for figure in figures] == [0, 0, 0, 1.0]
    assert [figure.met for figure in figures] == [True, True, None, True]
    assert list(gpu.of_kernels(torch.device("cpu"), 1)) == []
