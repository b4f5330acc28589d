"""Evidence goes by count, age and size, the oldest first; an open incident's stays, and what went is on record."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.training.evidence.bundle import ASIDE, Coordinates
from agent.training.evidence.retention import LEDGER, prune
from agent.training.spec import EvidenceSettings

NOW = 1_000_000.0
DAY = 86400.0
AMPLE = {"days": 1000.0, "keep": 1000, "total_bytes": 10**9}


def bundle(folder: Path, step: int, age: float = 0.0, size: int = 10, generation: int = 1) -> str:
    path = folder / str(Coordinates(step, 0, generation, 1))
    path.mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(bytes(size))
    os.utime(path, (NOW - age, NOW - age))
    return path.name


def left(folder: Path) -> list[int]:
    return sorted(at.step for path in folder.iterdir() if (at := Coordinates.parse(path.name)) is not None)


def settings(**changes: float) -> EvidenceSettings:
    return EvidenceSettings("unused", **{**AMPLE, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "stay", "why"),
    [
        ({}, [1, 2, 3, 4], ""),
        ({"keep": 2}, [3, 4], "more than keep=2"),
        ({"days": 2}, [3, 4], "older than days=2"),
        ({"total_bytes": 30}, [2, 3, 4], "more than total=30 bytes"),
    ],
)
def test_what_exceeds_a_setting_goes_the_oldest_first(
    tmp_path: Path, changes: dict[str, float], stay: list[int], why: str
) -> None:
    for step in (1, 2, 3, 4):
        bundle(tmp_path, step, age=(4.5 - step) * DAY)
    removed = prune(tmp_path, settings(**changes), open_from=100, generation=1, now=NOW)
    assert left(tmp_path) == stay
    assert {gone.why for gone in removed} == ({why} if why else set())
    ledger = tmp_path / LEDGER
    entries = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    assert [(entry["name"], entry["why"], entry["time"]) for entry in entries] == [
        (gone.name, gone.why, NOW) for gone in removed
    ]


def test_evidence_of_an_open_incident_stays_whatever_the_settings(tmp_path: Path) -> None:
    for step in (5, 6, 7):
        bundle(tmp_path, step, age=9 * DAY)
    prune(tmp_path, settings(keep=1, days=1, total_bytes=1), open_from=6, generation=1, now=NOW)
    assert left(tmp_path) == [6, 7]
    prune(tmp_path, settings(keep=1, days=1, total_bytes=1), open_from=8, generation=1, now=NOW)
    assert left(tmp_path) == []


def test_what_a_dead_generation_was_writing_goes_and_what_this_one_writes_stays(tmp_path: Path) -> None:
    for generation in (1, 2):
        name = bundle(tmp_path, 3, generation=generation)
        (tmp_path / name).rename(tmp_path / f"{ASIDE}{name}")
    (tmp_path / "notes").mkdir()
    assert prune(tmp_path, settings(), open_from=9, generation=2, now=NOW) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{ASIDE}{Coordinates(3, 0, 2, 1)}", "notes"]


def test_a_job_without_evidence_has_nothing_to_remove(tmp_path: Path) -> None:
    assert prune(tmp_path / "none", settings(keep=1), open_from=9, generation=1, now=NOW) == []


@given(
    st.lists(st.tuples(st.floats(0, 9), st.integers(0, 50)), max_size=8),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 200),
    st.integers(0, 9),
)
def test_whatever_lies_there(
    tmp_path_factory: pytest.TempPathFactory,
    made: list[tuple[float, int]],
    keep: int,
    days: int,
    total: int,
    open_from: int,
) -> None:
    folder = tmp_path_factory.mktemp("job")
    for step, (age, size) in enumerate(made):
        bundle(folder, step, age * DAY, size)
    removed = prune(folder, settings(keep=keep, days=days, total_bytes=total), open_from, 1, NOW)
    stayed = left(folder)
    gone = {at.step for entry in removed if (at := Coordinates.parse(entry.name)) is not None}
    assert sorted([*gone, *stayed]) == list(range(len(made)))
    assert not any(step >= open_from for step in gone)
    closed = [step for step in stayed if step < open_from]
    assert not closed or (len(stayed) <= keep and sum(made[step][1] for step in stayed) <= total)
    assert all(made[step][0] <= days for step in closed)
    for entry in removed:  # what went for another reason than age is older than what could have gone instead
        at = Coordinates.parse(entry.name)
        assert at is not None
        assert entry.why.startswith("older") or all(made[at.step][0] >= made[step][0] - 1e-6 for step in closed)
    assert prune(folder, settings(keep=keep, days=days, total_bytes=total), open_from, 1, NOW) == []
