"""Comparing the ranks' digests: what is final, what is a disagreement, in whatever order the reports come."""

import math

from hypothesis import given
from hypothesis import strategies as st
from making import record

from controller.store.finals import PENDING, RECENT, Disagreement, Final, Finals


def test_final_when_all_ranks_agree() -> None:
    finals = Finals()
    assert finals.add("j", 1, 2, 0, record(1, loss=1.0)) is None
    found = finals.add("j", 1, 2, 1, record(1, loss=3.0))
    assert found == Final("j", 1, 1, "d1", "c1", 2.0, 1.0)
    assert finals.recent("j", 1, 1) == found
    assert finals.recent("j", 2, 1) is None


def test_disagreement_is_said_once_and_can_be_repaired() -> None:
    finals = Finals()
    finals.add("j", 1, 3, 0, record(1, "a"))
    found = finals.add("j", 1, 3, 1, record(1, "b"))
    assert found == Disagreement("j", 1, 1, {0: "a", 1: "b"}, 1.0)
    assert finals.add("j", 1, 3, 2, record(1, "a")) is None
    assert isinstance(finals.add("j", 1, 3, 1, record(1, "a")), Final)


def test_not_finite_losses_do_not_spread() -> None:
    finals = Finals()
    finals.add("j", 1, 2, 0, record(1, loss=math.nan))
    found = finals.add("j", 1, 2, 1, record(1, loss=2.0))
    assert isinstance(found, Final)
    assert found.loss == 2.0


def test_windows_are_bounded() -> None:
    finals = Finals()
    for step in range(1, PENDING + 10):
        finals.add("j", 1, 2, 0, record(step))
    assert finals.add("j", 1, 2, 1, record(1)) is None, "given up"
    for step in range(100, 100 + RECENT + 1):
        finals.add("j", 1, 2, 1, record(step))
    assert finals.recent("j", 1, 100) is None
    assert finals.recent("j", 1, 101) is not None


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 6)), max_size=80),
)
def test_any_order_any_repetition(reports: list[tuple[int, int, int]]) -> None:
    """Equal digests never disagree, and each step of the newest generation is final at most once."""
    finals = Finals()
    seen: set[tuple[int, int]] = set()
    newest = 0
    for generation, rank, step in reports:
        newest = max(newest, generation)
        found = finals.add("j", generation, 3, rank, record(step))
        if found is not None:
            assert isinstance(found, Final)
            assert found.generation == newest
            assert (found.generation, found.step) not in seen
            seen.add((found.generation, found.step))


@given(st.permutations([(rank, step) for rank in range(3) for step in range(1, 5)]))
def test_every_step_becomes_final_in_any_order(order: list[tuple[int, int]]) -> None:
    finals = Finals()
    found = [finals.add("j", 1, 3, rank, record(step)) for rank, step in order]
    assert sorted(item.step for item in found if isinstance(item, Final)) == [1, 2, 3, 4]
