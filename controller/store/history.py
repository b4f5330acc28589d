"""Reads back what a controller needs to go on, or to decide everything again: events, actions, marks, snapshots."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import func, select

from controller.store import segments
from controller.store.opening import Store, told
from controller.store.reports import Fp8Summary, StepRecord
from controller.store.schema import actions, changes, events, marks, snapshots
from controller.store.schema import segments as segment_rows

# Rows read at a time: a history of millions of events must not be held at once.
PAGE = 1000
# What a record that came without a finite value is read back as; JSON has no word for it.
NOT_FINITE = float("nan")


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event as it was decided on: `recorded` is the `now` that the decision was given, `body` its JSON object."""

    seq: int
    recorded: float
    body: dict[str, Any]


def load_marks(store: Store) -> dict[tuple[str, int], int]:
    """Read how far each life of each agent was stored, by (node, epoch)."""
    with told(store.url), store.reader.connect() as connection:
        return {(row.node, row.epoch): row.seq for row in connection.execute(select(marks))}


def load_snapshot(store: Store, version: int) -> tuple[int, dict[str, Any]] | None:
    """Give the newest snapshot of this version and the seq of the event that it includes."""
    newest = select(snapshots).where(snapshots.c.version == version).order_by(snapshots.c.seq.desc()).limit(1)
    with told(store.url), store.reader.connect() as connection:
        row = connection.execute(newest).first()
    return None if row is None else (row.seq, json.loads(row.body))


def load_events(store: Store, after: int = 0) -> Iterator[RecordedEvent]:
    """Read the events with a seq above `after`, in order."""
    while True:
        page = select(events).where(events.c.seq > after).order_by(events.c.seq).limit(PAGE)
        with told(store.url), store.reader.connect() as connection:
            rows = connection.execute(page).all()
        for row in rows:
            yield RecordedEvent(row.seq, row.recorded, json.loads(row.body))
        if len(rows) < PAGE:
            return
        after = rows[-1].seq


def load_actions(store: Store, first: int, last: int) -> dict[int, list[dict[str, Any]]]:
    """Read the actions of the events first..last, by event, in the order of the decision."""
    chosen = select(actions.c.event_seq, actions.c.body).where(actions.c.event_seq.between(first, last))
    made: dict[int, list[dict[str, Any]]] = {}
    with told(store.url), store.reader.connect() as connection:
        for row in connection.execute(chosen.order_by(actions.c.event_seq, actions.c.position)):
            made.setdefault(row.event_seq, []).append(json.loads(row.body))
    return made


def load_records(store: Store, job: str, generation: int, since: int) -> list[tuple[int, StepRecord]]:
    """Read (rank, record) of a generation's steps from `since` on, in the order in which they arrived by rank."""
    table = segment_rows
    chosen = select(table.c.rank, table.c.payload).where(
        table.c.job == job, table.c.generation == generation, table.c.last_step >= since
    )
    with told(store.url), store.reader.connect() as connection:
        rows = connection.execute(chosen.order_by(table.c.rank, table.c.epoch, table.c.seq)).all()
    return [(row.rank, _record(entry)) for row in rows for entry in segments.unpack(row.payload)]


def last_common_step(store: Store, job: str, generation: int) -> int:
    """Give the last step that each reporting rank of a generation has reported; 0 if none did."""
    table = segment_rows
    last = (
        select(func.max(table.c.last_step).label("last"))
        .where(table.c.job == job, table.c.generation == generation)
        .group_by(table.c.rank)
        .subquery()
    )
    with told(store.url), store.reader.connect() as connection:
        return connection.execute(select(func.min(last.c.last))).scalar() or 0


def find_change(store: Store, key: str) -> tuple[str, str] | None:
    """Give (request, reply) of the operator's change with this idempotency key."""
    with told(store.url), store.reader.connect() as connection:
        row = connection.execute(select(changes.c.request, changes.c.reply).where(changes.c.key == key)).first()
    return None if row is None else (row.request, row.reply)


def _record(entry: dict[str, Any]) -> StepRecord:
    summaries = tuple(Fp8Summary(**_known(Fp8Summary, part)) for part in entry.get("fp8", ()))  # none in old records
    values = _known(StepRecord, entry)
    lists = {name: tuple(entry.get(name, ())) for name in ("expert_load", "lost_because")}
    return StepRecord(**{**values, **lists, "fp8": summaries})


def _known(target: type[Any], entry: dict[str, Any]) -> dict[str, Any]:
    """What of an entry `target` has a field for, with NaN where JSON had no word for the value."""
    names = {field.name for field in fields(target)}
    return {name: NOT_FINITE if value is None else value for name, value in entry.items() if name in names}
