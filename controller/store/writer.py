"""The one thread that writes: it takes what has queued up, commits it in one transaction, and only then says so."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any

from sqlalchemy import Connection, Engine

from controller.store.errors import LeaseLostError, StoreError
from controller.store.opening import Store, told
from controller.store.statements import BULK, statements

# Units in one transaction: large enough that an fsync is shared by all of a second's reports of 1,000 nodes, small
# enough that a reader of PostgreSQL's lease row never waits long.
GROUP_UNITS = 1000

Row = dict[str, Any]


@dataclass(slots=True)
class Unit:
    """What one report batch or decision writes: all of it is committed, or none."""

    bulk: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in BULK})
    then: list[tuple[str, Row]] = field(default_factory=list)

    def add(self, name: str, /, **row: Any) -> None:
        """Write `row` by the statement `name` (see `statements`)."""
        if name in self.bulk:
            self.bulk[name].append(row)
        else:
            self.then.append((name, row))


class Writer:
    """Commits units in the order of their submission, many at a time, while it holds the lease of `epoch`.

    After a failure nothing is written any more: every later unit gets the same error, so that what is stored is always
    a prefix of what was submitted.
    """

    def __init__(self, store: Store, lease: str, epoch: int, observe: Callable[[int, float], None]) -> None:
        """Start the thread. `observe(units, seconds)` is told of every commit, on the writer's thread."""
        self._store = store
        self._lease = {"of_name": lease, "of_epoch": epoch}
        self._observe = observe
        self._queue: SimpleQueue[tuple[Unit, Future[None]] | None] = SimpleQueue()
        self._broken: StoreError | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, unit: Unit) -> Future[None]:
        """Queue a unit; the future is done when it is durable, or carries StoreError."""
        future: Future[None] = Future()
        # A caller that is cancelled must not cancel the write: from here on the future can only be completed.
        future.set_running_or_notify_cancel()
        self._queue.put((unit, future))
        return future

    def close(self) -> None:
        """Commit what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        made = statements(self._store.engine.dialect.name)
        while (first := self._queue.get()) is not None:
            group, ended = self._drain(first)
            self._commit(self._store.engine, made, group)
            if ended:
                return

    def _drain(self, first: tuple[Unit, Future[None]]) -> tuple[list[tuple[Unit, Future[None]]], bool]:
        """Take everything that waits, up to a limit; say whether the end was among it."""
        group = [first]
        while len(group) < GROUP_UNITS:
            try:
                item = self._queue.get_nowait()
            except Empty:
                return group, False
            if item is None:
                return group, True
            group.append(item)
        return group, False

    def _commit(self, engine: Engine, made: dict[str, Any], group: list[tuple[Unit, Future[None]]]) -> None:
        started = time.monotonic()
        if self._broken is None:
            try:
                with told(self._store.url), engine.begin() as connection:
                    self._hold_lease(connection, made)
                    _execute(connection, made, [unit for unit, _ in group])
            except StoreError as error:
                self._broken = error
        for _, future in group:
            if self._broken is None:
                future.set_result(None)
            else:
                future.set_exception(self._broken)
        self._observe(len(group), time.monotonic() - started)

    def _hold_lease(self, connection: Connection, made: dict[str, Any]) -> None:
        """Check inside the transaction that the lease is still ours: its row lock fences a successor's writes."""
        if connection.execute(made["heartbeat"], self._lease).rowcount != 1:
            raise LeaseLostError("another controller has taken the lease; this one must not write any more")


def _execute(connection: Connection, made: dict[str, Any], units: list[Unit]) -> None:
    """Write the append-only rows of all units together, then the rest in order, equal neighbours together."""
    for name in BULK:
        rows = [row for unit in units for row in unit.bulk[name]]
        if rows:
            connection.execute(made[name], rows)
    for name, batch in _runs(units):
        connection.execute(made[name], batch)


def _runs(units: list[Unit]) -> Iterator[tuple[str, list[Row]]]:
    rest = (write for unit in units for write in unit.then)
    for name, writes in groupby(rest, key=lambda write: write[0]):
        yield name, [row for _, row in writes]
