"""`assay incident replay` and `--evidence`: what is meant, what is gone and why, and the tool's answer passed on."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rundirs import record

from agent.training.evidence import retention
from agent.training.spec import EvidenceSettings
from controller.cli import evidence, incident
from controller.cli.errors import CommandError, ConditionError, UsageError
from controller.cli.main import call
from controller.cli.order import new_order, resumed_order

NAME = "step-00000006-rank-1-generation-1-attempt-1"
INCIDENT: dict[str, Any] = {"id": "inc-0001", "job": "job-1", "evidence": [NAME, NAME[:-1] + "2"]}


def test_settings_are_the_jobs_and_so_are_their_defaults(tmp_path: Path) -> None:
    found = evidence.settings("with-data", tmp_path)
    assert found is not None
    assert EvidenceSettings.parse(found) == EvidenceSettings(str(tmp_path / "evidence"))
    given = evidence.settings("no-data,keep=3,days=7,total=2GB,bundle=1MiB", tmp_path)
    assert given == {
        "folder": str(tmp_path / "evidence"),
        "data": False,
        "keep": 3,
        "days": 7,
        "total_bytes": 2 * 10**9,
        "bundle_bytes": 1 << 20,
    }
    assert evidence.settings("off", tmp_path) is None
    with pytest.raises(UsageError, match="twice"):
        evidence.settings("no-data,keep=1,keep=1", tmp_path)


def test_a_resumed_run_may_stop_keeping_data(tmp_path: Path) -> None:
    run = record(tmp_path)
    run.save(tmp_path)
    options: dict[str, Any] = {
        "resume": tmp_path,
        "steps": 50,
        "evidence": "no-data",
        "nodes": 2,
        "spares": 1,
        "db": None,
        "port": None,
        "preset": "tiny",
        "seed": 0,
        "precision": "fp32",
        "corpus": None,
        "tokenizer": None,
        "vocab_size": None,
        "pack": "stream",
        "sensors": "on",
        "tolerance_scale": 1.0,
        "tolerances": None,
        "checkpoint_every": 10,
        "mesh": None,
        "replays": 2,
        "again": 0.0625,
        "directory": None,
    }
    assert resumed_order(options, {"steps"}, ()).spec["evidence"] is None  # as it was, before there was a choice
    spec = resumed_order(options, {"steps", "evidence"}, ()).spec
    assert spec["evidence"]["data"] is False
    fresh = new_order({**options, "directory": tmp_path / "fresh", "evidence": "with-data"}, ())
    assert fresh.spec["evidence"] == evidence.settings("with-data", tmp_path / "fresh")


def test_the_first_attempts_bundle_is_meant_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    for name in INCIDENT["evidence"]:
        (tmp_path / "evidence" / "job-1" / name).mkdir(parents=True)
    assert evidence.bundle_of(tmp_path, INCIDENT, None).name == NAME
    assert evidence.bundle_of(tmp_path, INCIDENT, 2).name.endswith("-2")
    with pytest.raises(CommandError, match="no evidence bundle of attempt 3: only steps that are judged by"):
        evidence.bundle_of(tmp_path, INCIDENT, 3)
    with pytest.raises(CommandError, match="no evidence bundle: only steps that are judged by"):
        evidence.bundle_of(tmp_path, {"id": "inc-0001", "job": "job-1"}, None)


def test_a_name_that_leads_elsewhere_is_no_bundles(tmp_path: Path) -> None:
    """Names come from nodes."""
    (tmp_path / "evidence" / "job-1").mkdir(parents=True)
    for name in ("../../..", "/etc", f"{NAME}/../..", f"{NAME}\n"):
        with pytest.raises(CommandError, match="no evidence bundle"):
            evidence.bundle_of(tmp_path, {**INCIDENT, "evidence": [name]}, None)


def test_a_removed_bundle_is_gone_for_the_reason_in_the_ledger(tmp_path: Path) -> None:
    folder = tmp_path / "evidence" / "job-1"
    with pytest.raises(ConditionError, match="is gone: nobody noted why"):
        evidence.bundle_of(tmp_path, INCIDENT, None)
    (folder / NAME).mkdir(parents=True)
    settings = EvidenceSettings(str(folder.parent), days=1.0)
    retention.prune(folder, settings, open_from=7, generation=1, now=(folder / NAME).stat().st_mtime + 2 * 86400)
    with pytest.raises(ConditionError, match="is gone: it was removed, older than days=1"):
        evidence.bundle_of(tmp_path, INCIDENT, None)


def _answers(monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str = "") -> list[list[str]]:
    """Let the tool answer so; the command lines that it was given."""
    given: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        given.append(command)
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(evidence.subprocess, "run", answer)
    return given


ANSWER = {
    "job": "job-1",
    "step": 6,
    "rank": 1,
    "verdict": "CORRUPT",
    "upholds": True,
    "digest": "aa",
    "digests": ["aa"],
    "fingerprint": {},
    "recorded_fingerprint": {},
    "exit": 0,
    "votes": [{"role": "peer", "number": 1, "node": "n0\x1b[2J", "device": "cpu-n0", "digest": "aa", "agrees": True}],
}


@pytest.fixture
def known(ended: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ended run that knows INCIDENT and still has its bundles."""
    monkeypatch.setattr(incident, "read", lambda *_: INCIDENT)
    for name in INCIDENT["evidence"]:
        (ended / "evidence" / "job-1" / name).mkdir(parents=True)
    return ended


