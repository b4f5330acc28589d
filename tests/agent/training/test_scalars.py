"""What a job's step is compared by: what it is, that it decides nothing, that a held step's bundle has it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import SPEC, train

from agent.training.engine import UNUSUAL, Engine
from agent.training.evidence.bundle import read
from agent.training.scalars import load_entropy
from agent.training.spec import JobSpec
from diagnostics.sensors.statistics import Comparison, Histories


class Outrageous:
    """On every rank each scalar of every step is infinitely far from the steps before, or not even a number."""

    what, step, struck = "statistics", 0, 0

    def install(self, _rank: int) -> None:
        real = Histories.add

        def add(self: Histories, key: int, names: Any, values: Any, least: Any) -> Comparison:
            real(self, key, names, values, least)
            infinite = np.full(len(names), math.inf)
            return Comparison(tuple(names), np.full(len(names), math.nan), infinite, infinite)

        Histories.add = add  # type: ignore[method-assign]

    def strike(self, step: int, phase: str) -> None:
        pass


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scalars")


def an_engine(home: Path, **changes: Any) -> Engine:
    (home / "text").write_text("".join(f"line {i} of what is trained on\n" for i in range(900)))
    paths = {"storage": str(home / "checkpoints"), "cache": str(home / "cache"), "corpus": str(home / "text")}
    made = Engine(JobSpec.from_json(json.dumps({**SPEC, **paths, **changes})))
    state = made.layout.view(memoryview(bytearray(made.layout.nbytes)))
    made.initialise(state)
    made.bind(state)
    return made


@pytest.fixture(scope="module")
def engine(home: Path) -> Engine:
    return an_engine(home)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1.0])
def test_a_gradient_that_is_not_finite_alarms_before_any_sum(home: Path, bad: float) -> None:
    """In the sum nobody could tell whose it was; the loss is as ever. The control's is finite."""
    engine = an_engine(home)
    weight = next(iter(engine.model.parameters()))
    weight.register_hook(lambda gradient: torch.full_like(gradient, bad))
    computed = engine.compute(1, 0, 1, torch.zeros(engine.layout.flat))
    assert math.isfinite(computed.loss)
    found = {(alarm.sensor, alarm.module) for alarm in computed.alarms}
    assert (("finite", "gradients") in found) is (bad != 1.0)


def test_entropy_is_one_for_an_even_load_and_nothing_for_one_expert() -> None:
    even, one = torch.full((8,), 5), torch.eye(8, dtype=torch.int64)[3] * 40
    halves = torch.tensor([10, 10, 0, 0, 0, 0, 0, 0])
    found = load_entropy(torch.stack([even, one, halves, torch.zeros(8, dtype=torch.int64)]))
    assert found.tolist() == pytest.approx([1.0, 0.0, 1 / 3, 0.0])


def test_a_step_is_compared_by_its_loss_its_gradients_and_its_expert_loads(engine: Engine) -> None:
    computed = engine.compute(1, 0, 1, engine.gradients)
    assert engine.guard.current is not None
    found = {statistic.name: statistic.value for statistic in engine.guard.current.evidence}
    parameters = dict(engine.model.named_parameters())
    assert len(found) == 1 + len(parameters) + len(computed.counts)
    assert found["loss"] == pytest.approx(computed.loss)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert found[f"gradient norm of {name}"] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
    entropies = [found[name] for name in found if name.startswith("expert-load entropy of layers.")]
    assert entropies == pytest.approx(load_entropy(computed.counts).tolist()[: len(entropies)])
    assert computed.unusual == ()  # nothing to compare with yet


def test_in_fp8_also_by_what_quantising_did_to_each_tensor(home: Path) -> None:
    made = an_engine(home, precision="fp8")
    computed = made.compute(1, 0, 1, made.gradients)
    assert made.guard.current is not None
    found = {statistic.name: statistic.value for statistic in made.guard.current.evidence}
    for summary in computed.fp8:
        assert found[f"amax of {summary.amax_module}'s {summary.tensor}"] == summary.amax > 0
        assert found[f"saturated share of {summary.saturation_module}'s {summary.tensor}"] == summary.saturation
        assert found[f"underflowed share of {summary.underflow_module}'s {summary.tensor}"] == summary.underflow
    of_activations = [name for name in found if name.startswith("amax of ") and name.endswith("'s activation")]
    assert len(of_activations) > 50


def test_a_replay_leaves_no_trace_in_the_history(engine: Engine) -> None:
    engine.compute(1, 0, 1, engine.gradients)
    before = engine.guard.histories._rows.copy()
    engine.compute(2, 1, 0, engine.gradients)
    assert engine.guard.current is not None
    assert engine.guard.current.evidence == []
    assert np.array_equal(engine.guard.histories._rows, before, equal_nan=True)


def test_a_large_z_alone_holds_no_step(home: Path) -> None:
    """The same bits in as many attempts as with the statistics as they are; no alarm, no verdict."""
    _, plain = train(home / "plain", steps=3)
    codes, reports = train(home / "outrageous", steps=3, garbles=[Outrageous()])  # type: ignore[list-item]
    assert codes == [0, 0]
    assert [rank[-1]["chain"] for rank in reports] == [rank[-1]["chain"] for rank in plain]
    steps = [entry for rank in reports for entry in rank if entry["report"] == "step"]
    assert [entry["attempts"] for entry in steps] == [1] * 6
    assert not [entry for rank in reports for entry in rank if entry["report"] in ("gate_alarm", "replay_result")]


def test_a_held_step_s_bundle_says_what_was_unusual_in_it(home: Path) -> None:
    """The exponent's highest bit of one gradient, whose norm then is no number, after ten steps to compare with."""
    folder = home / "held"
    drill = {"op": "wgrad", "bit": "30", "layer": "1"}
    evidence = {"folder": str(folder / "evidence"), "data": True, "days": 1.0, "keep": 9}
    sizes = {"total_bytes": 1 << 30, "bundle_bytes": 1 << 28}
    codes, reports = train(
        folder,
        steps=11,
        drills=[{"id": "d", "kind": "sdc", "step": 11, "rank": 1, "params": drill}],
        evidence={**evidence, **sizes},
    )
    assert codes == [0, 0]
    (ruling,) = [entry for rank in reports for entry in rank if entry["report"] == "replay_result"]
    beside = read(folder / "evidence" / "job" / ruling["evidence"]).facts["beside"]
    assert len(beside) == UNUSUAL
    assert beside[0]["name"].startswith("gradient norm of layers.1.")
    assert (beside[0]["value"], beside[0]["z"]) == ("inf", "nan")
    assert all(one["median"] > 0 for one in beside)
    others = [abs(one["z"]) for one in beside[1:]]
    assert others == sorted(others, reverse=True)
