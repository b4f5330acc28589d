"""What the sensors of a job's devices did not see though they should have: counted, with reasons, and said in words."""

import json
from typing import Any

from sqlalchemy import Connection, and_, func, select

from controller.store.schema import placements
from controller.store.schema import segments as rows

Document = dict[str, Any]

#: Reasons that a document gives for one device; a rank tells no more of them in one generation.
REASONS = 16
#: Those that are said in words.
SHOWN = 3


def lost_coverage(connection: Connection, job: str) -> list[Document]:
    """Give an entry for each device whose checks failed themselves or could not judge their calls; none if all is well.

    By rank, then in the order in which devices held it. Counts are of all committed steps that were reported, those of
    a step that two generations made included twice.
    """
    lacking = (rows.c.job == job) & (rows.c.failed_checks + rows.c.unjudged > 0)
    held = and_(*(placements.c[name] == rows.c[name] for name in ("job", "generation", "rank")))
    chosen = (
        select(
            rows.c.rank,
            rows.c.generation,
            placements.c.node,
            placements.c.device,
            func.min(rows.c.first_step).label("first"),
            func.max(rows.c.last_step).label("last"),
            *(func.sum(rows.c[name]).label(name) for name in ("checks", "failed_checks", "unjudged")),
        )
        .select_from(rows.outerjoin(placements, held))
        .where(lacking)
        .group_by(rows.c.rank, rows.c.generation, placements.c.node, placements.c.device)
        .order_by(rows.c.rank, rows.c.generation)
    )
    found: dict[tuple[int, str | None], Document] = {}
    for row in connection.execute(chosen):
        reasons = _reasons(connection, job, row.generation, row.rank)
        entry = found.setdefault(
            (row.rank, row.device),
            {
                "rank": row.rank,
                "node": row.node,
                "device": row.device,
                "checks": 0,
                "failed_checks": 0,
                "unjudged": 0,
                "first_step": row.first,
                "last_step": row.last,
                "reasons": [],
            },
        )
        for name in ("checks", "failed_checks", "unjudged"):
            entry[name] += int(row._mapping[name])
        entry["last_step"] = max(entry["last_step"], row.last)
        entry["reasons"] = [*dict.fromkeys([*entry["reasons"], *reasons])][:REASONS]
    return [{**entry, "text": said(entry)} for entry in found.values()]


def said(entry: Document) -> str:
    """One entry in words: whose sensors, how much, since when, and the first reasons."""
    device = entry["device"] or "an unknown device"
    counts = [
        f"{count} {one if count == 1 else many}"
        for count, one, many in (
            (entry["failed_checks"], "check failed itself", "checks failed themselves"),
            (entry["unjudged"], "call could not be judged", "calls could not be judged"),
        )
        if count
    ]
    what = "fail" if entry["failed_checks"] else "have gaps"
    where = f"sensors of {device} on {entry['node'] or 'an unknown node'} (rank {entry['rank']}) {what}"
    first, last, made = entry["first_step"], entry["last_step"], entry["checks"]
    when = f"in step {first}" if first == last else f"between steps {first} and {last}"
    span = f"{when}, beside {made} {'check' if made == 1 else 'checks'} made"
    shown, more = entry["reasons"][:SHOWN], len(entry["reasons"][SHOWN:])
    because = f": {'; '.join(shown)}" if shown else ""
    return f"{where}: {' and '.join(counts)} {span}{because}{f'; and {more} more' if more else ''}"


def _reasons(connection: Connection, job: str, generation: int, rank: int) -> list[str]:
    """All that a rank has told in a generation, each when it first came up."""
    told = (
        select(rows.c.lost_because)
        .where(rows.c.job == job, rows.c.generation == generation, rows.c.rank == rank)
        .where(rows.c.lost_because.is_not(None))
        .order_by(rows.c.first_step)
    )
    return [reason for row in connection.execute(told) for reason in json.loads(row.lost_because)]
