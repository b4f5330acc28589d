"""The account of a whole job, "assay.run/1": what was trained, what was done twice, and what went wrong."""

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, Row, select

from controller.store import steps
from controller.store.coverage import lost_coverage
from controller.store.schema import checkpoints, events

Document = dict[str, Any]
# Phases in which the progress word names a step that has not begun: before the first forward of a generation, and
# between steps.
NOT_BEGUN = frozenset({"", "idle", "rendezvous", "restore"})
# Keys of `state_bytes`, and the fields of Resumed that they come from.
_HELD = {"parameters": "parameter", "experts": "expert", "optimizer": "optimizer", "replica": "replica"}


def run(connection: Connection, job: Row[Any], incidents: list[Document]) -> Document:
    """Compile the document of one job, without `dir` and `status_url`, which the store does not know."""
    everything = steps.records(connection, job.id)
    committed = steps.newest(everything)
    count = steps.committed_count(connection, job.id)
    generations = steps.generations(connection, job.id)
    kept = connection.execute(select(checkpoints).where(checkpoints.c.job == job.id).order_by(checkpoints.c.step)).all()
    under_way = _under_way(connection, job.id)
    state_digest, chain_digest = _digests(committed, kept, count)
    return {
        "schema": "assay.run/1",
        "job": job.id,
        "status": job.status,
        "reason": job.reason,
        "steps": job.steps,
        "committed_steps": count,
        "executed_steps": count + redone(everything) + executed_again(generations, under_way),
        "tokens_per_s": tokens_per_s(committed),
        "loss_first": _loss(committed, 1),
        "loss_last": _loss(committed, count),
        "state_digest": state_digest,
        "chain_digest": chain_digest,
        "generations": generations,
        "checkpoints": [checkpoint(row) for row in kept],
        "placement": steps.placements(connection, job.id),
        "state_bytes": _state_bytes(connection, job.id),
        "incidents": incidents,
        "lost_coverage": lost_coverage(connection, job.id),
    }


def checkpoint(row: Row[Any]) -> Document:
    """One checkpoint with its lineage and trust."""
    return {
        "job": row.job,
        "step": row.step,
        "generation": row.generation,
        "digest": row.digest,
        "chain": row.chain,
        "path": row.path,
        "bytes": row.bytes,
        "parent_step": row.parent_step,
        "trust": row.trust,
        "trust_reason": row.trust_reason,
    }


def redone(records: Iterable[Document]) -> int:
    """Count the attempts of steps beyond the first, of the rank that needed most (all ranks redo a step together)."""
    attempts: dict[tuple[int, int], int] = {}
    for record in records:
        key = (record["generation"], record["step"])
        attempts[key] = max(attempts.get(key, 1), record["attempts"])
    return sum(count - 1 for count in attempts.values())


def executed_again(generations: list[Document], under_way: dict[int, int]) -> int:
    """Count the steps that a restart cost: begun in one generation, and after what the next one resumed from.

    `under_way` maps a generation to the last step that any of its ranks had begun; without an entry, the last one it
    committed counts. A step that was under way and killed counts: it is executed again.
    """
    total = 0
    for old, new in pairwise(generations):
        begun = max(under_way.get(old["generation"], 0), old["last_step"] or 0)
        if new["resumed_step"] is not None:
            total += max(0, begun - new["resumed_step"])
    return total


def tokens_per_s(committed: list[Document]) -> float:
    """Divide the committed tokens by the wall time from the first step's beginning to the last one's commit."""
    if not committed:
        return 0.0
    started = min(record["time"] - record["step_s"] for record in committed)
    seconds = max(record["time"] for record in committed) - started
    return sum(record["tokens"] for record in committed) / seconds if seconds > 0 else 0.0


def _under_way(connection: Connection, job: str) -> dict[int, int]:
    """Find the last step that was begun in each generation, from what was reported of its end."""
    chosen = select(events.c.body).where(
        events.c.job == job, events.c.type.in_(("WorkerExited", "ProgressStalled", "GateAlarm"))
    )
    found: dict[int, int] = {}
    for row in connection.execute(chosen):
        body = json.loads(row.body)
        if body.get("cause") != "completed" and body.get("phase", "gate") not in NOT_BEGUN:
            found[body["generation"]] = max(found.get(body["generation"], 0), body["step"])
    return found


def _state_bytes(connection: Connection, job: str) -> list[Document]:
    """Find what each rank held of the state when it was last given one."""
    chosen = select(events.c.body).where(events.c.job == job, events.c.type == "Resumed").order_by(events.c.seq)
    found: dict[int, Document] = {}
    for row in connection.execute(chosen):
        body = json.loads(row.body)
        held = {name: body.get(f"{kind}_bytes", 0) for name, kind in _HELD.items()}
        found[body["rank"]] = {"rank": body["rank"], **held}
    return [found[rank] for rank in sorted(found)]


def _digests(committed: list[Document], kept: Iterable[Row[Any]], last: int) -> tuple[str | None, str | None]:
    """Take the digests of the last step's checkpoint, which covers the whole state; else what the ranks reported."""
    for row in kept:
        if row.step == last and row.trust != "revoked" and row.chain:
            return row.digest, row.chain
    for record in reversed(committed):
        if record["step"] == last:
            return record["digest"], record["chain"]
    return None, None


def _loss(committed: list[Document], step: int) -> float | None:
    """Average a step's loss over its ranks; None if no rank reported a finite one."""
    found = [record["loss"] for record in committed if record["step"] == step and record["loss"] is not None]
    return sum(found) / len(found) if found else None
