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


def again(*digests: str, alarm: bool = False) -> list[Vote]:
    """A run that gave x, and the suspect's replays of it."""
    replays = [replace(vote("suspect", d, alarm=alarm), number=i) for i, d in enumerate(digests, 1)]
    return [vote("original", "x"), *replays]


ALONE: frozenset[Role] = frozenset({"peer"})
NO_THIRD: frozenset[Role] = frozenset({"third"})


def test_a_suspect_is_asked_again_only_where_nobody_else_can_tell() -> None:
    assert decide(again("x"), ALONE, replays=2).needs == "suspect"
    assert decide(again("x", "x"), ALONE, replays=2).verdict is Verdict.UNDECIDED
    assert decide(again("x", alarm=True), ALONE, replays=2).needs == "suspect"  # the same bits alarm alike
    assert decide(again("y"), ALONE, replays=2).verdict is Verdict.UNDECIDED  # it has contradicted itself already
    assert "2 different results in 2 tries" in decide(again("y"), ALONE, replays=2).reason
    assert decide([*again("x"), vote("peer", "y")], NO_THIRD, replays=2).needs == "suspect"
    assert decide([*again("x"), vote("peer", "y")], replays=2).needs == "third"
    assert decide(again("x"), replays=2).needs == "peer"
    # Once its sensors alarm again and the peer's do not, there is nothing left to ask.
    assert decide([*again("x", alarm=True), vote("peer", "y")], NO_THIRD, replays=2).verdict is Verdict.CORRUPT
    # Without more replays (the negative control), nobody is asked again.
    assert decide(again("x"), ALONE, replays=1).verdict is Verdict.UNDECIDED
    assert decide(again("x"), ALONE | {"suspect"}, replays=2).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("own", "peer", "verdict"),
    [
        (("x", "y"), "y", Verdict.CORRUPT),  # the peer confirms its second replay, so the run was wrong twice
        (("z",), "x", Verdict.CORRUPT),  # the peer confirms the run, so the replay was wrong
        (("x", "z"), "y", Verdict.UNDECIDED),  # three results, and nobody confirms any
        (("x", "x"), "y", Verdict.UNDECIDED),
    ],
)
def test_a_device_that_contradicts_itself_needs_no_third(own: tuple[str, ...], peer: str, verdict: Verdict) -> None:
    ruling = decide([*again(*own), vote("peer", peer)], NO_THIRD, replays=2)
    assert (ruling.verdict, ruling.blamed_node) == (verdict, "a" if verdict is Verdict.CORRUPT else None)


def test_votes_of_one_device_count_as_one_device() -> None:
    """However often the suspect repeats itself, it has one voice against two others."""
    votes = [*again("x", "x", "x"), vote("peer", "y"), vote("third", "y")]
    ruling = decide(votes, replays=3)
    assert (ruling.verdict, ruling.blamed_node, ruling.recurrent) == (Verdict.CORRUPT, "a", True)
    same_node = decide([*again("x"), vote("peer", "x", node="a")], replays=1)
    assert same_node.verdict is Verdict.UNDECIDED


def test_a_third_vote_from_the_suspects_node_does_not_count() -> None:
    ruling = decide(cast("xxyy", third=vote("third", "x", node="a")))
    assert ruling.verdict is Verdict.UNDECIDED


TIGHT, LOST = "gemm at 0 (mm, fprop)", "recompute at 1 (silu, fprop)"


def alarmed(role: Role, *places: str) -> Vote:
    return replace(vote(role, "x", alarm=bool(places)), alarmed=frozenset(places))


