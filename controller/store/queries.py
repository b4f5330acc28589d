"""What people and tools may read, as versioned JSON documents; rows never leave this package."""

import json
import time
from typing import Any

from sqlalchemy import Connection, Row, Select, select

from controller.core import suspicion
from controller.store import rundocument, steps
from controller.store.coverage import lost_coverage
from controller.store.errors import UnknownIdError
from controller.store.opening import Store, told
from controller.store.schema import actions, checkpoints, drills, incidents, jobs, leases, nodes, processes

Document = dict[str, Any]


class Queries:
    """Read-only questions to a store. An empty job means the newest one. Raises UnknownIdError and StoreError."""

    def __init__(self, store: Store) -> None:
        """Read through the store's reader."""
        self._store = store

    def read(self, kind: str, wanted: str = "") -> Document:
        """Answer by the kind's name: status, job, steps, incidents, incident, checkpoints or run."""
        answers = {
            "status": lambda: self.status(wanted),
            "job": lambda: self.job(wanted),
            "steps": lambda: self.steps(wanted),
            "incidents": lambda: self.incidents(wanted),
            "incident": lambda: self.incident(wanted),
            "checkpoints": lambda: self.checkpoints(wanted),
            "run": lambda: self.run(wanted),
        }
        if kind not in answers:
            raise UnknownIdError(f"there is no document of kind {kind!r}: ask for {', '.join(answers)}")
        return answers[kind]()

    def newest_job(self) -> str | None:
        """Name the job that was submitted last; None if there is none."""
        with told(self._store.url), self._store.reader.connect() as connection:
            return _newest(connection)

    def status(self, job: str = "") -> Document:
        """Give the whole picture: jobs, nodes, processes, open incidents, the lease."""
        with told(self._store.url), self._store.reader.connect() as connection:
            chosen = job or _newest(connection)
            return {
                "schema": "assay.status/1",
                "job": None if chosen is None else _job(connection, chosen),
                "jobs": [_job_row(row) for row in connection.execute(select(jobs).order_by(jobs.c.submitted))],
                "nodes": [_node(row) for row in connection.execute(select(nodes).order_by(nodes.c.name))],
                "processes": _processes(connection),
                "open_incidents": _incident_list(connection, select(incidents).where(incidents.c.closed.is_(None))),
                "controller": _lease(connection),
            }

    def job(self, job: str = "") -> Document:
        """Give one job with its generations and how far it is."""
        with told(self._store.url), self._store.reader.connect() as connection:
            return {"schema": "assay.job.status/1", **_job(connection, _chosen(connection, job))}

    def steps(self, job: str = "") -> Document:
        """Give every (rank, step) once, from the highest generation that committed it."""
        with told(self._store.url), self._store.reader.connect() as connection:
            chosen = _chosen(connection, job)
            return {"schema": "assay.steps/1", "job": chosen, "steps": steps.committed(connection, chosen)}

    def incidents(self, job: str = "") -> Document:
        """Give the incidents of a job, or of all jobs."""
        query = select(incidents).order_by(incidents.c.opened, incidents.c.id)
        with told(self._store.url), self._store.reader.connect() as connection:
            return {
                "schema": "assay.incidents/1",
                "incidents": _incident_list(connection, query.where(incidents.c.job == job) if job else query),
            }

    def incident(self, incident: str) -> Document:
        """Give one incident with its timeline and what became of its actions."""
        with told(self._store.url), self._store.reader.connect() as connection:
            found = _incident_list(connection, select(incidents).where(incidents.c.id == incident))
            if not found:
                raise UnknownIdError(f"there is no incident {incident!r}")
            taken = select(actions).where(actions.c.incident == incident)
            rows = connection.execute(taken.order_by(actions.c.event_seq, actions.c.position)).all()
        return {"schema": "assay.incident/1", **found[0], "executed": [_action(row) for row in rows]}

    def checkpoints(self, job: str = "") -> Document:
        """Give the checkpoints of a job, or of all jobs, with their trust and lineage."""
        query = select(checkpoints).order_by(checkpoints.c.job, checkpoints.c.step)
        with told(self._store.url), self._store.reader.connect() as connection:
            rows = connection.execute(query.where(checkpoints.c.job == job) if job else query).all()
        return {"schema": "assay.checkpoints/1", "checkpoints": [rundocument.checkpoint(row) for row in rows]}

    def run(self, job: str = "", directory: str = "", status_url: str = "") -> Document:
        """Give the account of a whole job, "assay.run/1"."""
        with told(self._store.url), self._store.reader.connect() as connection:
            chosen = _chosen(connection, job)
            found = _incident_list(connection, select(incidents).where(incidents.c.job == chosen))
            document = rundocument.run(connection, _job_of(connection, chosen), found)
        return {**document, "dir": directory, "status_url": status_url}


