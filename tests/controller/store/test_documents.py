"""A decision writes the rows of what it altered and of nothing else, however many nodes there are."""

from making import hello, submitted

from controller.core import events
from controller.core.machine import decide
from controller.core.state import State
from controller.core.suspicion import blamed
from controller.documents import write_changes
from controller.store.writer import Unit


def after(state: State, event: events.Event) -> State:
    return decide(state, event, 1000.0)[0]


def rows(before: State, now: State) -> list[str]:
    """The nodes that are written anew."""
    unit = Unit()
    write_changes(unit, before, now, 1000.0)
    found = [*((name, row) for name, entries in unit.bulk.items() for row in entries), *unit.then]
    return sorted(row["name"] for name, row in found if name == "node")


def test_a_node_is_written_when_it_or_what_is_held_against_its_device_changed() -> None:
    state = State()
    for index in range(5):
        before, state = state, after(state, hello(f"n{index}"))
        assert rows(before, state) == [f"n{index}"]
    before, state = state, after(state, submitted())
    assert rows(before, state) == []
    key = state.nodes["n3"].devices[0].uuid
    doubted = after(state, events.Tick(time=1.0))
    doubted.suspicion[key] = blamed(None, 1000.0, state.policy)
    assert doubted.nodes["n3"] is state.nodes["n3"]
    assert rows(state, doubted) == ["n3"]
    assert rows(doubted, after(doubted, events.Tick(time=2.0))) == []


def test_a_new_policy_changes_how_every_device_stands() -> None:
    state = State()
    for name in ("n0", "n1"):
        state = after(state, hello(name))
    change = events.PolicyChanged(time=1.0, policy={"suspicion_half_life_s": 60.0}, actor="ada", reason="sooner")
    assert rows(state, after(state, change)) == ["n0", "n1"]
