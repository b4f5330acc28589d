"""Follows a job in the database until it ends, and shows how it goes on stderr."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from controller.cli.output import escape, say, seconds
from controller.store.queries import Queries

ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED"})
#: Between two looks: short beside a step, long beside a query.
POLL_S = 0.25
#: A log gets a line this often even if little happens.
PLAIN_S = 5.0

Document = dict[str, Any]


class Display:
    """Progress on stderr: a bar on a terminal, otherwise plain lines."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._last_text = ""
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=steps, loss="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, job: Document) -> None:
        """Show how far the job is."""
        done = int(job.get("committed_steps") or 0)
        loss = last_loss(job)
        text = describe(job)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text, loss=loss)
            return
        now = time.monotonic()
        if text != self._last_text or now - self._last_line >= PLAIN_S:
            self._last_text, self._last_line = text, now
            say(" ".join(part for part in (text, f"step {done}/{self._steps}", loss) if part))

    def tell(self, text: str) -> None:
        """Say one thing that happened."""
        if self._bar is not None:
            self._console.print(escape(text), markup=False)
        else:
            say(text)


def follow(ask: Queries, job: str, display: Display, check: Callable[[], None]) -> Document:
    """Wait until the job has ended; its last document. `check` is called at every look and may raise."""
    told: set[tuple[str, str]] = set()
    while True:
        check()
        document = ask.job(job)
        display.show(document)
        for entry in document.get("lost_coverage", ()):
            seen = "lost coverage", f"{entry['rank']} {entry['device']} {len(entry['reasons'])}"
            if seen not in told:
                told.add(seen)
                display.tell(entry["text"])
        for incident in ask.incidents(job)["incidents"]:
            for key, text in news(incident):
                if (incident["id"], key) not in told:
                    told.add((incident["id"], key))
                    display.tell(text)
        if document["status"] in ENDED:
            return document
        time.sleep(POLL_S)


def describe(job: Document) -> str:
    """What the job does now, in two or three words."""
    status = job.get("status")
    if status == "PENDING":
        return "starting Ray and workers"
    if status == "RESTARTING":
        return "restarting"
    if status in ENDED:
        return str(status).lower()
    return f"training, generation {job.get('generation')}"


def last_loss(job: Document) -> str:
    """The newest step's loss as text; empty if there is none."""
    points = job.get("loss") or []  # [step, loss]
    return f"loss {points[-1][1]:.4f}" if points else ""


def news(incident: Document) -> list[tuple[str, str]]:
    """What there is to say about an incident so far, each part with a key so that it is said once."""
    where = f" on {incident['node']}" if incident.get("node") else ""
    name = f"incident {incident['id']}: {incident['kind']}{where}"
    parts = []
    if incident.get("detected_step") is not None:
        parts.append(("detected", f"{name}, step {incident['detected_step']}"))
    if incident.get("verdict"):
        parts.append(("verdict", f"{name}: {incident['verdict']}"))
    if incident.get("recovery_s") is not None:
        source = incident.get("resumed_from")
        parts.append(("recovered", f"{name}: recovered after {seconds(incident['recovery_s'])} from {source}"))
    return parts
