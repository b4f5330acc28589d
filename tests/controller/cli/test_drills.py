"""Drills on the command line: everything the contract allows is read, everything else is refused in one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.cli.drills import FAULTS, KEYS, KINDS, OPS, Bounds, DrillError, build, parse

BOUNDS = Bounds(steps=40, world=2, nodes=frozenset({"n0", "n1", "n2"}), layers=3)


def test_an_sdc_drill_is_complete() -> None:
    drill = parse("sdc@12:rank=1", BOUNDS)
    assert (drill.kind, drill.step, drill.rank, drill.node) == ("sdc", 12, 1, "")
    assert drill.params == {"op": "fprop", "fault": "bitflip", "bit": "30"}


def test_other_kinds_carry_only_their_target() -> None:
    drill = parse("node@7:node=n2", BOUNDS)
    assert (drill.kind, drill.step, drill.rank, drill.node, drill.params) == ("node", 7, -1, "n2", {})


def test_every_key_of_an_sdc_drill() -> None:
    drill = parse("sdc@40:node=n1,layer=2,op=wgrad,fault=tile,bit=22,persistent=1", BOUNDS)
    assert drill.node == "n1"
    assert drill.params == {"layer": "2", "op": "wgrad", "fault": "tile", "bit": "22", "persistent": "true"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sdc", "KIND@STEP"),
        ("sdc@", "KIND@STEP"),
        ("sdc@x", "KIND@STEP"),
        ("sdc@-1", "KIND@STEP"),
        ("sdc@1.5", "KIND@STEP"),
        ("flood@3", "unknown drill kind 'flood'"),
        ("sdc@0", "steps begin at 1"),
        ("sdc@41", "beyond the last step, 40"),
        ("sdc@3:rank=2", "2 ranks"),
        ("kill@3:rank=-1", "rank is a number"),
        ("kill@3:rank=one", "rank is a number"),
        ("kill@3:node=n9", "unknown node 'n9'"),
        ("kill@3:color=red", "unknown key 'color'"),
        ("kill@3:", "unknown key ''"),
        ("kill@3:rank", "rank needs a value"),
        ("kill@3:rank=", "rank needs a value"),
        ("kill@3:rank=0,rank=1", "given twice"),
        ("kill@3:bit=3", "belongs to sdc"),
        ("sdc@3:bit=32", "32 bits"),
        ("sdc@3:layer=3", "3 layers"),
        ("sdc@3:op=up", "op is one of fprop, dgrad, wgrad"),
        ("sdc@3:fault=none", "fault is one of"),
        ("sdc@3:persistent=maybe", "true or false"),
        ("sdc@٣", "KIND@STEP"),
    ],
)
def test_refuses_with_a_line_that_names_the_part(text: str, told: str) -> None:
    with pytest.raises(DrillError, match=told) as caught:
        parse(text, BOUNDS)
    assert "\n" not in str(caught.value)


@given(
    step=st.integers(1, 40),
    rank=st.none() | st.integers(0, 1),
    layer=st.none() | st.integers(0, 2),
    op=st.none() | st.sampled_from(OPS),
    fault=st.none() | st.sampled_from(FAULTS),
    bit=st.none() | st.integers(0, 31),
    persistent=st.none() | st.booleans(),
    order=st.randoms(),
)
def test_reads_back_what_was_written(step, rank, layer, op, fault, bit, persistent, order) -> None:
    given_keys = {"rank": rank, "layer": layer, "op": op, "fault": fault, "bit": bit, "persistent": persistent}
    pairs = [f"{key}={str(value).lower()}" for key, value in given_keys.items() if value is not None]
    order.shuffle(pairs)
    drill = parse(f"sdc@{step}" + (":" + ",".join(pairs) if pairs else ""), BOUNDS)
    assert (drill.step, drill.rank) == (step, -1 if rank is None else rank)
    assert drill.params.get("layer") == (None if layer is None else str(layer))
    assert drill.params["op"] == (op or "fprop")
    assert drill.params["fault"] == (fault or "bitflip")
    assert drill.params["bit"] == str(30 if bit is None else bit)
    assert ("persistent" in drill.params) == bool(persistent)
    assert not drill.params.keys() & {"rank", "node"}


@given(st.text(max_size=60) | st.from_regex(r"[a-z]{0,6}@[0-9]{0,12}:?[a-z0-9=,]{0,30}", fullmatch=True))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    drill = refused = None
    try:
        drill = parse(text, BOUNDS)
    except DrillError as error:
        refused = str(error)
    if drill is None:
        assert len(str(refused).splitlines()) == 1
    else:
        assert drill.kind in KINDS
        assert 1 <= drill.step <= 40
        assert drill.params.keys() <= set(KEYS)


def test_without_bounds_only_the_form_counts() -> None:
    """The negative control: what the bounds refused passes where they are not known."""
    assert build("kill", 41, ["rank=2"], Bounds(), "x").rank == 2
