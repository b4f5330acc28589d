"""Commands as people call them: exit codes, one clear line for what is wrong, and nothing started for nothing."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rundirs import record

from agent.model.presets import PRESETS
from agent.training.corpora import open_tokens
from agent.training.spec import AGAIN as JOB_AGAIN
from agent.training.spec import REPLAYS as JOB_REPLAYS
from agent.training.spec import JobSpec, Mesh
from agent.training.token_file import DTYPES, Writer
from controller.cli import checks
from controller.cli.main import COMMANDS, call
from controller.cli.presets import (
    AGAIN,
    EXPERTS,
    ID_BYTES,
    LAYERS,
    REPLAYS,
    SAMPLE_TOKENS,
    STATE_BYTES,
    VOCABULARY,
    state_bytes,
)
from controller.cli.rundir import claimed, load
from controller.cli.session import Session
from controller.cli.status import SUSPICION, suspicions
from controller.local.plan import Plan


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bad input must be refused before anything runs."""

    def refuse(self: Session) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(Session, "start", refuse)
    monkeypatch.chdir(tmp_path)


def test_presets_are_those_of_the_model() -> None:
    assert {name: preset.config.num_hidden_layers for name, preset in PRESETS.items()} == dict(LAYERS)
    assert STATE_BYTES.keys() == LAYERS.keys()
    assert REPLAYS == JOB_REPLAYS
    assert AGAIN == JOB_AGAIN
    assert {name: preset.config.n_routed_experts for name, preset in PRESETS.items()} == dict(EXPERTS)
    assert {name: preset.sample_len for name, preset in PRESETS.items()} == dict(SAMPLE_TOKENS)
    for name, preset in PRESETS.items():
        assert preset.config.vocab_size == VOCABULARY
        assert ID_BYTES[name] == 2 * preset.config.hidden_size * 16
        assert state_bytes(name, VOCABULARY + 10) - state_bytes(name, None) == 10 * ID_BYTES[name]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--drill", "flood@3"], "unknown drill kind"),
        (["--drill", "sdc@3:color=red"], "unknown key 'color'"),
        (["--steps", "10", "--drill", "kill@11"], "beyond the last step"),
        (["--nodes", "2", "--drill", "sdc@3:rank=2"], "2 ranks"),
        (["--drill", "node@3:node=n7"], "unknown node 'n7'"),
        (["--steps", "0"], "--steps"),
        (["--steps", "-3"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--nodes", "0"], "--nodes"),
        (["--nodes", "250", "--spares", "1"], "250"),
        (["--precision", "fp4"], "--precision"),
        (["--tolerance-scale", "0"], "--tolerance-scale"),
        (["--tolerance-scale", "nan"], "--tolerance-scale"),
        (["--tolerances", "nowhere"], "--tolerances nowhere cannot be read: No such file or directory"),
        (["--tolerances", "empty"], "--tolerances empty cannot be read: Is a directory"),
        (["--tolerances", "latin.txt"], "--tolerances latin.txt is not UTF-8 text"),
        (["--tolerances", "ten.json"], "its schema is not assay.tolerances/1; make one with assay calibrate"),
        (["--corpus", "nowhere"], "nowhere does not exist"),
        (["--corpus", "empty.txt"], "empty.txt is empty"),
        (["--corpus", "empty"], "empty is empty"),
        (["--corpus", "x" * 300], "cannot be read: File name too long"),
        (["--tokenizer", "x" * 300], "cannot be read: File name too long"),
        (["--corpus", "lone.idx"], "lone.bin does not exist"),
        (["--corpus", "lone"], "lone.bin does not exist"),
        (["--corpus", "cut"], "cut.idx is cut off: 3 bytes"),
        (["--corpus", "cut.bin"], "cut.idx is cut off: 3 bytes"),
        (["--corpus", "short.txt"], "is too short: 3 tokens, one sample needs 130"),
        (["--corpus", "latin.txt", "--tokenizer", "ten.json"], "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
        (["--corpus", "ids.bin"], "ids has id 300 at token 400 (document 1), outside the vocabulary of 264"),
        (["--corpus", "ids", "--vocab-size", "300"], "train with --vocab-size 301 or more"),
        (["--corpus", "ids", "--tokenizer", "ten.json"], "a tokenizer is for text"),
        (["--tokenizer", "nowhere"], "tokenizer nowhere is not a file"),
        (["--tokenizer", "empty"], "tokenizer empty is not a file"),
        (["--tokenizer", "short.txt"], "is no tokenizer.json"),
        (["--tokenizer", "ten.json", "--vocab-size", "9"], "knows 10 ids, more than the 9 of --vocab-size"),
        (["--vocab-size", "100"], "outside the vocabulary of 100"),
        (["--vocab-size", "0"], "--vocab-size"),
        (["--pack", "loose"], "--pack"),
        (["--replays", "0"], "--replays"),
        (["--evidence", "some"], "'some' is not with-data or no-data"),
        (["--evidence", "off,keep=3"], "'off' is not with-data or no-data"),
        (["--evidence", "no-data,keep=0"], "'keep=0' is not keep=, days= with a whole number"),
        (["--evidence", "no-data,total=5XB"], "'total=5XB' is not keep="),
        (["--evidence", "no-data,size=5GB"], "'size=5GB' is not keep="),
        (["--evidence", "no-data,days=3,days=4"], "days is there twice"),
        (["--replays", "9"], "--replays"),
        (["--again", "1.5"], "--again"),
        (["--again", "all"], "--again"),
        (["--mesh", "ep=2"], "dp, the number of ranks, is missing"),
        (["--mesh", "dp=4,ep=3"], "ep=3 does not divide dp=4"),
        (["--mesh", "dp=4,ep=4,local=3"], "local=3 does not divide ep=4"),
        (["--mesh", "dp=16,ep=16"], "ep=16 does not divide the 8 experts of tiny"),
        (["--mesh", "dp=4,tp=2"], "'tp=2' is not dp=, ep= or local="),
        (["--mesh", "dp=0"], "'dp=0' is not dp=, ep= or local= with a whole number"),
        (["--mesh", "4x2"], "'4x2' is not dp="),
        (["--mesh", "dp=" + "9" * 5000], "is not dp=, ep= or local= with a whole number"),
        (["--mesh", "dp=2,dp=4"], "dp is there twice"),
        (["--mesh", "dp=4", "--nodes", "2"], "--nodes 2 is not dp=4 of --mesh"),
        (["--mesh", "dp=251"], "250"),
        (["--port", "0"], "--port"),
        (["--resume", "nowhere"], "not the directory of a run"),
        (["--colour"], "--colour"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(arguments: list[str], told: str, tmp_path: Path, capsys) -> None:
    _corpora(tmp_path)
    assert call(["run", *arguments]) == 2
    _one_line(capsys, told)
    assert not (tmp_path / "assay-runs").exists()


def _corpora(root: Path) -> None:
    """Corpora of which none can be trained on, and a tokenizer of ten ids."""
    (root / "empty.txt").touch()
    (root / "empty").mkdir()
    (root / "short.txt").write_text("abc")
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    (root / "lone.idx").write_bytes(b"MMI")
    (root / "cut.idx").write_bytes(b"MMI")
    (root / "cut.bin").write_bytes(b"\1")
    with Writer(root / "ids", DTYPES[8]) as writer:
        writer.add([1] * 399)
        writer.add([2, 300])
    (root / "ten.json").write_text(json.dumps(_TEN))


#: Every word is one of ten, or the unknown one.
_TEN = {
    "version": "1.0",
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, **{f"word{i}": i for i in range(1, 10)}}},
}


def _started(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The specification of the job that would be started."""
    seen: list[dict[str, object]] = []
    monkeypatch.setattr("controller.cli.run.execute", lambda order, plan: seen.append(order.spec) or {"status": "X"})
    monkeypatch.setattr("controller.cli.run.print_summary", lambda document: None)
    with pytest.raises(KeyError, match="reason"):
        call(["run", *arguments])
    return seen[0]


def test_a_corpus_settles_vocabulary_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _corpora(tmp_path)
    (tmp_path / "text").write_text("word1 word9 " * 99)
    spec = _started(["--corpus", "text", "--tokenizer", "ten.json", "--pack", "documents", "--dir", "d"], monkeypatch)
    assert (spec["vocab_size"], spec["pack"]) == (16, "documents")
    assert (spec["corpus"], spec["tokenizer"]) == (str(tmp_path / "text"), str(tmp_path / "ten.json"))
    cached = open_tokens(tmp_path / "text", tmp_path / "d" / "cache", tmp_path / "ten.json")
    assert spec["corpus_digest"] == cached.digest
    assert JobSpec.from_json(json.dumps(spec)).vocab_size == 16
    wide = _started(["--corpus", "ids", "--vocab-size", "301", "--dir", "e"], monkeypatch)
    assert (wide["vocab_size"], wide["corpus"]) == (301, str(tmp_path / "ids"))
    plain = _started(["--dir", "f"], monkeypatch)
    assert [plain[name] for name in ("corpus", "tokenizer", "vocab_size", "corpus_digest", "pack")] == [
        *[None] * 4,
        "stream",
    ]


def test_a_table_of_tolerances_travels_with_the_job_and_stays(
    tmp_path: Path, ended: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    row = {"device_class": "cpu", "dtype": "float32", "kernel": "mm", "output": 0, "accumulate": 9e-7, "provenance": ""}
    table = json.dumps({"schema": "assay.tolerances/1", "kappas": [row]})
    (tmp_path / "table.json").write_text(table)
    assert _started(["--dir", "d"], monkeypatch)["tolerances"] is None
    spec = _started(["--tolerances", "table.json", "--dir", "e"], monkeypatch)
    assert spec["tolerances"] == table
    assert JobSpec.from_json(json.dumps(spec)).tolerances == table
    assert call(["run", "--resume", str(ended), "--tolerances", "table.json"]) == 2
    _one_line(capsys, "--tolerances is None in the run")
    run = load(ended)
    replace(run, spec={**run.spec, "tolerances": table}).save(ended)
    (tmp_path / "table.json").write_text(table.replace("9e-07", "8e-07"))
    assert call(["run", "--resume", str(ended), "--tolerances", "table.json"]) == 2
    _one_line(capsys, "it cannot become another table")


def test_a_mesh_gives_the_number_of_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _started(["--mesh", "dp=4,ep=2", "--dir", "d"], monkeypatch)
    assert (spec["world"], spec["mesh"]) == (4, {"dp": 4, "ep": 2, "local": 1})
    parsed = JobSpec.from_json(json.dumps(spec))
    assert (parsed.mesh, parsed.replays) == (Mesh(4, 2), REPLAYS)
    assert _started(["--replays", "5", "--dir", "e"], monkeypatch)["replays"] == 5
    assert parsed.again == AGAIN
    assert _started(["--again", "1", "--dir", "f"], monkeypatch)["again"] == 1.0


def test_a_resumed_run_keeps_its_mesh(ended: Path, capsys) -> None:
    assert call(["run", "--resume", str(ended), "--mesh", "dp=2"]) == 2
    _one_line(capsys, "--mesh is None in the run")


def test_a_resumed_runs_corpus_must_be_what_it_was(ended: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text").write_text("abc" * 99)
    digest = open_tokens(tmp_path / "text", tmp_path / "elsewhere").digest
    run = load(ended)
    spec = {**run.spec, "corpus": str(tmp_path / "text"), "corpus_digest": digest}
    replace(run, spec=spec).save(ended)
    with pytest.raises(AssertionError, match="something was started"):
        call(["run", "--resume", str(ended), "--steps", "50"])
    capsys.readouterr()
    (tmp_path / "text").write_text("abd" * 99)
    assert call(["run", "--resume", str(ended), "--steps", "50"]) == 2
    _one_line(capsys, "changed since the run was started")
    assert (ended / "run.json").exists()


def test_a_cache_that_cannot_be_written_is_5(tmp_path: Path, capsys) -> None:
    (tmp_path / "text").write_text("abc" * 99)
    assert call(["run", "--corpus", "text", "--dir", "/proc/assay"]) == 5
    _one_line(capsys, "cannot write to /proc/assay/cache")


def test_a_check_that_breaks_is_1_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "text").write_text("abc" * 99)
    monkeypatch.setattr("controller.cli.corpus.PYTHON", (sys.executable, "-c", "raise SystemExit('broken')"))
    assert call(["run", "--corpus", "text"]) == 1
    _one_line(capsys, "the corpus could not be looked at: broken")
    assert not (tmp_path / "assay-runs").exists()


def test_a_port_in_use_is_5(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert call(["run", "--port", str(port)]) == 5
    _one_line(capsys, f"port {port} is in use")


def test_a_database_from_a_newer_version_is_5(tmp_path: Path, ended: Path, capsys) -> None:
    import sqlite3

    with sqlite3.connect(ended / "assay.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999_future'")
    assert call(["run", "--db", f"sqlite:///{ended}/assay.db"]) == 5
    _one_line(capsys, "")


@pytest.mark.parametrize("url", ["sqlite:////proc/assay.db", "mysql://x/y", "nonsense"])
def test_a_database_that_cannot_be_used_is_5(url: str, capsys) -> None:
    assert call(["run", "--db", url]) == 5
    _one_line(capsys, "")


def test_a_directory_that_cannot_be_written_is_5(capsys) -> None:
    assert call(["run", "--dir", "/proc/assay"]) == 5
    _one_line(capsys, "cannot write to /proc/assay")


def test_without_ray_it_is_5(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert call(["run"]) == 5
    _one_line(capsys, "Ray is not installed")


def test_without_room_it_is_5(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    usage = checks.shutil.disk_usage("/")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert call(["run"]) == 5
    _one_line(capsys, "no room in")


def test_good_input_does_start(capsys) -> None:
    """The negative control of the above: with nothing wrong, the run is started."""
    with pytest.raises(AssertionError, match="something was started"):
        call(["run", "--dir", "fine"])
    first = capsys.readouterr().err.splitlines()[0].split()
    assert first[0] == "status"
    assert first[1].startswith("http://127.0.0.1:")
    assert first[2:] == ["dir", str(Path("fine").absolute())]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seed", "1"], "--seed is 0"),
        (["--nodes", "3"], "--nodes is 2"),
        (["--sensors", "off"], "--sensors is True"),
        (["--steps", "39"], "may only grow"),
        (["--dir", "elsewhere"], "is not --resume"),
        (["--pack", "documents"], "--pack is stream"),
        (["--vocab-size", "300"], "--vocab-size is None"),
    ],
)
def test_a_resumed_run_must_agree(arguments: list[str], told: str, ended: Path, capsys) -> None:
    assert call(["run", "--resume", str(ended), *arguments]) == 2
    _one_line(capsys, told)


def test_a_resumed_run_takes_over_what_was_not_said(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Plan] = []
    whole = Session.__init__

    def noted(self: Session, plan: Plan) -> None:
        seen.append(plan)
        whole(self, plan)

    monkeypatch.setattr(Session, "__init__", noted)
    with pytest.raises(AssertionError, match="something was started"):
        call(["run", "--resume", str(ended), "--steps", "50", "--seed", "0", "--drill", "kill@50"])
    assert [(plan.directory, len(plan.nodes)) for plan in seen] == [(str(ended), 3)]


def test_a_directory_that_holds_a_run_is_not_overwritten(ended: Path, capsys) -> None:
    assert call(["run", "--dir", str(ended)]) == 2
    _one_line(capsys, "--resume")


def test_two_runs_do_not_share_a_directory(tmp_path: Path, ended: Path, capsys) -> None:
    with claimed(tmp_path):
        assert call(["run", "--dir", str(tmp_path)]) == 5
    assert f"another run is active in {tmp_path}" in capsys.readouterr().err
    with claimed(ended):
        assert call(["run", "--resume", str(ended), "--steps", "90"]) == 5
    assert f"another run is active in {ended}" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="something was started"):  # the control: let go of, it can be had
        call(["run", "--dir", str(tmp_path)])


def test_status_after_the_end_lists_no_process(ended: Path, capsys) -> None:
    assert call(["status", "--dir", str(ended), "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["processes"], document["running"]) == ("assay.status/1", [], False)


def test_status_lists_what_the_supervisor_runs(ended: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"role": "raylet", "node": "n0", "rank": None, "generation": None, "pid": os.getpid()}
    gone = {**entry, "pid": 2**22 + 1}
    (ended / "processes.json").write_text(json.dumps({"schema": "assay.processes/1", "processes": [entry, gone]}))
    monkeypatch.setattr("controller.cli.rundir.RunDirectory.running", True)
    assert call(["status", "--dir", str(ended), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["processes"] == [entry]


@pytest.mark.parametrize(
    "arguments", [["status"], ["job", "show"], ["job", "steps"], ["incident", "list"], ["checkpoint", "list"]]
)
def test_a_folder_that_is_no_run_is_2(arguments: list[str], tmp_path: Path, capsys) -> None:
    assert call([*arguments, "--dir", str(tmp_path)]) == 2
    _one_line(capsys, "not the directory of a run")


def test_each_device_has_a_row_with_what_is_held_against_it() -> None:
    entry = {"device": "gpu-7", "serial": "", "mean": 0.136, "evidence": 1.0, "faults": 1, "undecided": 0}
    node = {"node": "n0", "suspicion": [{**entry, "false_alarms": 3, "last_at": None}]}
    (row,) = suspicions(node)
    assert list(row) == ["gpu-7", None, "n0", "0.136", 1.0, 1, 0, 3, None]
    assert len(row) == len(SUSPICION)
    assert list(suspicions({"node": "of an older run"})) == []


def test_an_unknown_job_or_incident_is_1(ended: Path, capsys) -> None:
    assert call(["job", "steps", "nobody", "--dir", str(ended)]) == 1
    _one_line(capsys, "nobody")
    assert call(["incident", "show", "inc-9", "--dir", str(ended)]) == 1
    _one_line(capsys, "inc-9")


def test_a_lost_database_is_5(ended: Path, capsys) -> None:
    (ended / "assay.db").unlink()
    assert call(["status", "--dir", str(ended)]) == 5
    _one_line(capsys, "assay.db")


def test_a_drill_into_an_ended_run_is_3(ended: Path, capsys) -> None:
    assert call(["drill", "kill", "--job", "job-1", "--step", "3", "--dir", str(ended)]) == 3
    _one_line(capsys, "has ended")


def test_a_drill_into_a_silent_controller_is_3(ended: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("controller.cli.rundir.RunDirectory.running", True)
    monkeypatch.setattr("controller.cli.client.Operator.__init__.__defaults__", (0.2,))
    assert call(["drill", "kill", "rank=0", "--job", "job-1", "--step", "3", "--dir", str(ended)]) == 3
    _one_line(capsys, "no controller answers")


@pytest.mark.parametrize(("step", "code"), [(6, 2), (7, 0)])
def test_a_drill_in_a_step_that_is_over_is_2(
    step: int, code: int, ended: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("controller.cli.rundir.RunDirectory.running", True)
    monkeypatch.setattr("controller.cli.client.Operator.read", lambda self, kind, ident: {"committed_steps": 6})
    monkeypatch.setattr("controller.cli.client.Operator.inject", lambda self, job, drill, reason: drill.id)
    assert call(["drill", "kill", "rank=0", "--job", "job-1", "--step", str(step), "--dir", str(ended)]) == code
    if code:
        _one_line(capsys, "is over")
    else:  # the control
        assert "is armed" in capsys.readouterr().err


@pytest.mark.parametrize("drill", [["flood"], ["kill", "bit=1"], ["kill", "rank=9"], ["sdc", "x=1"]])
def test_a_wrong_drill_is_2(drill: list[str], ended: Path, capsys) -> None:
    assert call(["drill", *drill, "--job", "job-1", "--step", "3", "--dir", str(ended)]) == 2
    _one_line(capsys, "drill")


def test_a_checkpoint_that_is_not_there(ended: Path, capsys) -> None:
    assert call(["checkpoint", "verify", "--dir", str(ended)]) == 5
    _one_line(capsys, "has no checkpoint")
    (ended / "checkpoints" / "job-1" / "step-00000010").mkdir(parents=True)
    assert call(["checkpoint", "verify", "20", "--dir", str(ended)]) == 1
    _one_line(capsys, "step-00000010")


def test_a_damaged_run_json_is_2(ended: Path, capsys) -> None:
    (ended / "run.json").write_text('{"schema": "assay.rundir/1", "job": 3')
    assert call(["status", "--dir", str(ended)]) == 2
    _one_line(capsys, "damaged")


def test_a_recycled_pid_is_not_a_running_run(tmp_path: Path) -> None:
    assert not record(tmp_path, supervisor_pid=os.getpid()).running


def test_help_loads_no_command() -> None:
    script = (
        "import sys\nfrom controller.cli.main import call\ncode = call(['--help'])\n"
        "heavy = {'grpc', 'sqlalchemy', 'rich', 'torch', 'ray'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in COMMANDS)


def test_no_command_loads_torch_ray_or_the_agent() -> None:
    script = (
        "import importlib, sys\nfrom controller.cli.main import COMMANDS\n"
        "for module, _ in COMMANDS.values(): importlib.import_module(module)\n"
        "sys.exit(bool({'torch', 'ray', 'tokenizers', 'agent'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_installed_command_exits_as_promised(tmp_path: Path) -> None:
    assay = Path(sys.executable).with_name("assay")
    started = time.monotonic()
    done = subprocess.run([assay, "run", "--preset", "huge"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "assay: unknown preset 'huge'; known are tiny, small\n"
    assert time.monotonic() - started < 10.0


def _one_line(capsys, told: str) -> None:
    """Exactly one line on stderr, with `told` in it, and nothing on stdout; a sign of life before it does not count."""
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith(("status http", "reading the corpus"))]
    assert len(lines) == 1, shown.err
    assert told in lines[0]
    assert lines[0].startswith("assay: ")
    assert shown.out == ""
