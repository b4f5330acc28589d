"""Fills every table with a row or two, parents and children, so that a migration has something to lose."""

from sqlalchemy import Connection, Engine, select

from controller.store.schema import metadata

ROWS: dict[str, list[dict[str, object]]] = {
    "events": [{"seq": 1, "time": 1.0, "recorded": 1.5, "type": "Tick", "node": "", "job": "j", "body": "{}"}],
    "actions": [
        {
            "event_seq": 1,
            "position": 0,
            "id": "a1",
            "type": "EndJob",
            "node": "n0",
            "job": "j",
            "generation": 1,
            "incident": "",
            "reason": "over",
            "body": "{}",
            "decided": 1.5,
            "status": "pending",
            "detail": "",
        }
    ],
    "incidents": [{"id": "inc-0001", "job": "j", "kind": "crash", "opened": 1.0, "document": "{}"}],
    "nodes": [
        {"name": "n0", "state": "HEALTHY", "epoch": 1, "linked": True, "spare": False, "changed": 1.0, "document": "{}"}
    ],
    "jobs": [
        {
            "id": "j",
            "status": "RUNNING",
            "world": 1,
            "steps": 5,
            "generation": 1,
            "submitted": 1.0,
            "reason": "",
            "spec": "{}",
        }
    ],
    "generations": [{"job": "j", "generation": 1, "started": 1.0, "reason": "first"}],
    "placements": [{"job": "j", "generation": 1, "rank": 0, "node": "n0", "device": "d0", "pid": 7}],
    "processes": [{"node": "n0", "pid": 7, "role": "worker", "job": "j", "generation": 1, "rank": 0}],
    "segments": [
        {
            "node": "n0",
            "epoch": 1,
            "seq": 1,
            "job": "j",
            "generation": 1,
            "rank": 0,
            "first_step": 1,
            "last_step": 2,
            "count": 2,
            "payload": b"\x00\xff",
        }
    ],
    "marks": [{"node": "n0", "epoch": 1, "seq": 9, "dropped": 0}],
    "checkpoints": [
        {
            "job": "j",
            "step": 2,
            "generation": 1,
            "digest": "d",
            "chain": "c",
            "path": "p",
            "bytes": 2**40,
            "trust": "durable",
            "trust_reason": "",
            "changed": 1.0,
        }
    ],
    "drills": [
        {
            "job": "j",
            "id": "x",
            "kind": "sdc",
            "step": 1,
            "rank": 0,
            "node": "",
            "params": "{}",
            "requested": 1.0,
            "detail": "",
        }
    ],
    "changes": [
        {"key": "k", "kind": "submit", "actor": "me", "reason": "", "time": 1.0, "request": "00", "reply": "j"}
    ],
    "leases": [{"name": "controller", "epoch": 3, "holder": "h", "acquired": 1.0, "heartbeat": 1.0, "resigned": False}],
    "snapshots": [{"seq": 1, "version": 1, "body": "{}"}],
}


def fill(engine: Engine) -> None:
    """Insert ROWS, which must cover every table."""
    assert set(ROWS) == set(metadata.tables)
    with engine.begin() as connection:
        for table in metadata.sorted_tables:
            connection.execute(table.insert(), ROWS[table.name])


def contents(connection: Connection) -> dict[str, list[tuple[object, ...]]]:
    """Read every table."""
    return {table.name: [tuple(row) for row in connection.execute(select(table))] for table in metadata.sorted_tables}
