"""Questions about the steps of a job: each (rank, step) once, its generations, its loss."""

from typing import Any

from sqlalchemy import Connection, func, select

from controller.store import segments
from controller.store.schema import generations as generation_rows
from controller.store.schema import jobs
from controller.store.schema import placements as placement_rows
from controller.store.schema import segments as rows

# Points of a loss curve that are worth sending to a page: more than a screen has columns.
CURVE_POINTS = 2000
# What a list of steps shows of a record.
SHOWN = (
    *("rank", "step", "generation", "loss", "grad_norm", "reading", "attempts", "digest", "chain", "time", "step_s"),
    *("checks", "failed_checks", "unjudged"),
)
# Counts that records of older versions lack.
_LATER = {"failed_checks": 0, "unjudged": 0}


def records(connection: Connection, job: str) -> list[dict[str, Any]]:
    """Read every stored record of a job with its rank and generation, oldest generation first, as they arrived."""
    ordered = select(rows.c.rank, rows.c.generation, rows.c.payload).where(rows.c.job == job)
    ordered = ordered.order_by(rows.c.generation, rows.c.rank, rows.c.epoch, rows.c.seq)
    return [
        {"rank": row.rank, "generation": row.generation, **entry}
        for row in connection.execute(ordered)
        for entry in segments.unpack(row.payload)
    ]


def newest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep each (rank, step) once: of the highest generation, and there the last that arrived. By step, then rank."""
    kept = {(record["step"], record["rank"]): record for record in found}
    return [kept[key] for key in sorted(kept)]


def committed(connection: Connection, job: str) -> list[dict[str, Any]]:
    """Give each committed (rank, step) once, with what the rank reported of it."""
    return [
        {**{name: record.get(name, _LATER.get(name)) for name in SHOWN}, "fp8": _summaries(record)}
        for record in newest(records(connection, job))
    ]


def _summaries(record: dict[str, Any]) -> list[dict[str, Any]]:
    """FP8 summaries under the wire's names; records of older versions have none."""
    parts = record.get("fp8", ())
    return [{"pass" if name == "pass_" else name: value for name, value in part.items()} for part in parts]


def committed_count(connection: Connection, job: str) -> int:
    """Give the last step that all ranks of some generation have reported; earlier ones were committed before it.

    Counting records would come short by a step whose report died with its worker: it was committed all the same, since
    the next generation went on from it (`resumed_step`). A completed job has committed all its steps, whatever records
    were lost with a node.
    """
    last = (
        select(rows.c.generation, rows.c.rank, func.max(rows.c.last_step).label("last"))
        .where(rows.c.job == job)
        .group_by(rows.c.generation, rows.c.rank)
    )
    world = connection.execute(select(func.count(func.distinct(rows.c.rank))).where(rows.c.job == job)).scalar() or 0
    by_generation: dict[int, list[int]] = {}
    for row in connection.execute(last):
        by_generation.setdefault(row.generation, []).append(row.last)
    reached = [min(lasts) for lasts in by_generation.values() if len(lasts) == world]
    resumed = select(func.max(generation_rows.c.resumed_step)).where(generation_rows.c.job == job)
    done = select(jobs.c.steps).where(jobs.c.id == job, jobs.c.status == "COMPLETED")
    return max(*reached, *(connection.execute(found).scalar() or 0 for found in (resumed, done)))


def generations(connection: Connection, job: str) -> list[dict[str, Any]]:
    """Give the generations of a job: when and why each started, from where, and the steps it committed."""
    spans = (
        select(rows.c.generation, func.min(rows.c.first_step).label("first"), func.max(rows.c.last_step).label("last"))
        .where(rows.c.job == job)
        .group_by(rows.c.generation)
    )
    steps = {row.generation: (row.first, row.last) for row in connection.execute(spans)}
    table = generation_rows
    made = []
    for row in connection.execute(select(table).where(table.c.job == job).order_by(table.c.generation)):
        first, last = steps.get(row.generation, (None, None))
        made.append(
            {
                "generation": row.generation,
                "started_at": row.started,
                "reason": row.reason,
                "first_step": first,
                "last_step": last,
                "resumed_from": row.resumed_source,
                "resumed_step": row.resumed_step,
            }
        )
    return made


def placements(connection: Connection, job: str) -> list[dict[str, Any]]:
    """Give who held which rank in which generation."""
    table = placement_rows
    ordered = select(table).where(table.c.job == job).order_by(table.c.generation, table.c.rank)
    return [
        {"generation": row.generation, "rank": row.rank, "node": row.node, "device": row.device, "pid": row.pid}
        for row in connection.execute(ordered)
    ]


def losses(connection: Connection, job: str) -> list[list[float]]:
    """Give [step, mean loss over the segment] along the job, thinned to at most CURVE_POINTS points, for a curve."""
    points = select(rows.c.last_step, func.avg(rows.c.loss_mean).label("loss"))
    points = points.where(rows.c.job == job, rows.c.loss_mean.is_not(None)).group_by(rows.c.last_step)
    found = [[row.last_step, row.loss] for row in connection.execute(points.order_by(rows.c.last_step))]
    stride = max(1, -(-len(found) // CURVE_POINTS))
    return found[::stride]
