"""Runs `assay run` as a user does, in a process of its own, and looks at it from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASSAY = [sys.executable, "-m", "controller.cli.main"]
#: Long enough for a cluster to start and train on a busy machine; a test that needs more is broken.
PATIENCE_S = 240.0

#: The reference: two ranks, a spare, twenty steps.
BASE = ("--preset", "tiny", "--nodes", "2", "--spares", "1", "--steps", "20", "--seed", "7")

Document = dict[str, Any]


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE_S) -> Any:
    """Poll until `condition` gives something true; fail with `what` otherwise."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {patience:.0f} s for {what}")


def ask(*arguments: str) -> Document:
    """One `assay ... -o json` command's document."""
    done = subprocess.run([*ASSAY, *arguments, "-o", "json"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}: {done.stderr}"
    document: Document = json.loads(done.stdout)
    return document


class Run:
    """One `assay run` in the background; `finish` waits for its document."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        command = [*ASSAY, "run", "--dir", str(directory), *arguments, "-o", "json"]
        self.errors = directory.parent / f"{directory.name}.stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)

    def finish(self, expect: int = 0) -> Document:
        """Wait for the end; the document on stdout."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == expect, f"exit {self.process.returncode}: {self.errors.read_text()[-3000:]}"
        document: Document = json.loads(out) if out.strip() else {}
        return document

    def status(self) -> Document | None:
        """`assay status`, or None while there is no controller to ask."""
        done = subprocess.run(
            [*ASSAY, "status", "--dir", str(self.directory), "-o", "json"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return json.loads(done.stdout) if done.returncode == 0 else None

    def pid(self, role: str, rank: int | None = None, node: str | None = None) -> int:
        """Wait for a process to be listed; its pid."""

        def listed() -> int | None:
            for entry in (self.status() or {}).get("processes", []):
                if entry["role"] != role or (rank is not None and entry["rank"] != rank):
                    continue
                if node is None or entry["node"] == node:
                    return int(entry["pid"])
            return None

        return int(wait_for(listed, f"a {role} of rank {rank} on {node}"))

    def reach(self, step: int) -> None:
        """Wait until the controller knows of a committed step."""
        wait_for(lambda: self._committed() >= step, f"step {step}")

    def _committed(self) -> int:
        state = self.status()
        return int(state["job"]["committed_steps"]) if state and state.get("job") else 0

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)


def ours(directory: Path) -> list[str]:
    """Every living process whose command line or environment names this run's directory or its runtime."""
    marks = {str(directory).encode()}
    for config in (directory / "nodes").glob("*/agent.json"):
        marks.add(str(Path(json.loads(config.read_text())["runtime"]).parent).encode())
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            text = Path(f"/proc/{entry}/cmdline").read_bytes() + Path(f"/proc/{entry}/environ").read_bytes()
            state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and any(mark in text for mark in marks):
            found.append(f"{entry} {text[:120]!r}")
    return found


def incident(document: Document, kind: str) -> Document:
    """The one incident of its kind."""
    (found,) = [i for i in document["incidents"] if i["kind"] == kind]
    return dict(found)


#: Of the fixture `run`.
Start = Callable[..., Run]


def same_bits(document: Document, clean: Document) -> None:
    """Both runs committed all their steps, and their states and histories are equal bit for bit."""
    assert document["committed_steps"] == clean["committed_steps"] == document["steps"]
    assert document["state_digest"] == clean["state_digest"]
    assert document["chain_digest"] == clean["chain_digest"]


def nodes(document: Document, generation: int) -> dict[int, str]:
    """Which node had which rank."""
    return {p["rank"]: p["node"] for p in document["placement"] if p["generation"] == generation}
