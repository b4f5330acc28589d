"""A page that lost its connection is brought up to date, by deltas or from the start, and never wrongly."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from controller.web.deltas import KEPT, History, apply, difference

pictures = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3) | st.lists(st.integers(0, 2)), max_size=4)


@given(pictures, pictures)
def test_a_delta_leads_from_one_picture_to_the_next(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert apply(before, difference(before, after)) == after


@given(st.lists(pictures, min_size=1, max_size=20), st.data())
def test_whoever_saw_any_picture_ends_with_the_newest(
    given_pictures: list[dict[str, Any]], data: st.DataObject
) -> None:
    history, seen = History(life="life"), {"": {}}
    for picture in given_pictures:
        history.add(picture)
        seen[history.mark()] = dict(history.current)
    mark = data.draw(st.sampled_from(sorted(seen)))
    assert _play(seen[mark], history.since(mark)) == given_pictures[-1]


def test_a_mark_of_another_life_gets_the_whole_picture() -> None:
    history = History(life="new")
    history.add({"a": 1})
    assert [_name(event) for event in history.since("old-1")] == ["picture"]
    assert history.since("new-1") == []


def test_marks_that_make_no_sense_get_the_whole_picture() -> None:
    history = History(life="x")
    history.add({"a": 1})
    for mark in ("", "x", "x-", "x--1", "x-9", "x-" + "9" * 400, "x-١", "-1", "x-1.0"):
        assert [_name(event) for event in history.since(mark)] == ["picture"], mark


def test_who_was_away_too_long_gets_the_whole_picture() -> None:
    history = History(life="x")
    for number in range(KEPT + 5):
        history.add({"a": number})
    assert [_name(event) for event in history.since("x-1")] == ["picture"]
    assert {_name(event) for event in history.since(f"x-{history.number - KEPT}")} == {"delta"}


def test_an_equal_picture_is_no_news() -> None:
    history = History(life="x")
    assert history.add({"a": 1})
    assert not history.add({"a": 1, "b": None})


def _name(event: str) -> str:
    return event.split("event: ")[1].split("\n")[0]


def _play(picture: dict[str, Any], events: list[str]) -> dict[str, Any]:
    for event in events:
        data = json.loads(event.split("data: ")[1])
        picture = data if _name(event) == "picture" else apply(picture, data)
    return picture
