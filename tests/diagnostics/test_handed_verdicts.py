"""Verdicts on what ranks handed each other: a device is named only where what the ranks hold shows it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.health import Verdict
from diagnostics.verify.between import (
    Copy,
    Handed,
    Holder,
    Repeat,
    handed_ruling,
    piece_ruling,
    sum_ruling,
    tokens_ruling,
    update_ruling,
)


def copies(*held: tuple[float, int]) -> list[Copy]:
    return [Copy(f"n{rank}", f"cpu-n{rank}", reading, hash_) for rank, (reading, hash_) in enumerate(held)]


@pytest.mark.parametrize(
    ("held", "blamed"),
    [
        (((0.1, 7), (9.0, 8), (0.1, 7)), "n1"),  # the checksum tells
        (((0.1, 7), (0.1, 7), (0.1, 8)), "n2"),  # it sees nothing, the majority does
        (((math.nan, 8), (0.1, 7)), "n0"),
        (((9.0, 7), (9.0, 7), (0.1, 8)), None),  # two hold the same wrong sum: it passed from one to the other
        (((0.1, 7), (0.1, 8)), None),  # no majority
        (((9.0, 7), (9.0, 7)), None),  # the sum was wrong before it was handed out
        (((0.1, 0), (9.0, 0), (0.1, 0)), None),  # each rank has another slice of it
    ],
)
def test_a_copy_that_alone_is_wrong_is_its_devices_fault(
    held: tuple[tuple[float, int], ...], blamed: str | None
) -> None:
    ruling, lead = sum_ruling(copies(*held))
    assert ruling.blamed_node == blamed
    assert ruling.verdict is (Verdict.CORRUPT if blamed else Verdict.UNDECIDED)
    assert "in the reduction" in ruling.reason
    assert not ruling.recurrent
    if blamed:
        assert blamed == f"n{lead}"


def test_a_slice_names_the_rank_that_holds_it() -> None:
    ruling, lead = sum_ruling(copies((0.1, 0), (0.2, 0), (9.0, 0)))
    assert (lead, ruling.blamed_device) == (2, None)
    assert "n2" in ruling.reason


@given(st.lists(st.tuples(st.sampled_from([0.1, 1.0, 1.5, math.nan]), st.integers(5, 7)), min_size=1, max_size=6))
def test_never_a_false_alarm_and_never_a_device_whose_copy_is_like_the_others(held: list[tuple[float, int]]) -> None:
    """A tolerance must not be widened for what no recomputation can repeat."""
    ruling, lead = sum_ruling(copies(*held))
    assert ruling.verdict in (Verdict.CORRUPT, Verdict.UNDECIDED)
    if ruling.verdict is Verdict.CORRUPT:
        assert all(held[lead][1] != hash_ or rank == lead for rank, (_, hash_) in enumerate(held)) or not (
            held[lead][0] <= 1.0
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
