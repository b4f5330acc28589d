"""Packs step records into rows and unpacks them: columns for what is asked often, compressed JSON for the rest."""

import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from controller.store.reports import StepRecord, StepRecords
from controller.store.writer import Row

# zlib's fastest: packing happens on the controller's loop, and step records shrink to a third already at level 1.
LEVEL = 1


def merge(reports: Iterable[tuple[int, StepRecords]]) -> list[tuple[int, StepRecords]]:
    """Join the consecutive reports of one (job, generation, rank) in a batch, under the first one's seq."""
    made: dict[tuple[str, int, int], tuple[int, list[StepRecord]]] = {}
    for seq, report in reports:
        key = (report.job, report.generation, report.rank)
        made.setdefault(key, (seq, []))[1].extend(report.records)
    return [(seq, StepRecords(*key, tuple(records))) for key, (seq, records) in made.items()]


def pack(node: str, epoch: int, seq: int, steps: StepRecords) -> Row:
    """Make the row of the `segment` statement."""
    losses = [record.loss for record in steps.records if math.isfinite(record.loss)]
    readings = [record.reading for record in steps.records if math.isfinite(record.reading)]
    numbers = [record.step for record in steps.records]
    return {
        "node": node,
        "epoch": epoch,
        "seq": seq,
        "job": steps.job,
        "generation": steps.generation,
        "rank": steps.rank,
        "first_step": min(numbers),
        "last_step": max(numbers),
        "count": len(numbers),
        "loss_min": min(losses, default=None),
        "loss_mean": sum(losses) / len(losses) if losses else None,
        "loss_max": max(losses, default=None),
        "reading": max(readings, default=None),
        "checks": sum(record.checks for record in steps.records),
        "failed_checks": sum(record.failed_checks for record in steps.records),
        "unjudged": sum(record.unjudged for record in steps.records),
        "lost_because": _reasons(steps.records),
        "payload": zlib.compress(_encode([_record(record) for record in steps.records]), LEVEL),
    }


def _reasons(records: Iterable[StepRecord]) -> str | None:
    """JSON list of what the records tell, each once; None if they tell nothing."""
    told = [*dict.fromkeys(reason for record in records for reason in record.lost_because)]
    return json.dumps(told) if told else None


def unpack(payload: bytes) -> list[dict[str, Any]]:
    """Give the records of a row, with None where a value was not finite."""
    records: list[dict[str, Any]] = json.loads(zlib.decompress(payload))
    return records


def _record(record: StepRecord) -> dict[str, Any]:
    """One record without what JSON cannot say."""
    plain = {name: _said(value) for name, value in asdict(record).items() if name != "fp8"}
    return {**plain, "fp8": [{name: _said(value) for name, value in asdict(entry).items()} for entry in record.fp8]}


def _said(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encode(records: list[dict[str, Any]]) -> bytes:
    return json.dumps(records, separators=(",", ":"), allow_nan=False).encode()
