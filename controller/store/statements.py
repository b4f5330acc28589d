"""The statements that write, by name, for either engine; each is harmless when it runs twice."""

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    Float,
    Table,
    and_,
    bindparam,
    case,
    delete,
    insert,
    or_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from controller.store import schema

# From near to far: what a generation could resume from. An incident's source is the furthest of its ranks.
SOURCES = ("live", "spare", "replica", "checkpoint", "init")


class database_now(FunctionElement[float]):
    """Seconds since 1970 on the database's clock: leases must not depend on the controllers' own."""

    type = Float()
    inherit_cache = True


@compiles(database_now, "sqlite")
def _sqlite_now(_element: database_now, _compiler: SQLCompiler, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _postgresql_now(_element: database_now, _compiler: SQLCompiler, **_: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


# Append-only: rows of many transactions may go in together, in this order (actions refer to events).
BULK = ("event", "action", "segment", "mark")


def statements(dialect: str) -> dict[str, Executable]:
    """Build every write statement for `dialect` ("sqlite" or "postgresql")."""
    return {
        **_bulk(dialect),
        **_documents(dialect),
        **_generations(dialect),
        **_checkpoints(dialect),
        **_others(dialect),
    }


def _bulk(dialect: str) -> dict[str, Executable]:
    marks = _insert(dialect, schema.marks)
    return {
        "event": insert(schema.events),
        "action": insert(schema.actions),
        "segment": _insert(dialect, schema.segments).on_conflict_do_nothing(),
        "mark": marks.on_conflict_do_update(
            index_elements=["node", "epoch"],
            set_={
                "seq": _greatest(schema.marks.c.seq, marks.excluded.seq),
                "dropped": schema.marks.c.dropped + marks.excluded.dropped,
            },
        ),
    }


def _documents(dialect: str) -> dict[str, Executable]:
    return {
        "incident": _upsert(dialect, schema.incidents),
        "node": _upsert(dialect, schema.nodes),
        "job": _upsert(dialect, schema.jobs),
        "action_result": update(schema.actions)
        .where(schema.actions.c.id == bindparam("action_id"), schema.actions.c.status == "pending")
        .values(status=bindparam("outcome"), detail=bindparam("said"), finished=bindparam("at")),
        "snapshot": _upsert(dialect, schema.snapshots),
        "snapshots_before": delete(schema.snapshots).where(schema.snapshots.c.seq < bindparam("before")),
    }


def _generations(dialect: str) -> dict[str, Executable]:
    known = case(*[(schema.generations.c.resumed_source == name, i) for i, name in enumerate(SOURCES)], else_=-1)
    return {
        "generation": _insert(dialect, schema.generations).on_conflict_do_nothing(),
        "placement": _upsert(dialect, schema.placements),
        "resumed": update(schema.generations)
        .where(
            schema.generations.c.job == bindparam("of_job"),
            schema.generations.c.generation == bindparam("of_generation"),
            known < bindparam("distance"),
        )
        .values(resumed_step=bindparam("step"), resumed_source=bindparam("source")),
        "forget_processes": delete(schema.processes).where(schema.processes.c.node == bindparam("of_node")),
        "process": _upsert(dialect, schema.processes),
    }


def _checkpoints(dialect: str) -> dict[str, Executable]:
    table = schema.checkpoints
    captured = _insert(dialect, table)
    durable = _insert(dialect, table)
    of_job = table.c.job == bindparam("of_job")
    distrust: dict[str, Any] = {"trust": bindparam("to"), "trust_reason": bindparam("why"), "changed": bindparam("at")}
    return {
        # A later capture of the same step replaces the row only if it comes from a later generation.
        "captured": captured.on_conflict_do_update(
            index_elements=["job", "step"],
            set_=_excluded(captured, table, keys=("job", "step")),
            where=captured.excluded.generation > table.c.generation,
        ),
        "durable": durable.on_conflict_do_update(
            index_elements=["job", "step"],
            set_=_excluded(durable, table, keys=("job", "step", "stall_s")),
            where=and_(
                durable.excluded.generation >= table.c.generation,
                or_(table.c.trust == "captured", durable.excluded.generation > table.c.generation),
            ),
        ),
        "promote": update(table)
        .where(of_job, table.c.step == bindparam("at_step"), table.c.trust == "durable")
        .values(**distrust),
        # A generation refuses what an older one wrote: a late report is not of what it wrote itself since.
        "revoke": update(table)
        .where(of_job, table.c.step == bindparam("at_step"), table.c.generation < bindparam("before"))
        .values(**distrust),
        "revoke_since": update(table).where(of_job, table.c.step >= bindparam("since")).values(**distrust),
    }


def _others(dialect: str) -> dict[str, Executable]:
    return {
        "drill": _insert(dialect, schema.drills).on_conflict_do_nothing(),
        "drill_fired": update(schema.drills)
        .where(schema.drills.c.job == bindparam("of_job"), schema.drills.c.id == bindparam("drill"))
        .values(fired=bindparam("at"), detail=bindparam("said")),
        "change": _insert(dialect, schema.changes).on_conflict_do_nothing(),
        "heartbeat": update(schema.leases)
        .where(
            schema.leases.c.name == bindparam("of_name"),
            schema.leases.c.epoch == bindparam("of_epoch"),
            schema.leases.c.resigned.is_(False),
        )
        .values(heartbeat=database_now()),
    }


def _insert(dialect: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    return sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)


def _excluded(
    statement: sqlite.Insert | postgresql.Insert, table: Table, keys: tuple[str, ...]
) -> dict[str, ColumnElement[Any]]:
    return {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}


def _upsert(dialect: str, table: Table) -> Executable:
    """Insert the row, or replace the one with the same primary key."""
    statement = _insert(dialect, table)
    keys = tuple(column.name for column in table.primary_key.columns)
    return statement.on_conflict_do_update(index_elements=keys, set_=_excluded(statement, table, keys))


def _greatest(a: ColumnElement[int], b: ColumnElement[int]) -> ColumnElement[int]:
    return case((a > b, a), else_=b)
