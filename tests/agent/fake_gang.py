"""A gang without Ray for the daemon's tests: speaks the local protocol, and keeps workers that only pretend to train.

A worker is told what to do by drills: their parameter "do" is "steps", "complete", "collective", "kill_controller",
or "goodbye" (its own word on why it ends, then the end).
"""

import argparse
import ctypes
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from agent.client import DaemonClient
from agent.slots import SlotRecord, Slots, SlotsError


def pretend_to_train(sock: Path, standby: str) -> None:
    """A worker: waits on stdin for its assignment, then does what drills say."""
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    client = DaemonClient(sock, "worker", standby, on_message=orders.put, on_lost=lambda: os._exit(1))
    say({"ready": True})
    seat = json.loads(sys.stdin.readline())
    job, generation, rank = seat["job"], seat["generation"], seat["rank"]
    try:
        slots = Slots.open(Path(seat["slots"]))
    except (FileNotFoundError, SlotsError):
        slots = Slots.create(Path(seat["slots"]), 4096)
    slots.enter(generation, 3, "forward")
    client.report("resumed", {"job": job, "generation": generation, "rank": rank}, traceparent=seat["traceparent"])
    while True:
        message = orders.get()
        match message.get("drill", {}).get("params", {}).get("do") if message["t"] == "drill" else message["t"]:
            case "steps":
                slots.write_record(0, SlotRecord(generation, 1, 0xABC, 0xDEF))
                slots.commit(0)
                client.step(job, generation, rank, {"step": 1, "loss": 1.5, "tokens": 8})
            case "vote":
                client.report("audit_result", {"job": job, "found": json.dumps(message["votes"])}, urgent=True)
            case "kill_controller":
                client.send({"t": "kill_controller"})
            case "goodbye":
                client.report("worker_exited", {"cause": "error", "detail": "its own word", "step": 77})
                client.flush(5.0)
                os._exit(1)
            case "complete" | "collective" as cause:
                ended = {"cause": {"complete": "completed"}.get(cause, cause), "detail": "as told"}
                client.report("checkpoint_captured", {"job": job, "step": 1})
                client.report("worker_exited", ended, urgent=True)
                client.flush(5.0)
                say(ended)


def say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


class FakeGang:
    def __init__(self, runtime: Path) -> None:
        self._sock = runtime / "sock"
        self._inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self._workers: dict[str, subprocess.Popen[str]] = {}
        self._client = DaemonClient(self._sock, "gang", on_message=self._inbox.put, on_lost=self._lost)

    def serve(self) -> None:
        while (message := self._inbox.get())["t"] != "shutdown":
            getattr(self, message["t"])(message)
        self._end()

    def prepare(self, message: dict[str, Any]) -> None:
        standby = message["standby"]
        if json.loads(message["spec"]).get("broken"):
            self._client.send({"t": "exited", "standby": standby, "cause": "error", "detail": "cannot be built"})
            return
        self._workers[standby] = process = subprocess.Popen(
            [sys.executable, __file__, "--worker", standby, "--runtime", str(self._sock.parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._follow, args=(standby, process), daemon=True).start()

    def promote(self, message: dict[str, Any]) -> None:
        stdin = self._workers[message["standby"]].stdin
        assert stdin is not None
        stdin.write(json.dumps(message["assignment"]) + "\n")
        stdin.flush()

    def replay(self, message: dict[str, Any]) -> None:
        request = message["request"]
        digest = hashlib.sha256(Path(request["state"]).read_bytes()).hexdigest()
        body = {"step": request["step"], "rank": request["rank"], "votes": [{"role": "third", "digest": digest}]}
        answer = {"t": "replayed", "standby": message["standby"], "action_id": request["action_id"]}
        self._client.send({**answer, "body": body, "error": ""})

    def discard(self, message: dict[str, Any]) -> None:
        self._workers[message["standby"]].kill()

    def _follow(self, standby: str, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if said.pop("ready", False):
                known = {"pid": process.pid, "rendezvous": "127.0.0.1:1", "fingerprint": "f"}
                self._client.send({"t": "ready", "standby": standby, **known})
            else:
                self._client.send({"t": "exited", "standby": standby, **said})
                self._client.flush(5.0)
                process.kill()
        process.wait()

    def _lost(self) -> None:
        self._end()
        os._exit(1)

    def _end(self) -> None:
        for process in self._workers.values():
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime", type=Path)
    parser.add_argument("--worker")
    options, _ = parser.parse_known_args()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if options.worker:
        pretend_to_train(options.runtime / "sock", options.worker)
    else:
        FakeGang(options.runtime).serve()


def eventually(condition: Any, seconds: float = 20.0) -> bool:
    """Whether `condition` comes true in time; for what gives no notice of itself, such as a process's state."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        os.sched_yield()
    return True


if __name__ == "__main__":
    main()