def _newest(connection: Connection) -> str | None:
    newest = select(jobs.c.id).order_by(jobs.c.submitted.desc(), jobs.c.id.desc()).limit(1)
    return connection.execute(newest).scalar()


def _chosen(connection: Connection, job: str) -> str:
    chosen = job or _newest(connection)
    if chosen is None:
        raise UnknownIdError("there is no job")
    _job_of(connection, chosen)
    return chosen


def _job_of(connection: Connection, job: str) -> Row[Any]:
    row = connection.execute(select(jobs).where(jobs.c.id == job)).first()
    if row is None:
        raise UnknownIdError(f"there is no job {job!r}")
    return row


def _job_row(row: Row[Any]) -> Document:
    return {
        "job": row.id,
        "status": row.status,
        "world": row.world,
        "steps": row.steps,
        "generation": row.generation,
        "submitted_at": row.submitted,
        "ended_at": row.ended,
        "reason": row.reason,
    }


def _job(connection: Connection, job: str) -> Document:
    row = _job_of(connection, job)
    gone = steps.generations(connection, job)
    fired = connection.execute(select(drills).where(drills.c.job == job).order_by(drills.c.step, drills.c.id)).all()
    return {
        **_job_row(row),
        "committed_steps": steps.committed_count(connection, job),
        "loss": steps.losses(connection, job),
        "generations": gone,
        "placement": steps.placements(connection, job),
        "drills": [_drill(drill) for drill in fired],
        "lost_coverage": lost_coverage(connection, job),
        "spec": json.loads(row.spec),
    }


def _node(row: Row[Any]) -> Document:
    """A node with its devices' suspicion as it stands now: it fades while nothing is written."""
    document: Document = json.loads(row.document)
    now = time.time()
    return {**document, "suspicion": [suspicion.aged(entry, now) for entry in document.get("suspicion", [])]}


def _drill(row: Row[Any]) -> Document:
    return {
        "id": row.id,
        "kind": row.kind,
        "step": row.step,
        "rank": row.rank,
        "node": row.node,
        "params": json.loads(row.params),
        "fired_at": row.fired,
    }


def _processes(connection: Connection) -> list[Document]:
    ordered = select(processes).order_by(processes.c.node, processes.c.role, processes.c.rank, processes.c.pid)
    return [
        {
            "role": row.role,
            "node": row.node,
            "rank": row.rank if row.rank >= 0 else None,
            "generation": row.generation or None,
            "pid": row.pid,
            "job": row.job,
        }
        for row in connection.execute(ordered)
    ]


def _incident_list(connection: Connection, query: Select[Any]) -> list[Document]:
    return [
        {**json.loads(row.document), "opened_at": row.opened, "closed_at": row.closed}
        for row in connection.execute(query.order_by(None).order_by(incidents.c.opened, incidents.c.id))
    ]


def _action(row: Row[Any]) -> Document:
    return {
        "id": row.id,
        "type": row.type,
        "node": row.node,
        "generation": row.generation,
        "reason": row.reason,
        "status": row.status,
        "detail": row.detail,
        "decided_at": row.decided,
        "finished_at": row.finished,
    }


def _lease(connection: Connection) -> Document | None:
    row = connection.execute(select(leases)).first()
    if row is None:
        return None
    return {"epoch": row.epoch, "heartbeat": row.heartbeat, "resigned": bool(row.resigned)}
