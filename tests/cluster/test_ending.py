"""However and whenever a run is ended from outside, nothing of it is alive five seconds later."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Run, ours, wait_for

pytestmark = pytest.mark.cluster
#: What is promised.
GONE_S = 5.0


def _supervised(run: Run) -> bool:
    return (run.directory / "processes.json").exists()


def _ray_is_up(run: Run) -> bool:
    return any((run.directory / "logs").glob("raylet-*.log"))


def _trains(run: Run) -> bool:
    run.reach(3)
    return True


@pytest.mark.parametrize("moment", [_supervised, _ray_is_up, _trains], ids=["start", "ray", "training"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["ctrl-c", "kill"])
def test_nothing_is_left(tmp_path: Path, moment: Callable[[Run], bool], number: signal.Signals, code: int) -> None:
    run = Run(tmp_path / "run", "--nodes", "2", "--spares", "1", "--steps", "500")
    try:
        wait_for(lambda: moment(run), moment.__name__)
        run.process.send_signal(number)
        assert run.process.wait(GONE_S) == code
        wait_for(lambda: not ours(run.directory), f"{ours(run.directory)} to end", GONE_S)
        assert not [entry for entry in Path("/dev/shm").iterdir() if _belongs(entry, run.directory)]
    finally:
        run.kill()


def test_a_killed_supervisor_leaves_nothing_either(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "--nodes", "1", "--spares", "0", "--steps", "500")
    try:
        os.kill(run.pid("supervisor"), signal.SIGKILL)
        assert run.process.wait(GONE_S + 2) == 1
        wait_for(lambda: not ours(run.directory), "the processes to end", GONE_S)
    finally:
        run.kill()


def _belongs(entry: Path, directory: Path) -> bool:
    configs = (directory / "nodes").glob("*/agent.json")
    return entry.name.startswith("assay-") and any(str(entry) in config.read_text() for config in configs)
