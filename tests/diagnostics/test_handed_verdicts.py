"""Verdicts on what ranks handed each other: a device is named only where what the ranks hold shows it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.health import Verdict
from diagnostics.verify.between import (
    ADDED,
    GATHERED,
    GIVEN,
    Handed,
    Holder,
    Repeat,
    Summed,
    handed_ruling,
    piece_ruling,
    sum_rulings,
    tokens_ruling,
    update_ruling,
)


@pytest.mark.parametrize(
    ("source", "destination", "blamed", "told"),
    [
        ((5, 5), (6, 6), None, "a piece changed on its way from n0 to n1"),
        ((5, 6), (6, 6), "n0", "what n0 sent does not hash as it did"),
        ((5, 5), (6, 5), "n1", "what n1 received does not hash as it did"),
        ((5, 5), (5, 5), None, "the hash of a piece changed"),
    ],
)
def test_whoever_does_not_hash_a_piece_as_before_is_to_blame(
    source: tuple[int, int], destination: tuple[int, int], blamed: str | None, told: str
) -> None:
    ruling = piece_ruling(Holder("n0", "cpu-n0", *source), Holder("n1", "cpu-n1", *destination))
    assert ruling.blamed_node == blamed
    assert ruling.verdict is (Verdict.CORRUPT if blamed else Verdict.UNDECIDED)
    assert told in ruling.reason


def test_what_a_device_sent_itself_is_its_own_fault() -> None:
    ruling = piece_ruling(Holder("n2", "cpu-n2", 5, 5), Holder("n2", "cpu-n2", 6, 6))
    assert (ruling.verdict, ruling.blamed_node) == (Verdict.CORRUPT, "n2")
    assert "on its way from n2 to itself" in ruling.reason


MEMBERS = [(f"n{rank}", f"cpu-n{rank}") for rank in range(4)]


@pytest.mark.parametrize(
    ("wrote", "made", "again", "blamed", "recurrent"),
    [
        (8, 7, (7, 7, 7, 7), "n1", False),  # the owner, once
        (8, 7, (7, 8, 7, 7), "n1", True),  # the owner, again
        (7, 8, (7, 7, 7, 7), "n2", False),  # the rank that checked it
        (7, 8, (7, 7, 8, 7), "n2", True),
        (7, 7, (7, 7, 7, 7), "n2", False),  # they agree: it was the comparison
        (8, 7, (7, 8), None, False),  # two, and both make something else
        (8, 7, (8, 7), None, False),  # both stand by theirs
        (8, 7, (9, 7), "n0", False),  # one contradicts itself
        (8, 7, (7, 8, 9, 6), None, False),
        (8, 7, (7, 7), "n0", False),
    ],
)
def test_an_update_is_judged_by_the_majority(
    wrote: int, made: int, again: tuple[int, ...], blamed: str | None, recurrent: bool
) -> None:
    owner = 1 if len(again) > 2 else 0
    ruling = update_ruling(Repeat(owner, owner + 1, wrote, made, again), MEMBERS)
    assert (ruling.blamed_node, ruling.recurrent) == (blamed, recurrent)
    assert ruling.verdict is (Verdict.CORRUPT if blamed else Verdict.UNDECIDED)
    assert "in the optimizer" in ruling.reason


@pytest.mark.parametrize(
    ("handed", "blamed"),
    [
        (Handed(1, 2, 5, 5, 6, 6, alone=True), "n2"),
        (Handed(1, 2, 5, 5, 6, 6, alone=False), None),
        (Handed(1, 2, 5, 4, 6, 6, alone=False), "n1"),
        (Handed(1, 2, 5, 5, 6, 5, alone=False), "n2"),
    ],
)
def test_a_part_that_arrived_otherwise(handed: Handed, blamed: str | None) -> None:
    ruling = handed_ruling(handed, MEMBERS)
    assert ruling.blamed_node == blamed
    assert ruling.verdict is (Verdict.CORRUPT if blamed else Verdict.UNDECIDED)


def test_of_tokens_that_went_astray_one_rank_that_deviates_is_to_blame() -> None:
    ruling, lead = tokens_ruling({3: MEMBERS[3]}, 2)
    assert (ruling.verdict, ruling.blamed_node, lead) == (Verdict.CORRUPT, "n3", 3)
    for deviating in ({}, {2: MEMBERS[2], 3: MEMBERS[3]}):
        ruling, lead = tokens_ruling(deviating, 2)
        assert (ruling.verdict, ruling.blamed_node, lead) == (Verdict.UNDECIDED, None, 2)


def part(
    what: str, source: int, holder: int, *, gave: int = 5, holds: int = 6, written: int = 5, held: int = 6
) -> Summed:
    """A part announced as 5 that arrived as 6; both ends stand by that, unless another hash is given."""
    return Summed(what, Handed(source, holder, written, gave, held, holds, alone=False))


@pytest.mark.parametrize(
    ("parts", "blamed", "told"),
    [
        ([part(GIVEN, 0, 1)], {}, "a piece changed on its way from n0 to n1"),
        ([part(GIVEN, 0, 1, gave=7)], {0}, "what n0 sent does not hash as it did"),
        ([part(GIVEN, 0, 1, holds=7)], {1}, "what n1 received does not hash as it did"),
        ([part(GIVEN, 2, 2)], {2}, "what n2 gave itself to add changed in its memory"),
        ([part(GIVEN, 0, 1), part(GIVEN, 0, 2)], {0}, "n0 is an end of each"),
        ([part(GIVEN, 0, 3), part(GIVEN, 1, 3), part(GIVEN, 2, 3)], {3}, "3 pieces"),
        ([part(GIVEN, 0, 1), part(GIVEN, 1, 2)], {1}, "n1 is an end of each"),
        ([part(GIVEN, 0, 1), part(GIVEN, 1, 0)], {}, "from n0 to n1"),
        ([part(GIVEN, 0, 1), part(GIVEN, 2, 3)], {}, "from n0 to n1"),
        ([part(GIVEN, 0, 1, gave=7), part(GIVEN, 0, 2)], {0}, "what n0 sent"),  # that explains the other as well
        ([part(GIVEN, 0, 1, gave=7), part(GIVEN, 2, 3, holds=7)], {0, 3}, "does not hash"),
        ([part(ADDED, 1, 1, gave=0, holds=0, written=0, held=0)], {1}, "what n1 added up is not the sum"),
        ([part(GATHERED, 0, 1)], {1}, "n1 alone does not hold the sum"),
        ([part(GATHERED, 0, 1, gave=7)], {0}, "what n0 sent"),
        ([part(GATHERED, 0, 1), part(GATHERED, 0, 2)], {0}, "n0 is an end of each"),
        ([part(GATHERED, 0, 1, held=5, holds=5)], {}, "the hash of a piece changed"),
        ([part(GATHERED, 1, 1)], {1}, "the part of the sum that n1 made changed in its memory"),
    ],
)
def test_a_sum_is_judged_by_its_parts(parts: list[Summed], blamed: set[int], told: str) -> None:
    rulings = sum_rulings(parts, MEMBERS)
    assert {rank for rank, ruling in rulings if ruling.verdict is Verdict.CORRUPT} == set(blamed)
    for rank, ruling in rulings:
        assert ruling.blamed_node == (f"n{rank}" if rank in blamed else None)
        assert ruling.verdict is (Verdict.CORRUPT if rank in blamed else Verdict.UNDECIDED)
        assert "in the reduction" in ruling.reason
        assert not ruling.recurrent
    assert any(told in ruling.reason for _, ruling in rulings)


HASH = st.integers(5, 6)


@given(
    st.lists(
        st.builds(
            Summed,
            st.sampled_from([GIVEN, GATHERED]),
            st.builds(Handed, st.integers(0, 3), st.integers(0, 3), HASH, HASH, HASH, HASH, st.just(False)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_part_has_a_ruling_and_never_a_false_alarm(parts: list[Summed]) -> None:
    """A tolerance must not be widened for what no recomputation can repeat; nor is a rank blamed that had no part."""
    rulings = dict(sum_rulings(parts, MEMBERS))
    assert rulings
    corrupt = {rank for rank, ruling in rulings.items() if ruling.verdict is Verdict.CORRUPT}
    assert all(ruling.verdict in (Verdict.CORRUPT, Verdict.UNDECIDED) for ruling in rulings.values())
    assert corrupt <= {rank for part in parts for rank in (part.piece.source, part.piece.holder)}
    unexplained = [part for part in parts if not corrupt & {part.piece.source, part.piece.holder}]
    assert bool(unexplained) == (len(corrupt) < len(rulings))