@pytest.mark.parametrize("code", [0, 1, 5])
def test_the_tools_answer_and_code_are_the_commands(known: Path, monkeypatch: Any, capsys: Any, code: int) -> None:
    given = _answers(monkeypatch, code, json.dumps({**ANSWER, "exit": code}))
    arguments = ["incident", "replay", "inc-0001", "--dir", str(known)]
    assert call([*arguments, "--times", "3", "--corpus", "text", "-o", "json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["incident"]) == ("assay.incident.replay/1", "inc-0001")
    assert given[0][3:] == [
        *("agent.training.evidence.tool", str(known / "evidence" / "job-1" / NAME), "--times", "3"),
        *("--checkpoints", str(known / "checkpoints" / "job-1"), "--corpus", str(Path("text").absolute())),
    ]
    assert call(arguments) == code
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "upheld here" in told


@pytest.mark.parametrize("code", [1, 2, 5])
def test_what_the_tool_refuses_is_one_line_and_its_code(known: Path, monkeypatch: Any, capsys: Any, code: int) -> None:
    _answers(monkeypatch, code, "", "a warning\nassay: the bundle holds no weights\n")
    assert call(["incident", "replay", "inc-0001", "--dir", str(known)]) == code
    assert capsys.readouterr().err == "assay: the bundle holds no weights\n"


BESIDE = [
    {"name": "gradient norm of layers.1.ffn.up\x1b[2J", "value": 812.5, "median": 1.25, "z": "inf"},
    {"name": "loss", "value": 5.5, "median": 5.0, "z": 2.25},
]
SHOWN: dict[str, Any] = {
    **INCIDENT,
    **dict.fromkeys(
        ("kind", "detected_step", "injected_step", "verdict", "node", "resumed_from", "detect_s", "recovery_s")
    ),
    "votes": [],
    "actions": [],
}


def test_an_incident_is_shown_with_what_was_unusual_beside_it(known: Path, monkeypatch: Any, capsys: Any) -> None:
    """Of the second attempt's bundle nothing can be read, and it says nothing."""
    monkeypatch.setattr(incident, "read", lambda *_: dict(SHOWN))
    folder = known / "evidence" / "job-1"
    (folder / NAME / "evidence.json").write_text(json.dumps({"beside": BESIDE}))
    arguments = ["incident", "show", "inc-0001", "--dir", str(known)]
    assert call(arguments) == 0
    lines = [line.split(None, 2) for line in capsys.readouterr().out.splitlines() if line.startswith("beside it")]
    assert [line[2].rstrip() for line in lines] == [
        r"gradient norm of layers.1.ffn.up\x1b[2J was 812.5, in the steps before 1.25, z inf",
        "loss was 5.5, in the steps before 5, z 2.2",
    ]
    assert call([*arguments, "-o", "json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["beside"]
    assert (told["bundle"], told["statistics"][1]) == (NAME, BESIDE[1])
    assert told["statistics"][0]["z"] is None  # JSON has no word for it


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"beside": [1]}', '{"beside": [{"name": "loss"}]}'])
def test_of_what_is_no_bundle_nothing_is_shown(known: Path, monkeypatch: Any, capsys: Any, text: str) -> None:
    monkeypatch.setattr(incident, "read", lambda *_: dict(SHOWN))
    (known / "evidence" / "job-1" / NAME / "evidence.json").write_text(text)
    assert call(["incident", "show", "inc-0001", "--dir", str(known)]) == 0
    assert "beside it" not in capsys.readouterr().out


def test_an_empty_folder_is_refused_by_the_tool_itself(known: Path, capsys: Any) -> None:
    """The real process: no part of it is replaced."""
    assert call(["incident", "replay", "inc-0001", "--dir", str(known)]) == 1
    assert "is no evidence bundle: it has no evidence.json" in capsys.readouterr().err
