"""One decision in the making: copies of what it touches, so that the state before it stays as it was."""

from dataclasses import fields, replace
from typing import Any, TypeVar

from controller.core.actions import Action
from controller.core.events import Event
from controller.core.state import Incident, Job, Node, Note, Ordered, State

Record = TypeVar("Record", Node, Job, Incident)
Act = TypeVar("Act", bound=Action)

NOTES = 200  # lines of one timeline: more than a job with the most fruitless restarts on eight nodes writes
TARGETED = "target"  # the field by which an action names a node other than the one that carries it out


class Change:
    """Copy-on-write access to a State while one event is decided.

    `node`, `job` and `incident` hand out copies that may be altered; `act` orders an action. Whatever was not asked
    for is shared with the state before, so `before.jobs[id] is after.jobs[id]` says that a job did not change.
    """

    def __init__(self, state: State, event: Event, now: float) -> None:
        self.event = event
        self.now = now
        self.state = _copied(state)
        self.policy = state.policy
        self.actions: list[Action] = []
        self._fresh: set[tuple[str, str]] = set()

    def node(self, name: str) -> Node:
        """The node of that name to alter; an unknown name makes a new one."""
        if name not in self.state.nodes:
            self.state.nodes[name] = Node(name)
        return self._own(self.state.nodes, name)

    def job(self, job: str) -> Job:
        """The job to alter; raises KeyError for an unknown one."""
        return self._own(self.state.jobs, job)

    def incident(self, incident: str) -> Incident:
        """The incident to alter; raises KeyError for an unknown one."""
        return self._own(self.state.incidents, incident)

    def act(self, kind: type[Act], job: Job | None, node: str, reason: str, *, incident: str = "", **body: Any) -> Act:
        """Order an action of `kind` on `node` ("" for the controller itself); the incident lists it."""
        generation = body.pop("generation", job.generation if job else 0)
        seconds = body.pop("seconds", self.policy.action_s)
        name = job.id if job else "cluster"
        action = kind(
            id=f"{name}/{generation}/{kind.__name__}/{node or 'controller'}/{self.state.next_action}",
            node=node,
            job=job.id if job else "",
            generation=generation,
            deadline=self.now + seconds,
            reason=reason,
            incident=incident,
            traceparent=self.state.incidents[incident].traceparent if incident else self.event.traceparent,
            **body,
        )
        self.state.next_action += 1
        self.actions.append(action)
        if node:
            self.state.outstanding[action.id] = action
        if incident:
            target = str(body.get(TARGETED) or node or name)
            record = self.incident(incident)
            record.actions = (*record.actions, Ordered(kind.__name__, target, reason))[-NOTES:]
        return action

    def withdraw(self, job: str, kinds: tuple[type[Action], ...], nodes: tuple[str, ...]) -> None:
        """Expect no answer any more to actions of these kinds for `job` on `nodes`: a later order overrules them."""
        for key, action in list(self.state.outstanding.items()):
            if action.job == job and isinstance(action, kinds) and action.node in nodes:
                del self.state.outstanding[key]

    def note(self, incident: str, text: str) -> None:
        """Add a line to an incident's timeline."""
        record = self.incident(incident)
        record.timeline = (*record.timeline, Note(self.now, text))[-NOTES:]

    def finish(self, before: State) -> None:
        """Share what was taken to be altered and was not."""
        _share(self.state.nodes, before.nodes)
        _share(self.state.jobs, before.jobs)
        _share(self.state.incidents, before.incidents)

    def _own(self, table: dict[str, Record], key: str) -> Record:
        mark = (type(table[key]).__name__, key)
        if mark not in self._fresh:
            table[key] = _copied(table[key])
            self._fresh.add(mark)
        return table[key]


Copied = TypeVar("Copied", Node, Job, Incident, State)


def _copied(record: Copied) -> Copied:
    """A copy that shares only what cannot change: dicts are copied, their values are frozen or copied when needed."""
    containers: dict[str, Any] = {
        item.name: dict(value) for item in fields(record) if isinstance(value := getattr(record, item.name), dict)
    }
    return replace(record, **containers)


def _share(own: dict[str, Record], before: dict[str, Record]) -> None:
    for key, record in own.items():
        old = before.get(key)
        if old is not None and old is not record and old == record:
            own[key] = old