@pytest.mark.parametrize(
    ("once", "again", "verdict"),
    [
        ((TIGHT,), (TIGHT,), Verdict.FALSE_ALARM),  # the tolerance is too tight
        ((TIGHT, LOST), (TIGHT, LOST), Verdict.FALSE_ALARM),  # as is an operator that never repeats
        ((LOST,), (), Verdict.CORRUPT),
        ((TIGHT, LOST), (TIGHT,), Verdict.CORRUPT),  # a tolerance that is too tight as well hides nothing
        ((TIGHT,), (TIGHT, LOST), Verdict.FALSE_ALARM),  # the replay's own matter
        ((), (TIGHT,), Verdict.FALSE_ALARM),
        ((), (), Verdict.FALSE_ALARM),
    ],
)
def test_an_alarm_that_the_same_bits_do_not_raise_again_was_of_something_wrong(
    once: tuple[str, ...], again: tuple[str, ...], verdict: Verdict
) -> None:
    """Nothing of it went into the step, but the device made it; else it would widen a tolerance by corrupting."""
    ruling = decide(cast("xxx", original=alarmed("original", *once), suspect=alarmed("suspect", *again)))
    assert (ruling.verdict, ruling.recurrent) == (verdict, False)
    assert ruling.blamed_node == ("a" if verdict is Verdict.CORRUPT else None)
    assert (f"did not reproduce: {LOST}" in ruling.reason) is (verdict is Verdict.CORRUPT)


def test_a_reading_that_is_not_finite_once_is_no_fault_of_the_software() -> None:
    """It would end the job; and where only the suspect's checks are not finite again, they are its own."""
    roles: tuple[Role, ...] = ("original", "suspect", "peer")
    original, suspect, peer = (replace(vote(role, "x"), alarm=True, finite=False) for role in roles)
    once = decide(cast("xxx", original=original))
    assert (once.verdict, once.blamed_node, once.recurrent) == (Verdict.CORRUPT, "a", False)
    loose = decide(cast("xxx", original=original, suspect=vote("suspect", "x", alarm=True)))
    assert (loose.verdict, loose.blamed_node) == (Verdict.CORRUPT, "a")
    again = decide(cast("xxx", original=original, suspect=suspect))
    assert (again.verdict, again.blamed_node, again.recurrent) == (Verdict.CORRUPT, "a", True)
    everywhere = decide(cast("xxx", original=original, suspect=suspect, peer=peer))
    assert everywhere.verdict is Verdict.SOFTWARE
    unseen = decide([replace(each, finite=False) for each in cast("xxx")])  # sensors off: nobody alarms
    assert unseen.verdict is Verdict.SOFTWARE


@pytest.mark.parametrize(("alarm", "verdict"), [(False, Verdict.SOFTWARE), (True, Verdict.CORRUPT)])
def test_what_overflows_in_the_sum_alone_is_no_false_alarm(alarm: bool, verdict: Verdict) -> None:
    """Nothing alarmed, and all make the same part again. An alarm of the rank's own is about its part: the control."""
    original = replace(vote("original", "x"), alarm=alarm, finite=False)
    ruling = decide(cast("xxx", original=original))
    assert ruling.verdict is verdict
    assert decide(cast("xyx", original=original)).blamed_node is None  # whose part is another is asked on
    assert decide(cast("yxx", original=replace(original, digest="y"))).verdict is Verdict.CORRUPT


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
        strange = [v for v in votes if v.role == "suspect" and not v.finite]
        if ruling.blamed_node != original.node or (ruling.recurrent and not strange):
            assert recomputed[ruling.blamed_node] not in others.values(), "it agrees with another device"


@given(
    st.lists(st.sampled_from("xyz"), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    absences,
    st.integers(1, 4),
)
def test_any_gate_ends_within_its_replays(
    digests: list[str], alarms: list[bool], unavailable: frozenset[Role], replays: int
) -> None:
    """Answer whatever is asked: no more than one peer and one third, and at most `replays` by the suspect."""
    votes = [vote("original", "x", alarm=True)]
    computed = 0
    while (ruling := decide(votes, unavailable, replays)).needs is not None:
        number = 1 + sum(v.role == ruling.needs for v in votes)
        votes.append(replace(vote(ruling.needs, digests[computed], alarm=alarms[computed]), number=number))
        computed += 1
        assert sum(v.role == "suspect" for v in votes) <= max(replays, 1)
        assert computed <= max(3, replays + 1)
    check(ruling)
    assert replays > 2 or computed <= 3


@given(ballots, absences)
def test_asking_always_ends(votes: list[Vote], unavailable: frozenset[Role]) -> None:
    """Declare what is asked for unavailable, and there is a verdict after at most three questions."""
    for _ in range(4):
        ruling = decide(votes, unavailable)
        if ruling.needs is None:
            return
        unavailable |= {ruling.needs}
    pytest.fail("still asking")
