"""What changed in core's state, as the rows that people read: found by identity, because core copies what it alters."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from controller.core import nodes, suspicion
from controller.core.incidents import incident_document
from controller.core.state import Incident, Job, Node, State
from controller.store.encoding import dump
from controller.store.writer import Unit

Entry = TypeVar("Entry", Node, Job, Incident)


def write_changes(unit: Unit, before: State, after: State, now: float) -> None:
    """Add to `unit` a row for each node, job and incident that one decision altered; `now` in seconds since 1970."""
    doubted = _doubted(before, after)
    known = {name: node for name, node in before.nodes.items() if name not in doubted} if doubted else before.nodes
    _write(unit, "node", known, after.nodes, partial(_node, state=after, now=now))
    _write(unit, "job", before.jobs, after.jobs, _job)
    _write(unit, "incident", before.incidents, after.incidents, _incident)


def _doubted(before: State, after: State) -> set[str]:
    """Nodes whose devices are doubted otherwise than before: their rows change though they do not."""
    if after.policy != before.policy:
        return set(after.nodes)
    keys = before.suspicion.keys() | after.suspicion.keys()
    changed = {key for key in keys if before.suspicion.get(key) != after.suspicion.get(key)}
    if not changed:
        return set()
    named = after.nodes.items()
    return {name for name, node in named if any(nodes.identity(after, device) in changed for device in node.devices)}


def _write(
    unit: Unit,
    statement: str,
    before: Mapping[str, Entry],
    after: Mapping[str, Entry],
    row: Callable[[Entry], dict[str, Any]],
) -> None:
    """Write the entries that are not the very same objects as before, and whose rows differ."""
    for key, entry in after.items():
        old = before.get(key)
        if old is entry:
            continue
        made = row(entry)
        if old is None or row(old) != made:
            unit.add(statement, **made)


def _node(node: Node, state: State, now: float) -> dict[str, Any]:
    document = {
        "node": node.name,
        "state": str(node.state),
        "epoch": node.epoch,
        "linked": node.linked,
        "spare": node.spare,
        "fingerprint": node.fingerprint,
        "peer_endpoint": node.peer_endpoint,
        "devices": [asdict(device) for device in node.devices],
        "standbys": [{"standby": one.id, "job": one.job, "pid": one.pid} for one in node.standbys.values()],
        "findings": dict(node.findings),
        "suspicion": [
            suspicion.document(device, state.suspicion.get(nodes.identity(state, device)), state.policy)
            for device in node.devices
        ],
        "changed_at": now,
    }
    return {
        "name": node.name,
        "state": str(node.state),
        "epoch": node.epoch,
        "linked": node.linked,
        "spare": node.spare,
        "changed": now,
        "document": dump(document),
    }


def _job(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": str(job.status),
        "world": job.world,
        "steps": job.steps,
        "generation": job.generation,
        "submitted": job.submitted_at,
        "ended": job.ended_at,
        "reason": job.explanation,
        "spec": job.spec,
    }


def _incident(incident: Incident) -> dict[str, Any]:
    return {
        "id": incident.id,
        "job": incident.job,
        "kind": incident.kind,
        "opened": incident.opened_at,
        "closed": incident.closed_at,
        "document": dump(incident_document(incident)),
    }
