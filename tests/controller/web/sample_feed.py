"""A feed with everything on it, and text that would like to be a script."""

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"

INCIDENT: dict[str, Any] = {
    "id": "inc-0001",
    "kind": "sdc",
    "job": "job-1",
    "detected_step": 3,
    "injected_step": 3,
    "before_commit": True,
    "verdict": "CORRUPT",
    "votes": [{"node": EVIL, "device": "cpu-n1", "pid": 7, "digest": "00ff", "role": "suspect"}],
    "node": EVIL,
    "device": "cpu-n1",
    "actions": [{"type": "Replay", "target": "n2", "reason": EVIL}],
    "detect_s": 0.048,
    "recovery_s": 0.25,
    "resumed_from": "live",
    "caught": True,
    "timeline": [{"time": 100.0, "text": "the gate holds step 3"}, {"time": 100.25, "text": EVIL}],
}

DOUBTED: dict[str, Any] = {
    "device": "cpu-n0",
    "serial": EVIL,
    "mean": 0.136,
    "evidence": 1.0,
    "faults": 1,
    "undecided": 0,
    "false_alarms": 3,
    "last_at": 100.0,
}

PICTURE: dict[str, Any] = {
    "schema": "assay.status/1",
    "job": {
        "job": "job-1",
        "status": "RUNNING",
        "world": 2,
        "steps": 40,
        "committed_steps": 4,
        "generation": 1,
        "reason": "",
        "loss": [[1, 5.5], [2, 5.0], [3, float("nan")], [4, 4.5]],
        "generations": [
            {"generation": 1, "first_step": 1, "last_step": 4, "resumed_from": "init", "reason": "first start"}
        ],
        "placement": [{"generation": 1, "rank": 0, "node": "n0", "device": "cpu-n0", "pid": 5}],
        "spec": {},
        "drills": [],
        "lost_coverage": [{"rank": 0, "text": f"sensors of cpu-n0 fail: {EVIL}"}],
    },
    "jobs": [],
    "nodes": [
        {"node": "n0", "state": "HEALTHY", "spare": False, "suspicion": [DOUBTED]},
        {"node": EVIL, "state": "QUARANTINED", "spare": True},
    ],
    "processes": [],
    "open_incidents": [],
    "controller": {"epoch": 1, "heartbeat": 1.0, "resigned": False},
    "incidents": [INCIDENT],
    "checkpoints": [{"job": "job-1", "step": 4, "trust": "verified", "bytes": 1048576, "digest": "abcd"}],
}


class SampleFeed:
    """Gives the pictures that it is told, the newest first to whoever comes late."""

    def __init__(self, picture: dict[str, Any] | None = None) -> None:
        self.picture = copy.deepcopy(PICTURE if picture is None else picture)
        self._number = 0
        self._ended = False
        self._news = asyncio.Condition()

    def snapshot(self) -> dict[str, Any]:
        return self.picture

    def incident(self, incident: str) -> dict[str, Any] | None:
        return next((entry for entry in self.picture["incidents"] if entry["id"] == incident), None)

    async def deltas(self) -> AsyncIterator[dict[str, Any]]:
        seen = -1
        while True:
            async with self._news:
                while not self._ended and self._number == seen:
                    await self._news.wait()
                if self._number == seen:
                    return
                seen, newest = self._number, self.picture
            yield newest

    async def show(self, **changes: Any) -> None:
        """Change top-level keys of the picture."""
        async with self._news:
            self.picture = {**self.picture, **changes}
            self._number += 1
            self._news.notify_all()

    async def end(self) -> None:
        """End every stream after its last picture."""
        async with self._news:
            self._ended = True
            self._news.notify_all()
