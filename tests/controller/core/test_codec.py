"""Events, actions and snapshots survive JSON bit for bit; everything else is refused with the place of the fault."""

import json
import math
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from story import Story

from controller.core.actions import Action
from controller.core.codec import TYPES, CodecError, decode, decode_state, encode, encode_state
from controller.core.events import Event, GateAlarm

names = st.text(max_size=8)
scalars: dict[Any, st.SearchStrategy[Any]] = {
    str: names,
    int: st.integers(-(2**63), 2**63),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    dict[int, str]: st.dictionaries(st.integers(), names, max_size=3),
    dict[str, str]: st.dictionaries(names, names, max_size=3),
    dict[str, float]: st.dictionaries(names, st.floats(allow_nan=False), max_size=3),
}


def strategy(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if hint in scalars:
        return scalars[hint]
    if getattr(hint, "__origin__", None) is tuple:
        return st.lists(strategy(hint.__args__[0]), max_size=2).map(tuple)
    return st.builds(hint, **{name: strategy(inner) for name, inner in get_type_hints(hint).items()})


@pytest.mark.parametrize("name", sorted(TYPES))
def test_every_type_survives_json(name: str) -> None:
    @settings(max_examples=12, deadline=None)
    @given(strategy(TYPES[name]))
    def check(item: Event | Action) -> None:
        assert decode(json.loads(json.dumps(encode(item), allow_nan=False))) == item

    check()


def test_a_loss_that_is_no_number_survives() -> None:
    story = Story()
    story.cluster()
    story.final(2)
    document = encode(story.fed[-1][0])
    for value, text in ((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")):
        read = decode({**document, "loss": text})
        assert encode(read)["loss"] == text
        assert repr(read.loss) == repr(value)  # type: ignore[union-attr]


def _without_type(item: dict[str, Any]) -> object:
    return {key: value for key, value in item.items() if key != "type"}


BROKEN: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda item: 7, "document"),
    (_without_type, "document"),
    (lambda item: {**item, "type": "Nonsense"}, "known event or action"),
    (lambda item: {**item, "type": "Event"}, "known event or action"),
    (lambda item: {**item, "extra": 1}, "the fields"),
    (lambda item: {key: value for key, value in item.items() if key != "step"}, "the fields"),
    (lambda item: {**item, "step": "1"}, r"StepFinal.step: expected int"),
    (lambda item: {**item, "step": True}, r"StepFinal.step: expected int"),
    (lambda item: {**item, "loss": "much"}, r"StepFinal.loss: expected float"),
    (lambda item: {**item, "job": None}, r"StepFinal.job: expected str"),
]


@pytest.mark.parametrize(("breaks", "says"), BROKEN)
def test_what_cannot_be_read_exactly_is_refused(breaks: Callable[[dict[str, Any]], object], says: str) -> None:
    story = Story()
    story.cluster()
    story.final(2)
    with pytest.raises(CodecError, match=says):
        decode(breaks(encode(story.fed[-1][0])))


def test_events_stored_before_votes_had_numbers_are_still_read() -> None:
    story = Story()
    story.cluster()
    story.alarm(1, 7, third=True)
    old = encode(story.fed[-1][0])
    for vote in old["votes"]:
        del vote["number"]
    read = decode(old)
    assert isinstance(read, GateAlarm)
    assert [vote.number for vote in read.votes] == [0, 0, 0]
    del old["votes"][0]["digest"]
    with pytest.raises(CodecError, match="votes"):
        decode(old)


def test_a_snapshot_holds_the_whole_state_and_its_version() -> None:
    story = Story()
    story.cluster()
    story.exit(0, "signal", 25)
    stored = json.loads(json.dumps(encode_state(story.state), allow_nan=False))
    assert decode_state(stored) == story.state
    with pytest.raises(CodecError, match="version"):
        decode_state({**stored, "version": 0})
    stored["state"]["jobs"]["run"]["status"] = "ASLEEP"
    with pytest.raises(CodecError, match=r"state\.jobs\.run\.status"):
        decode_state(stored)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_other_json_is_refused(document: object) -> None:
    with pytest.raises(CodecError):
        decode(document)
