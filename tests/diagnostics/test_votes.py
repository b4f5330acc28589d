"""From votes to a verdict: the rules one by one, then what must hold for any votes."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.health import Verdict
from diagnostics.verify.votes import ROLES, Role, Ruling, Vote, decide


def vote(role: Role, digest: str, node: str = "", alarm: bool = False, finite: bool = True) -> Vote:
    home = {"original": "a", "suspect": "a", "peer": "b", "third": "c"}[role]
    node = node or home
    return Vote(role, node, f"cpu-{node}", 1, digest, alarm, finite)


def cast(digests: str, **changes: Vote) -> list[Vote]:
    """One vote per letter, in the order of ROLES."""
    return [changes.get(role, vote(role, d)) for role, d in zip(ROLES, digests, strict=False)]


def test_votes_are_asked_for_in_turn() -> None:
    assert decide(cast("x")).needs == "suspect"
    assert decide(cast("xy")).needs == "peer"
    assert decide(cast("xxy")).needs == "third"


@pytest.mark.parametrize(
    ("digests", "verdict", "blamed", "recurrent"),
    [
        ("xyy", Verdict.CORRUPT, "a", False),
        ("xxx", Verdict.FALSE_ALARM, None, False),
        ("xxyy", Verdict.CORRUPT, "a", True),
        ("xzyy", Verdict.CORRUPT, "a", True),
        ("xxyx", Verdict.CORRUPT, "b", False),
        ("xyzy", Verdict.CORRUPT, "b", False),
        ("xyzw", Verdict.SOFTWARE, None, False),
        ("xxyz", Verdict.SOFTWARE, None, False),
    ],
)
def test_rules(digests: str, verdict: Verdict, blamed: str | None, recurrent: bool) -> None:
    ruling = decide(cast(digests))
    assert (ruling.verdict, ruling.blamed_node, ruling.recurrent) == (verdict, blamed, recurrent)
    assert ruling.needs is None
    assert ruling.blamed_device == (f"cpu-{blamed}" if blamed else None)


def test_agreement_on_something_not_finite_is_software() -> None:
    votes = [replace(v, finite=False) for v in cast("xxx")]
    assert decide(votes).verdict is Verdict.SOFTWARE


def test_no_second_device_is_undecided() -> None:
    assert decide(cast("xx"), frozenset({"peer"})).verdict is Verdict.UNDECIDED
    assert decide(cast("xy"), frozenset({"peer"})).verdict is Verdict.UNDECIDED
    assert decide(cast("xxx", peer=vote("peer", "x", node="a"))).verdict is Verdict.UNDECIDED
    assert decide(cast("x"), frozenset({"suspect"})).verdict is Verdict.UNDECIDED


def test_without_a_third_the_sensors_decide_or_nobody() -> None:
    gone: frozenset[Role] = frozenset({"third"})
    again = cast("xxy", suspect=vote("suspect", "x", alarm=True))
    ruling = decide(again, gone)
    assert (ruling.verdict, ruling.blamed_node, ruling.recurrent) == (Verdict.CORRUPT, "a", True)
    assert "sensors" in ruling.reason
    both = cast("xxy", suspect=vote("suspect", "x", alarm=True), peer=vote("peer", "y", alarm=True))
    assert decide(both, gone).verdict is Verdict.UNDECIDED
    assert decide(cast("xxy"), gone).verdict is Verdict.UNDECIDED


def test_a_third_vote_from_the_suspects_node_does_not_count() -> None:
    ruling = decide(cast("xxyy", third=vote("third", "x", node="a")))
    assert ruling.verdict is Verdict.UNDECIDED


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="original"):
        decide([vote("suspect", "x")])
    with pytest.raises(ValueError, match="two different votes"):
        decide([vote("original", "x"), vote("original", "y")])
    with pytest.raises(ValueError, match="unknown role"):
        decide([replace(vote("original", "x"), role="fourth")])  # type: ignore[arg-type]


ballots = st.builds(
    lambda digests, alarms, nodes, finite, upto: [
        Vote(role, node, f"cpu-{node}", 1, digest, alarm, finite)
        for role, digest, alarm, node in list(zip(ROLES, digests, alarms, ["a", "a", *nodes], strict=True))[:upto]
    ],
    st.lists(st.sampled_from("xyz"), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")),
    st.booleans(),
    st.integers(1, 4),
)
absences = st.frozensets(st.sampled_from(ROLES[1:]))


def check(ruling: Ruling) -> None:
    assert (ruling.verdict is None) != (ruling.needs is None)
    assert (ruling.verdict is Verdict.CORRUPT) == (ruling.blamed_node is not None)
    assert (ruling.blamed_node is None) == (ruling.blamed_device is None)
    assert ruling.reason


@given(ballots, absences)
def test_whatever_the_votes(votes: list[Vote], unavailable: frozenset[Role]) -> None:
    ruling = decide(votes, unavailable)
    check(ruling)
    for shuffled in permutations(votes):
        assert decide(shuffled, unavailable) == ruling
    if ruling.needs is not None:
        assert ruling.needs not in {v.role for v in votes} | unavailable
    if ruling.blamed_node is not None:
        recomputed = {v.node: v.digest for v in reversed(votes) if v.role != "original"}  # a node's first vote counts
        others = {node: d for node, d in recomputed.items() if node != ruling.blamed_node}
        assert others, "no device is blamed on its own word"
        original = next(v for v in votes if v.role == "original")
        if ruling.blamed_node != original.node or ruling.recurrent:
            assert recomputed[ruling.blamed_node] not in others.values(), "it agrees with another device"


@given(ballots, absences)
def test_asking_always_ends(votes: list[Vote], unavailable: frozenset[Role]) -> None:
    """Declare what is asked for unavailable, and there is a verdict after at most three questions."""
    for _ in range(4):
        ruling = decide(votes, unavailable)
        if ruling.needs is None:
            return
        unavailable |= {ruling.needs}
    pytest.fail("still asking")
