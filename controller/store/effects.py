"""What events and actions change in the tables beside their own rows: generations, checkpoints, trust, drills."""

import json
from collections.abc import Callable
from typing import Any

from controller.core import actions, events
from controller.store.statements import SOURCES
from controller.store.writer import Unit


def of_event(unit: Unit, event: events.Event, now: float) -> None:
    """Add to `unit` what `event` changes; `now` in seconds since 1970."""
    effect = _EVENTS.get(type(event))
    if effect is not None:
        effect(unit, event, now)


def of_action(unit: Unit, action: actions.Action, now: float) -> None:
    """Add to `unit` what `action` changes. What the controller carries out itself is done by this very write."""
    effect = _ACTIONS.get(type(action))
    if effect is not None:
        effect(unit, action, now)


def _submitted(unit: Unit, event: events.JobSubmitted, now: float) -> None:
    for drill in event.drills:
        _drill(unit, event.job, drill, now)


def _requested(unit: Unit, event: events.DrillRequested, now: float) -> None:
    _drill(unit, event.job, event.drill, now)


def _drill(unit: Unit, job: str, drill: events.Drill, now: float) -> None:
    unit.add(
        "drill",
        job=job,
        id=drill.id,
        kind=drill.kind,
        step=drill.step,
        rank=drill.rank,
        node=drill.node,
        params=json.dumps(drill.params),
        requested=now,
        fired=None,
        detail="",
    )


def _fired(unit: Unit, event: events.DrillFired, _now: float) -> None:
    unit.add("drill_fired", of_job=event.job, drill=event.drill, at=event.fired_at, said=event.detail)


def _result(unit: Unit, event: events.ActionResult, now: float) -> None:
    unit.add("action_result", action_id=event.action_id, outcome=event.outcome, said=event.detail, at=now)


def _resumed(unit: Unit, event: events.Resumed, _now: float) -> None:
    distance = SOURCES.index(event.source) if event.source in SOURCES else len(SOURCES)
    unit.add(
        "resumed",
        of_job=event.job,
        of_generation=event.generation,
        distance=distance,
        step=event.step,
        source=event.source,
    )


def _captured(unit: Unit, event: events.CheckpointCaptured, now: float) -> None:
    unit.add("captured", **_checkpoint(event, now), stall_s=event.stall_s, trust="captured")


def _durable(unit: Unit, event: events.CheckpointDurable, now: float) -> None:
    row = _checkpoint(event, now) | {
        "chain": event.chain,
        "path": event.path,
        "bytes": event.bytes,
        "parent_step": event.parent_step or None,
        "write_s": event.write_s,
    }
    unit.add("durable", **row, stall_s=None, trust="durable")


def _checkpoint(event: events.CheckpointCaptured | events.CheckpointDurable, now: float) -> dict[str, Any]:
    return {
        "job": event.job,
        "step": event.step,
        "generation": event.generation,
        "digest": event.digest,
        "chain": "",
        "path": "",
        "bytes": 0,
        "parent_step": None,
        "write_s": None,
        "trust_reason": "",
        "changed": now,
    }


def _refused(unit: Unit, event: events.ShardRefused, now: float) -> None:
    why = f"refused by {event.node}: {event.shard}: {event.reason}"
    where = {"of_job": event.job, "at_step": event.step, "before": event.generation}
    unit.add("revoke", **where, to="revoked", why=why, at=now)


def _start(unit: Unit, action: actions.StartGeneration, now: float) -> None:
    unit.add(
        "generation",
        job=action.job,
        generation=action.generation,
        started=now,
        reason=action.reason,
        resumed_step=None,
        resumed_source=None,
    )
    for place in action.ranks:
        unit.add(
            "placement",
            job=action.job,
            generation=action.generation,
            rank=place.rank,
            node=place.node,
            device=place.device,
            pid=place.pid,
        )


def _revoke(unit: Unit, action: actions.RevokeCheckpoints, now: float) -> None:
    unit.add("revoke_since", of_job=action.job, since=action.since_step, to="revoked", why=action.reason, at=now)


def _promote(unit: Unit, action: actions.PromoteCheckpoint, now: float) -> None:
    unit.add("promote", of_job=action.job, at_step=action.step, to="verified", why=action.reason, at=now)


_EVENTS: dict[type[events.Event], Callable[[Unit, Any, float], None]] = {
    events.JobSubmitted: _submitted,
    events.DrillRequested: _requested,
    events.DrillFired: _fired,
    events.ActionResult: _result,
    events.Resumed: _resumed,
    events.CheckpointCaptured: _captured,
    events.CheckpointDurable: _durable,
    events.ShardRefused: _refused,
}
_ACTIONS: dict[type[actions.Action], Callable[[Unit, Any, float], None]] = {
    actions.StartGeneration: _start,
    actions.RevokeCheckpoints: _revoke,
    actions.PromoteCheckpoint: _promote,
}
