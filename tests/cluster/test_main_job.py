"""The main job as a user runs it: faults from inside and outside end in the very bits of the undisturbed run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import BASE, Document, Run, Start, ask, incident, nodes, same_bits, wait_for

pytestmark = pytest.mark.cluster


def test_the_undisturbed_run(clean: Document, tmp_path: Path) -> None:
    assert clean["schema"] == "assay.run/1"
    assert clean["executed_steps"] == clean["committed_steps"] == 20
    assert clean["incidents"] == []
    assert [c["step"] for c in clean["checkpoints"]] == [10, 20]
    assert nodes(clean, 1) == {0: "n0", 1: "n1"}
    assert clean["loss_last"] < clean["loss_first"]
    verified = ask("checkpoint", "verify", "--dir", clean["dir"])
    assert verified["digest"] == clean["state_digest"]
    steps = ask("job", "steps", clean["job"], "--dir", clean["dir"])["steps"]
    assert sorted((s["rank"], s["step"]) for s in steps) == [(r, s) for r in (0, 1) for s in range(1, 21)]
    assert clean["lost_coverage"] == []
    assert all((s["failed_checks"], s["unjudged"]) == (0, 0) < (s["checks"], 0) for s in steps)


def test_corruption_and_a_kill_leave_no_trace_in_the_bits(run: Start, clean: Document) -> None:
    document = run(*BASE, "--drill", "sdc@6:rank=1,op=wgrad", "--drill", "kill@13:rank=0").finish()
    same_bits(document, clean)
    assert document["executed_steps"] <= 22
    sdc = incident(document, "sdc")
    assert (sdc["verdict"], sdc["node"], sdc["injected_step"], sdc["detected_step"]) == ("CORRUPT", "n1", 6, 6)
    assert sdc["before_commit"] is True
    assert sdc["caught"] is True
    assert {vote["node"] for vote in sdc["votes"]} == {"n0", "n1"}
    crash = incident(document, "crash")
    assert (crash["injected_step"], crash["node"], crash["resumed_from"]) == (13, "n0", "live")
    assert 0 <= crash["detect_s"] <= crash["recovery_s"] < 3
    assert [g["generation"] for g in document["generations"]] == [1, 2]
    replay = subprocess.run(
        [sys.executable, "-m", "controller.main", "replay", "--dir", document["dir"]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert replay.returncode == 0, replay.stdout + replay.stderr
    one_trace_each(document)
    again = ask("incident", "replay", sdc["id"], "--dir", document["dir"], "--times", "2")
    assert (again["verdict"], again["upholds"], again["step"], again["rank"]) == ("CORRUPT", True, 6, 1)
    agree = {vote["role"]: vote["agrees"] for vote in again["votes"]}
    assert agree == {"original": False, "suspect": True, "peer": True}
    assert again["digests"] == [next(vote["digest"] for vote in sdc["votes"] if vote["role"] == "peer")] * 2


def one_trace_each(document: Document) -> None:
    """Each incident is one trace, from the alarm by way of the decision to the first step that committed again."""
    traces: dict[str, set[tuple[str, str]]] = {}
    for line in Path(document["dir"], "trace.jsonl").read_text().splitlines():
        span = json.loads(line)
        traces.setdefault(span["trace_id"], set()).add((span["service"], span["name"]))
    held = {
        ("assay-worker", "assay.worker.alarm"),
        ("assay-worker", "assay.worker.replay"),
        ("assay-controller", "assay.incident.decide"),
        ("assay-worker", "assay.worker.redo"),
    }
    restarted = {
        ("assay-agent", "assay.agent.worker_exited"),
        ("assay-controller", "assay.incident.decide"),
        ("assay-agent", "assay.agent.stop_generation"),
        ("assay-agent", "assay.agent.start_generation"),
        ("assay-worker", "assay.worker.resume"),
        ("assay-worker", "assay.worker.first_step"),
    }
    for wanted in (held, restarted):
        assert [spans for spans in traces.values() if wanted <= spans], (wanted, traces)


def test_without_sensors_the_corruption_escapes_and_is_listed_so(run: Start, clean: Document) -> None:
    """The negative control."""
    document = run(*BASE, "--sensors", "off", "--drill", "sdc@6:rank=1").finish()
    escaped = incident(document, "sdc")
    assert (escaped["caught"], escaped["injected_step"], escaped["verdict"]) == (False, 6, None)
    assert document["state_digest"] != clean["state_digest"]


def test_a_persistent_corruption_ends_in_quarantine_and_a_spare(run: Start, clean: Document) -> None:
    document = run(*BASE, "--drill", "sdc@6:rank=1,fault=tile,persistent=1").finish()
    same_bits(document, clean)
    sdc = incident(document, "sdc")
    assert (sdc["verdict"], sdc["node"]) == ("CORRUPT", "n1")
    assert {vote["node"] for vote in sdc["votes"]} == {"n0", "n1", "n2"}
    assert "Quarantine" in {action["type"] for action in sdc["actions"]}
    assert nodes(document, 2) == {0: "n0", 1: "n2"}


def test_a_lost_node_is_replaced_by_the_spare(run: Start, clean: Document) -> None:
    document = run(*BASE, "--drill", "node@9:rank=1").finish()
    same_bits(document, clean)
    lost = incident(document, "node")
    assert (lost["node"], lost["injected_step"], lost["resumed_from"]) == ("n1", 9, "replica")
    assert nodes(document, 2)[1] == "n2"


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(run: Start, clean: Document) -> None:
    document = run(*BASE, "--drill", "checkpoint@25", "--steps", "30").finish()
    refused = incident(document, "checkpoint")
    assert (refused["injected_step"], refused["resumed_from"]) == (25, "checkpoint")
    assert document["committed_steps"] == 30
    verified = ask("checkpoint", "verify", "--dir", document["dir"])
    assert verified["digest"] == document["state_digest"]
    undisturbed = run(*BASE, "--steps", "30", name="undisturbed").finish()
    same_bits(document, undisturbed)
    assert undisturbed["state_digest"] != clean["state_digest"]  # another step count, other bits


def test_a_worker_killed_and_one_stopped_from_outside_are_replaced(run: Start) -> None:
    steps = ("--preset", "tiny", "--nodes", "2", "--spares", "1", "--steps", "60", "--seed", "7")
    disturbed = run(*steps)
    disturbed.reach(5)
    os.kill(disturbed.pid("worker", rank=1), signal.SIGKILL)
    wait_for(lambda: any(i["kind"] == "crash" for i in _incidents(disturbed)), "the crash")
    wait_for(lambda: _recovered(disturbed, "crash"), "its recovery")
    os.kill(disturbed.pid("worker", rank=0), signal.SIGSTOP)
    document = disturbed.finish()
    undisturbed = run(*steps, name="undisturbed").finish()
    same_bits(document, undisturbed)
    crash, hang = incident(document, "crash"), incident(document, "hang")
    assert (crash["node"], hang["node"]) == ("n1", "n0")
    assert crash["injected_step"] is None
    assert document["executed_steps"] <= 62


def test_the_controller_killed_three_times_loses_and_doubles_nothing(run: Start) -> None:
    three = run("--steps", "60", "--nodes", "2", "--spares", "0", "--seed", "7")
    for _ in range(3):
        before = three.pid("controller")
        os.kill(before, signal.SIGKILL)
        wait_for(lambda before=before: three.pid("controller") != before and three.status(), "a new controller")
    document = three.finish()
    assert document["committed_steps"] == 60
    assert [g["generation"] for g in document["generations"]] == [1]
    steps = ask("job", "steps", document["job"], "--dir", document["dir"])["steps"]
    assert sorted((s["rank"], s["step"]) for s in steps) == [(r, s) for r in (0, 1) for s in range(1, 61)]


def test_one_node_alone_cannot_decide(run: Start) -> None:
    document = run("--nodes", "1", "--spares", "0", "--steps", "10", "--seed", "3", "--drill", "sdc@4").finish()
    sdc = incident(document, "sdc")
    assert (sdc["verdict"], sdc["node"]) == ("UNDECIDED", "n0")
    assert document["committed_steps"] == 10


def test_a_tight_tolerance_accuses_nobody(run: Start, clean: Document) -> None:
    document = run(*BASE, "--tolerance-scale", "0.001").finish()
    same_bits(document, clean)
    assert {i["verdict"] for i in document["incidents"]} == {"FALSE_ALARM"}
    assert not [a for i in document["incidents"] for a in i["actions"] if a["type"] == "Quarantine"]


def test_a_run_is_resumed_from_its_directory(run: Start, clean: Document) -> None:
    first = run("--preset", "tiny", "--nodes", "2", "--spares", "1", "--steps", "12", "--seed", "7")
    half = first.finish()
    done = subprocess.run(
        [sys.executable, "-m", "controller.cli.main", "run", "--resume", half["dir"], "--steps", "20", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    same_bits(json.loads(done.stdout), clean)


def _incidents(one: Run) -> list[Document]:
    return list(ask("incident", "list", "--dir", str(one.directory))["incidents"])


def _recovered(one: Run, kind: str) -> bool:
    return any(i["kind"] == kind and i["recovery_s"] is not None for i in _incidents(one))
