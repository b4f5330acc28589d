"""A peer that vanishes without a word is noticed by its silence, one that has nothing to say is not."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import running
from running import Controller, until


@pytest.fixture
def agents(shared: Controller) -> Iterator[list[subprocess.Popen[str]]]:
    """Two agents in processes of their own, linked: "stopped" and "idle"."""
    command = [sys.executable, running.__file__, shared.address]
    started = [subprocess.Popen([*command, node], stdout=subprocess.PIPE, text=True) for node in ("stopped", "idle")]
    for one in started:
        assert one.stdout is not None
        assert one.stdout.readline() == "linked\n"
    yield started
    for one in started:
        one.kill()
        one.communicate()


def test_a_stopped_agent_is_missed_after_a_ping(shared: Controller, agents: list[subprocess.Popen[str]]) -> None:
    """Fifteen seconds: the ping's interval and its time-out. gRPC's own would be seventy."""
    agents[0].send_signal(signal.SIGSTOP)
    until(("stopped" in shared.lost() for _ in itertools.count()), "the stopped agent to be missed", 45.0)
    assert "idle" not in shared.lost()
