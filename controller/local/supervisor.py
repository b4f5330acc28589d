"""Starts one machine's cluster, restarts what dies, and ends everything when `assay run` is done or gone."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from controller.local.plan import (
    Plan,
    agent_command,
    agent_config,
    controller_command,
    ray_environment,
    ray_head_command,
    raylet_command,
    write_atomically,
)
from controller.local.processes import become_subreaper, end_descendants, named_below, reap, signal_quietly

#: How often children are looked after: a dead controller is noticed within this time.
POLL_S = 0.05
#: Agents and the controller get this long to say goodbye; the whole stop must stay under five seconds.
GOODBYE_S = 1.5
ENDING_S = 2.5
#: A child that dies at once again waits longer each time, up to this.
BACKOFF_S = 5.0
_STEADY_S = 10.0
#: Between two searches for a raylet below its `ray start`: it appears seconds later, and a search reads all of /proc.
_SEARCH_S = 0.5


@dataclass(slots=True)
class Child:
    """One supervised process. `ready` says when it may start; `graceful` ones get SIGTERM first."""

    role: str
    node: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    graceful: bool
    ready: Callable[[], bool]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    not_before: float = 0.0
    failures: int = 0
    inner: int = 0
    searched: float = 0.0

    @property
    def pid(self) -> int:
        """The process that people mean by the role: the raylet itself, not the command that waits for it."""
        if self.process is None:
            return 0
        now = time.monotonic()
        if self.role == "raylet" and not self.inner and now - self.searched > _SEARCH_S:
            self.searched = now
            self.inner = named_below(self.process.pid, "raylet") or 0
        return self.inner or self.process.pid

    def start(self) -> None:
        """Start it, its output appended to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_inherited(), **self.environment},
                start_new_session=True,
            )
        self.started = time.monotonic()

    def ended(self) -> None:
        """Note that it died; the first restart follows at once."""
        now = time.monotonic()
        self.failures = 0 if now - self.started > _STEADY_S else self.failures + 1
        self.not_before = now + min(0.1 * 2**self.failures, BACKOFF_S) if self.failures > 1 else now
        self.process, self.inner = None, 0


@dataclass(slots=True)
class Supervisor:
    """The process tree of one plan."""

    plan: Plan
    children: list[Child]
    _listed: str = field(default="", init=False)

    def run(self) -> int:
        """Serve until standard input says stop or ends; 0, or 1 if something could not be ended."""
        become_subreaper()
        self._prepare()
        try:
            while not self._told_to_stop():
                self._look_after()
        finally:
            left = self._stop()
        return 1 if left else 0

    def _prepare(self) -> None:
        Path(self.plan.runtime).mkdir(parents=True, mode=0o700)
        for node in self.plan.nodes:
            write_atomically(Path(node.config), json.dumps(agent_config(self.plan, node), indent=1))

    def _told_to_stop(self) -> bool:
        """Waits up to POLL_S. End of file means that `assay run` is gone, however it went."""
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        return bool(readable)

    def _look_after(self) -> None:
        ended = reap()
        for child in self.children:
            if child.process is not None and child.process.pid in ended:
                child.ended()
        now = time.monotonic()
        for child in self.children:
            if child.process is None and now >= child.not_before and child.ready():
                child.start()
        self._list()

    def _list(self) -> None:
        """Keep DIR/processes.json true."""
        entries = [{"role": "supervisor", "node": None, "rank": None, "generation": None, "pid": os.getpid()}]
        for child in self.children:
            if child.process is None:
                continue
            entries.append(
                {"role": child.role, "node": child.node or None, "rank": None, "generation": None, "pid": child.pid}
            )
        text = json.dumps({"schema": "assay.processes/1", "processes": entries})
        if text != self._listed:
            self._listed = text
            write_atomically(Path(self.plan.directory) / "processes.json", text)

    def _stop(self) -> list[int]:
        graceful = [c.process for c in self.children if c.process is not None and c.graceful]
        for process in graceful:
            signal_quietly(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GOODBYE_S
        gone: set[int] = set()
        while {p.pid for p in graceful} - gone and time.monotonic() < deadline:
            gone |= reap().keys()
            time.sleep(0.02)
        left = end_descendants(os.getpid(), ENDING_S)
        shutil.rmtree(self.plan.runtime, ignore_errors=True)
        write_atomically(
            Path(self.plan.directory) / "processes.json", json.dumps({"schema": "assay.processes/1", "processes": []})
        )
        return left


def children_of(plan: Plan) -> list[Child]:
    """The plan's processes: controller, Ray's head, and a raylet and an agent for each node."""
    logs = Path(plan.directory) / "logs"
    ray = ray_environment(plan)
    head_is_up = _listening(plan.ray)
    children = [
        Child("controller", "", controller_command(plan), {}, logs / "controller.log", True, _always),
        Child("ray-head", "", ray_head_command(plan), ray, logs / "ray-head.log", False, _always),
    ]
    for node in plan.nodes:
        log = logs / f"raylet-{node.name}.log"
        children.append(Child("raylet", node.name, raylet_command(plan, node), ray, log, False, head_is_up))
        log = logs / f"agent-{node.name}.log"
        children.append(Child("agent", node.name, agent_command(node), ray, log, True, _always))
    return children


def _inherited() -> dict[str, str]:
    """Our environment without Ray's variables: they may point to somebody else's cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _always() -> bool:
    return True


def _listening(endpoint: str) -> Callable[[], bool]:
    """Whether something accepts connections at `endpoint`; remembered once it was seen."""
    host, _, port = endpoint.rpartition(":")
    seen = False

    def listening() -> bool:
        nonlocal seen
        if not seen:
            with socket.socket() as probe:
                probe.settimeout(0.2)
                seen = probe.connect_ex((host, int(port))) == 0
        return seen

    return listening


def main(arguments: list[str]) -> int:
    """Supervise the plan in a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us through `assay run`
    plan = Plan.from_json(Path(arguments[0]).read_text())
    return Supervisor(plan, children_of(plan)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
