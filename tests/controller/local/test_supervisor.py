"""The process tree: what dies is restarted, and nothing is left however the run ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import marked, wait_for

from controller.local.plan import Plan

HERE = Path(__file__).parent
#: What the run's contract allows after Ctrl-C or a kill.
PROMISED_S = 5.0

#: A stand-in for `assay run`: starts the supervisor through Session, then waits.
COMMAND = """
import sys, time
from pathlib import Path
from unittest import mock
from controller.cli import session
from controller.local.plan import Plan
plan = Plan.from_json(Path(sys.argv[1]).read_text())
command = [sys.executable, sys.argv[2], sys.argv[1]]
real = session.subprocess.Popen
with mock.patch.object(session.subprocess, "Popen", lambda _command, **rest: real(command, **rest)):
    run = session.Session(plan)
    run.start()
print(run.pid, flush=True)
try:
    with session.stoppable():
        while True:
            run.check()
            time.sleep(0.05)
except (session.Stopped, session.CommandError) as error:
    run.stop()
    sys.exit(130 if isinstance(error, session.Stopped) else 1)
"""


@pytest.fixture
def command(plan: Plan) -> Iterator[subprocess.Popen[str]]:
    """`assay run` with a fake cluster, all of it marked in its environment."""
    directory = Path(plan.directory)
    directory.mkdir(parents=True)
    file = directory / "given.json"
    file.write_text(plan.to_json())
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(file), str(HERE / "fake_cluster.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ASSAY_TEST_MARK": _mark(plan)},
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()
    for pid in marked(_mark(plan)):
        os.kill(pid, signal.SIGKILL)


def test_a_child_that_is_killed_is_back(plan: Plan, command: subprocess.Popen[str]) -> None:
    first = _up(plan)["controller"]
    killed = time.monotonic()
    os.kill(first, signal.SIGKILL)
    again = wait_for(lambda: (pid := _processes(plan).get("controller")) not in (None, first) and pid)
    assert time.monotonic() - killed < 2.0
    assert again != first


def test_a_child_that_keeps_ending_is_not_started_in_a_tight_loop(plan: Plan, command: subprocess.Popen[str]) -> None:
    _up(plan)
    seen: set[int] = set()
    until = time.monotonic() + 1.0
    wait_for(lambda: seen.add(_processes(plan).get("agent", 0)) or time.monotonic() > until)
    assert len(seen) < 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(plan: Plan, command: subprocess.Popen[str], number: signal.Signals) -> None:
    _up(plan)
    command.send_signal(number)
    assert command.wait(PROMISED_S) == 130
    _assert_nothing_left(plan)
    assert (Path(plan.directory) / "polite.txt").read_text() == "goodbye"


def test_a_second_ctrl_c_does_not_disturb_the_cleaning_up(plan: Plan, command: subprocess.Popen[str]) -> None:
    _up(plan)
    command.send_signal(signal.SIGINT)
    wait_for(lambda: (Path(plan.directory) / "polite.txt").read_text() == "goodbye")
    command.send_signal(signal.SIGINT)
    assert command.wait(PROMISED_S) == 130
    _assert_nothing_left(plan)


def test_ctrl_c_before_anything_is_up_leaves_nothing(plan: Plan, command: subprocess.Popen[str]) -> None:
    assert command.stdout is not None
    command.stdout.readline()  # the supervisor's process exists, no more is known
    time_sent = time.monotonic()
    wait_for(lambda: _handles_signals(command.pid))
    command.send_signal(signal.SIGINT)
    assert command.wait(PROMISED_S) == 130
    assert time.monotonic() - time_sent < PROMISED_S
    _assert_nothing_left(plan)


def test_a_killed_parent_leaves_nothing(plan: Plan, command: subprocess.Popen[str]) -> None:
    _up(plan)
    command.kill()
    command.wait()
    wait_for(lambda: not marked(_mark(plan)), PROMISED_S)
    _assert_nothing_left(plan)


def test_a_killed_supervisor_leaves_nothing(plan: Plan, command: subprocess.Popen[str]) -> None:
    os.kill(_up(plan)["supervisor"], signal.SIGKILL)
    assert command.wait(PROMISED_S) == 1
    _assert_nothing_left(plan)


def test_without_supervision_a_killed_parent_leaves_its_tree(plan: Plan) -> None:
    """The negative control: the same stubborn child under a plain parent survives it."""
    script = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print('up', flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "ASSAY_TEST_MARK": _mark(plan)},
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    left = marked(_mark(plan))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left


def _mark(plan: Plan) -> str:
    return f"mark-{plan.token}"


def _processes(plan: Plan) -> dict[str, int]:
    try:
        document = json.loads((Path(plan.directory) / "processes.json").read_text())
    except FileNotFoundError:
        return {}
    return {entry["role"]: entry["pid"] for entry in document["processes"]}


def _up(plan: Plan) -> dict[str, int]:
    """Wait until the polite and the stubborn child run."""
    wait_for(lambda: {"controller", "ray-head"} <= _processes(plan).keys())
    wait_for((Path(plan.directory) / "polite.txt").exists)
    wait_for(lambda: len(marked(_mark(plan))) >= 5)
    return _processes(plan)


def _handles_signals(pid: int) -> bool:
    """Whether SIGINT has a handler that is not Python's default."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _assert_nothing_left(plan: Plan) -> None:
    assert marked(_mark(plan)) == []
    assert not Path(plan.runtime).exists()
