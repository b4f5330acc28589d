"""A worker's end of the daemon's socket: reporting never blocks the step, and a dead daemon is noticed at once."""

import collections
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Message = dict[str, Any]

#: A line's limit on the daemon's side. What is longer is dropped here, and counted.
LINE_BYTES = 64 << 10
#: Messages that may wait for a daemon that does not read: minutes of steps, a few MiB at most.
CAPACITY = 10_000
#: The daemon answers a hello from its own loop in milliseconds; this covers a machine that is badly overloaded.
WELCOME_S = 10.0


class DaemonLost(ConnectionError):
    """The daemon cannot be reached, or answered with something else than a welcome."""


class DaemonClient:
    """A connection to the daemon, made by the constructor, with two threads of its own.

    Messages from the daemon go to `on_message` (called in the reading thread) or, without one, into `inbox`.
    `on_lost` is called once, in a thread of this client, when the daemon is gone; not after `close`.
    Raises DaemonLost if there is no daemon at `path`.
    """

    def __init__(
        self,
        path: Path,
        role: str,
        standby: str = "",
        *,
        on_message: Callable[[Message], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.dropped = 0
        self.lost = threading.Event()
        self._on_message = on_message or self.inbox.put
        self._on_lost = on_lost
        self._capacity = capacity
        self._queue: collections.deque[bytes] = collections.deque()
        self._changed = threading.Condition()
        self._writing = False
        self._closed = False
        self._unsaid = 0
        self._socket = _connect(path)
        self._lines = self._socket.makefile("rb")
        self.welcome = self._greet(role, standby)
        self._threads = [
            threading.Thread(target=run, name=f"daemon-{run.__name__.strip('_')}", daemon=True)
            for run in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def report(
        self,
        kind: str,
        body: Mapping[str, Any],
        *,
        urgent: bool = False,
        traceparent: str = "",
        at: float | None = None,
    ) -> bool:
        """Report about `kind` with `body` in the wire's field names; `at`: seconds since 1970, now if not given."""
        moment = time.time() if at is None else at
        return self.send(
            {
                "t": "report",
                "kind": kind,
                "body": dict(body),
                "urgent": urgent,
                "traceparent": traceparent,
                "time": moment,
            }
        )

    def step(self, job: str, generation: int, rank: int, record: Mapping[str, Any]) -> bool:
        """Report a committed step: `record` has the fields of the wire's StepRecord."""
        return self.send({"t": "step", "job": job, "generation": generation, "rank": rank, "record": dict(record)})

    def send(self, message: Mapping[str, Any]) -> bool:
        """Queue a message and return at once. False if it was dropped: no daemon, no room, or too long (counted).

        Raises TypeError or ValueError for what JSON cannot hold.
        """
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._changed:
            if self.lost.is_set() or self._closed or len(self._queue) >= self._capacity or len(line) > LINE_BYTES:
                self.dropped += 1
                self._unsaid += 1
                return False
            self._queue.append(line)
            self._changed.notify_all()
        return True

    def flush(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until all that is queued is with the kernel, where our death cannot lose it."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost.is_set() or not (self._queue or self._writing), timeout)
            return not (self._queue or self._writing or self.lost.is_set())

    def close(self) -> None:
        """Break off; what was not flushed is lost. Not to be called from `on_message`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        _shut(self._socket)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._lines.close()
        self._socket.close()

    def _greet(self, role: str, standby: str) -> Message:
        hello = {"t": "hello", "role": role, "pid": os.getpid(), "standby": standby}
        try:
            self._socket.sendall(json.dumps(hello).encode() + b"\n")
            welcome = json.loads(self._lines.readline() or b"{}")
        except (OSError, ValueError) as error:
            raise DaemonLost(f"the daemon did not answer: {error}") from error
        if welcome.get("t") != "welcome":
            raise DaemonLost("the daemon did not answer with a welcome")
        self._socket.settimeout(None)
        return dict(welcome)

    def _write(self) -> None:
        while (data := self._next()) is not None:
            try:
                self._socket.sendall(data)
            except OSError:
                self._lose()
                return
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _next(self) -> bytes | None:
        """Wait for something to write; None when there will be nothing any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed or self.lost.is_set())
            if self._closed or self.lost.is_set():
                return None
            data = b"".join(self._queue)
            self._queue.clear()
            if self._unsaid:
                data += _dropped(self._unsaid)
                self._unsaid = 0
            self._writing = True
            return data

    def _read(self) -> None:
        try:
            for line in self._lines:
                self._on_message(json.loads(line))
        except (OSError, ValueError):
            pass  # a broken connection or a line that its writer's death cut short: the end, either way
        self._lose()

    def _lose(self) -> None:
        with self._changed:
            first = not self.lost.is_set() and not self._closed
            self.lost.set()
            self._changed.notify_all()
        _shut(self._socket)
        if first and self._on_lost is not None:
            self._on_lost()


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(WELCOME_S)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise DaemonLost(f"no daemon at {path}: {error.strerror or error}") from error
    return connection


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # not connected any more


def _dropped(count: int) -> bytes:
    body = {"count": count, "reason": "the daemon did not keep up"}
    message = {"t": "report", "kind": "reports_dropped", "body": body, "urgent": False, "traceparent": ""}
    return json.dumps(message | {"time": time.time()}).encode() + b"\n"
