"""Coverage that a step loses: counted, its reasons told once; sensors that fail stop no training and change no bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ranks import SPEC, train

from agent.training.engine import Engine
from agent.training.lost import CHARACTERS, REASONS, Lost, Reasons, lost
from agent.training.spec import JobSpec
from diagnostics.sensors import inspection
from diagnostics.sensors.checks.operation import Unsupported
from diagnostics.sensors.inspection import Inspection

BROKEN = "the check itself failed: ZeroDivisionError: nothing is left (test_lost.py:39)"  # where `broken` raises


class BrokenSensors:
    """Every check of an operator fails on one rank, whenever it is tried: a defect of the sensors themselves."""

    what, step, struck = "sensors", 0, 0

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def install(self, rank: int) -> None:
        if rank == self._rank:
            Inspection._judge = broken  # type: ignore[method-assign]

    def strike(self, step: int, phase: str) -> None:
        pass


def broken(*_: Any) -> bool:
    raise ZeroDivisionError("nothing is left")


def refused(*_: Any) -> bool:
    raise Unsupported("no such kernel")


class Marks:
    """Notes the spans that are made."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    @contextmanager
    def span(self, name: str, parent: str, **attributes: Any) -> Iterator[str]:
        self.made.append({"name": name, **attributes})
        yield ""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def engine(home: Path) -> Engine:
    (home / "text").write_text("".join(f"line {i} of what is trained on\n" for i in range(900)))
    paths = {"storage": str(home / "checkpoints"), "cache": str(home / "cache"), "corpus": str(home / "text")}
    made = Engine(JobSpec.from_json(json.dumps({**SPEC, **paths, "again": 0.0625})))
    state = made.layout.view(memoryview(bytearray(made.layout.nbytes)))
    made.initialise(state)
    made.bind(state)
    return made


def test_a_clean_step_loses_nothing(engine: Engine) -> None:
    computed = engine.compute(1, 0, 1, engine.gradients)
    assert (computed.lost, computed.alarm) == (Lost(), False)
    assert computed.checks > 400


def test_a_step_whose_sensors_fail_says_so_and_alarms_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.compute(1, 0, 1, engine.gradients)
    bits = engine.gradients.clone()
    monkeypatch.setattr(Inspection, "_judge", broken)
    computed = engine.compute(1, 0, 1, engine.gradients)
    assert (computed.alarm, computed.lost.unjudged, computed.lost.reasons) == (False, 0, (BROKEN,))
    assert computed.lost.failed > 300
    assert computed.checks < whole.checks
    assert engine.gradients.equal(bits)


def test_calls_that_no_check_can_judge_are_counted_apart(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "product_check", refused)
    found = engine.compute(1, 0, 1, engine.gradients).lost
    assert found.failed == 0
    assert found.unjudged > 0
    assert found.reasons == ("no such kernel",)


def test_failures_are_no_refusals() -> None:
    assert lost(2, {"failed": 2, "refused": 5}) == Lost(2, 5, ("failed", "refused"))
    assert lost(3, {"failed": 2}) == Lost(3, 0, ("failed",))  # a failure that could not even be told


def test_each_reason_is_told_once_and_not_without_end() -> None:
    marks = Marks()
    reasons = Reasons(marks)
    reasons.hear(1, Lost(2, 1, ("a", "b" * 1000)))
    reasons.hear(2, Lost(2, 0, ("a",)))
    assert reasons.take() == ["a", "b" * CHARACTERS]
    assert reasons.take() == []
    assert [(mark["name"], mark["step"], mark["reason"][:1]) for mark in marks.made] == [
        ("lost_coverage", 1, "a"),
        ("lost_coverage", 1, "b"),
    ]
    for step in range(3, 100):
        reasons.hear(step, Lost(1, 0, (f"at {step}",)))
    assert len(reasons.take()) == len(marks.made) - 2 == REASONS - 2


def test_a_job_goes_on_with_broken_sensors_and_reports_what_it_lost(home: Path) -> None:
    """Rank 1's fail; rank 0, whose are well, is the control, and so are the bits of a run without any."""
    codes, reports = train(home / "broken", steps=3, garbles=[BrokenSensors(1)])  # type: ignore[list-item]
    _, unguarded = train(home / "unguarded", steps=3, sensors=False)
    assert codes == [0, 0]
    assert [rank[-1]["chain"] for rank in reports] == [rank[-1]["chain"] for rank in unguarded]
    well, ill = ([entry for entry in rank if entry["report"] == "step"] for rank in reports)
    assert {(r["failed_checks"], r["unjudged"], *r["lost_because"]) for r in well} == {(0, 0)}
    assert all(record["failed_checks"] > 300 and record["checks"] > 0 for record in ill)
    assert [record["lost_because"] for record in ill] == [[BROKEN], [], []]
    told = [[entry["reason"] for entry in rank if entry.get("name") == "lost_coverage"] for rank in reports]
    assert told == [[], [BROKEN]]
