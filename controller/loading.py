"""Brings core's state back from the store, and decides the recorded history again to compare what follows."""

from dataclasses import dataclass
from typing import Any

from controller.core import codec, events, machine
from controller.core.state import STATE_VERSION, State
from controller.store.finals import RECENT, Finals
from controller.store.history import (
    PAGE,
    RecordedEvent,
    last_common_step,
    load_actions,
    load_events,
    load_marks,
    load_records,
    load_snapshot,
)
from controller.store.ingest import Ingest
from controller.store.opening import Store


def load_state(store: Store) -> tuple[State, int]:
    """Rebuild core's state: the newest snapshot of this version, and every event after it.

    Returns the state and the seq of its last event. Stored actions are not decided again: what core answers to old
    events now is ignored.
    """
    state, seq = State(), 0
    snapshot = load_snapshot(store, STATE_VERSION)
    if snapshot is not None:
        seq, state = snapshot[0], codec.decode_state(snapshot[1])
    for recorded in load_events(store, after=seq):
        state, _ = machine.decide(state, decode_event(recorded), recorded.recorded)
        seq = recorded.seq
    return state, seq


def load_ingest(store: Store, state: State) -> Ingest:
    """Rebuild what ingest remembers: how far each agent was stored, and the steps that wait for a rank's report."""
    finals = Finals()
    for job in state.jobs.values():
        common = last_common_step(store, job.id, job.generation)
        for rank, record in load_records(store, job.id, job.generation, common - RECENT):
            finals.add(job.id, job.generation, job.world, rank, record)
    return Ingest(load_marks(store), finals)


def decode_event(recorded: RecordedEvent) -> events.Event:
    """Read an event back; raises CodecError if it is not one."""
    event = codec.decode(recorded.body)
    if not isinstance(event, events.Event):
        raise codec.CodecError(f"event {recorded.seq}", "an event", recorded.body)
    return event


@dataclass(frozen=True, slots=True)
class Replayed:
    """The outcome of a replay; `difference` is the first one found, or None if every decision came out the same."""

    events: int
    actions: int
    difference: str | None


def replay(store: Store) -> Replayed:
    """Feed all recorded events to core from its beginning and compare what it decides with the stored actions."""
    state = State()
    counted, found = 0, 0
    stored: dict[int, list[dict[str, Any]]] = {}
    for recorded in load_events(store):
        if counted % PAGE == 0:
            stored = load_actions(store, recorded.seq, recorded.seq + PAGE)
        state, ordered = machine.decide(state, decode_event(recorded), recorded.recorded)
        counted, found = counted + 1, found + len(ordered)
        difference = _difference(recorded, [codec.encode(action) for action in ordered], stored.get(recorded.seq, []))
        if difference is not None:
            return Replayed(counted, found, difference)
    return Replayed(counted, found, None)


def _difference(recorded: RecordedEvent, again: list[dict[str, Any]], stored: list[dict[str, Any]]) -> str | None:
    where = f"event {recorded.seq} ({recorded.body.get('type')})"
    if len(again) != len(stored):
        return f"{where}: {len(stored)} actions are stored, core decides {len(again)}"
    for position, (now, then) in enumerate(zip(again, stored, strict=True)):
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                return f"{where}: action {position}: {key}: stored {then.get(key)!r}, core decides {now.get(key)!r}"
    return None
