"""The daemon's mouth: everything it or its workers report is encoded here, queued, and the link woken."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent import convert
from agent.actions import Process
from agent.local import Message
from agent.outbox import Outbox


def dropped_notice(count: int) -> bytes:
    """The encoded report that `count` reports could not be held."""
    return convert.report("reports_dropped", {"count": count, "reason": "the outbox was full"}, time.time())


class Reports:
    """Queues reports; `wake` is called after each."""

    def __init__(self, outbox: Outbox) -> None:
        self.wake: Callable[[], None] = _nobody
        self._outbox = outbox

    def say(self, kind: str, body: Mapping[str, Any], *, urgent: bool = True, traceparent: str = "") -> None:
        """Report something the daemon itself knows. Raises ConvertError."""
        self._put(convert.report(kind, body, time.time(), traceparent), urgent)

    def pass_on(self, message: Message) -> None:
        """Queue a worker's report. Raises ConvertError, KeyError."""
        at = float(message.get("time") or time.time())
        traceparent = str(message.get("traceparent") or "")
        payload = convert.report(message["kind"], message["body"], at, traceparent)
        self._put(payload, bool(message.get("urgent")))

    def step(self, message: Message) -> None:
        """Queue a worker's step record. Raises ConvertError, KeyError."""
        record = message["record"]
        at = float(record.get("time") or time.time())
        self._put(convert.steps(message["job"], message["generation"], message["rank"], record, at), urgent=False)

    def processes(self, found: Sequence[Process]) -> None:
        """Queue what runs on this node."""
        self._put(convert.processes(found, time.time()), urgent=False)

    def _put(self, payload: bytes, urgent: bool) -> None:
        self._outbox.append(payload, urgent=urgent)
        self.wake()


def _nobody() -> None:
    """There is no link yet."""
