"""What is printed: no text from a node steers a terminal, and JSON is JSON."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from controller.cli.output import escape, print_table, seconds, to_json


@given(st.text())
def test_escaped_text_cannot_steer_a_terminal(text: str) -> None:
    shown = escape(text)
    assert shown.isprintable()
    assert "\x1b" not in shown


def test_escapes_show_what_was_there() -> None:
    assert escape("n1\x1b[2Jgone\r\n\x9b31m\u202e") == r"n1\x1b[2Jgone\r\n\x9b31m\u202e"
    assert escape("Straße 7") == "Straße 7"


def test_tables_escape_names_and_leave_markup_alone(capsys) -> None:
    print_table("nodes", ("node",), [["\x1b]0;owned\x07[red]x[/red]"]])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"\x1b]0;owned\x07[red]x[/red]" in shown


def test_an_empty_table_says_so(capsys) -> None:
    print_table("incidents", ("id",), [])
    assert "incidents: none" in capsys.readouterr().out


@given(st.recursive(st.none() | st.floats() | st.text() | st.integers(), lambda inner: st.lists(inner)))
def test_json_is_ascii_and_strict(value: object) -> None:
    text = to_json({"value": value})
    assert text.isascii()
    json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))


def test_what_is_not_finite_is_null() -> None:
    assert json.loads(to_json({"a": math.nan, "b": [math.inf, 1.5]})) == {"a": None, "b": [None, 1.5]}


def test_durations_are_readable() -> None:
    assert [seconds(value) for value in (None, 0.0481, 1.9)] == ["-", "48 ms", "1.90 s"]
