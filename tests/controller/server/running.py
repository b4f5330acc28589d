"""A real `assay-controller serve` in a process of its own, and an agent's end of the wire, spoken word by word."""

import json
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from assay.v1 import agent_pb2 as pb
from assay.v1 import operator_pb2 as op
from assay.v1.operator_pb2_grpc import OperatorServiceStub

#: Importing and migrating takes a second; on a crowded machine many.
PATIENCE_S = 60.0
CONNECT = "/assay.v1.AgentService/Connect"
SPEC = json.dumps({"schema": "assay.job/1", "job": "main", "steps": 100, "world": 2})


class NotStartedError(Exception):
    """A controller ended, or did not become ready; with what it logged."""


class Controller:
    """One controller on one database; `kill` and `start` again as often as wanted."""

    def __init__(self, directory: Path, database: str) -> None:
        self.directory = directory
        self.database = database
        self.start()

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        ready = self.directory / "controller.json"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "controller.main", "serve"]
        command += ["--dir", str(self.directory), "--db", self.database]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        deadline = time.monotonic() + PATIENCE_S
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise NotStartedError((self.directory / "log").read_text())
            time.sleep(0.02)
        self.address = str(json.loads(ready.read_text())["grpc"])

    def lost(self) -> set[str]:
        """The nodes whose link broke, as the controller recorded it."""
        with sqlite3.connect(self.directory / "assay.db") as database:
            return {node for (node,) in database.execute("SELECT node FROM events WHERE type = 'LinkLost'")}

    def kill(self) -> None:
        """End it with -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.process.terminate()
        return self.process.wait(20)

    def peak_mib(self) -> float:
        """The most memory it has held so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024

    def submit(self) -> None:
        """Submit the job `main` with two ranks."""
        with grpc.insecure_channel(self.address) as channel:
            change = op.Change(actor="tests", reason="to test", idempotency_key=os.urandom(8).hex())
            OperatorServiceStub(channel).SubmitJob(op.SubmitJobRequest(change=change, spec=SPEC), timeout=10)

    def steps(self) -> list[tuple[int, int]]:
        """(rank, step) of everything that is stored of the job."""
        with grpc.insecure_channel(self.address) as channel:
            reply = OperatorServiceStub(channel).Read(op.ReadRequest(kind="steps", id="main"), timeout=10)
        return [(entry["rank"], entry["step"]) for entry in json.loads(reply.json)["steps"]]


class Wire:
    """One stream to a controller. Bytes go out as they are given, so that nonsense can be said too."""

    def __init__(self, address: str, deadline: float | None = PATIENCE_S) -> None:
        self._channel = grpc.insecure_channel(address)
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        connect = self._channel.stream_stream(
            CONNECT, request_serializer=None, response_deserializer=pb.ControllerMessage.FromString
        )
        self._answers = connect(iter(self._out.get, None), timeout=deadline)

    def say(self, message: pb.AgentMessage | bytes) -> None:
        """Send one message."""
        self._out.put(message if isinstance(message, bytes) else message.SerializeToString())

    def hear(self) -> pb.ControllerMessage:
        """The next answer that is no action. Raises grpc.RpcError when the stream was ended."""
        return next(answer for answer in self._answers if answer.WhichOneof("body") != "action")

    def hello(self, node: str = "n0", epoch: int = 1) -> pb.Welcome:
        """Say hello; the welcome."""
        self.say(hello(node, epoch))
        answer = self.hear()
        assert answer.WhichOneof("body") == "welcome"
        return answer.welcome

    def refused(self) -> tuple[grpc.StatusCode, str]:
        """How the stream was ended, instead of an answer."""
        with pytest.raises(grpc.RpcError) as ended:
            self.hear()
        return ended.value.code(), ended.value.details() or ""

    def close(self) -> None:
        """Break off."""
        self._answers.cancel()
        self._out.put(None)
        self._channel.close()


def hello(node: str = "n0", epoch: int = 1) -> pb.AgentMessage:
    """An agent's first message."""
    return pb.AgentMessage(hello=pb.Hello(node=node, epoch=epoch, boot_id="boot", version="0.1.0"))


def batch(reports: Sequence[pb.Report]) -> pb.AgentMessage:
    """Several reports in one message."""
    return pb.AgentMessage(batch=pb.ReportBatch(reports=reports))


def step_reports(first: int, last: int, rank: int = 0) -> list[pb.Report]:
    """Reports `first`..`last`, each with the record of the step of its number."""
    return [_step(seq, rank) for seq in range(first, last + 1)]


def _step(seq: int, rank: int) -> pb.Report:
    record = pb.StepRecord(step=seq, time=float(seq), loss=1.0, attempts=1, digest="d", chain="c", tokens=1)
    return pb.Report(seq=seq, time=1.0, steps=pb.StepRecords(job="main", generation=1, rank=rank, records=[record]))


def until(condition: Iterator[bool], what: str, patience: float = PATIENCE_S) -> None:
    """Look again and again until `condition` gives something true."""
    deadline = time.monotonic() + patience
    for holds in condition:
        if holds:
            return
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


if __name__ == "__main__":  # an agent that says hello and waits until it is ended: ADDRESS NODE
    wire = Wire(sys.argv[1], deadline=None)
    wire.hello(sys.argv[2])
    print("linked", flush=True)
    signal.pause()
