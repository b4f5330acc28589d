"""A supervisor with harmless children, run as a process of its own: python fake_cluster.py PLAN."""

import signal
import sys
from pathlib import Path

from controller.local.plan import Plan
from controller.local.supervisor import Child, Supervisor

#: Ignores SIGTERM and has a child in a session of its own, as `ray start` does; neither may survive.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""
POLITE = """
import pathlib, signal, sys, time
def leave(*_):
    pathlib.Path(sys.argv[1]).write_text("goodbye")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1]).write_text("hello")
time.sleep(600)
"""
HASTY = "import sys; sys.exit(3)"


def children(plan: Plan) -> list[Child]:
    """One that says goodbye, one that does not, and one that ends at once again and again."""
    directory = Path(plan.directory)
    logs = directory / "logs"
    polite = [sys.executable, "-c", POLITE, str(directory / "polite.txt")]
    return [
        Child("controller", "", polite, {}, logs / "controller.log", True, lambda: True),
        Child("ray-head", "", [sys.executable, "-c", STUBBORN], {}, logs / "head.log", True, lambda: True),
        Child("agent", "n0", [sys.executable, "-c", HASTY], {}, logs / "agent.log", True, lambda: True),
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    made = Plan.from_json(Path(sys.argv[1]).read_text())
    sys.exit(Supervisor(made, children(made)).run())
