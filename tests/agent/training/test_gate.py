"""The gate's decision: nothing suspicious commits, and every rank decides alike."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.training.gate import Decision, GateError, Row, decide


def row(**changes: object) -> Row:
    fields = {
        "generation": 1,
        "step": 5,
        "attempt": 1,
        "alarm": False,
        "reading": 0.1,
        "squared_norm": 2.0,
        "previous": 4,
        "digest": 77,
        "loss": 3.0,
        "counts": (1, 2),
    }
    return Row(**{**fields, **changes})  # type: ignore[arg-type]


def test_clean_rows_commit_with_the_norm_of_all_slices() -> None:
    outcome = decide([row(squared_norm=9.0), row(squared_norm=16.0)])
    assert outcome.decision is Decision.COMMIT
    assert outcome.norm == 5.0


def test_one_alarm_holds_the_step_and_names_the_rank() -> None:
    outcome = decide([row(), row(alarm=True), row()])
    assert (outcome.decision, outcome.suspects) == (Decision.REPLAY, (1,))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_never_commits(bad: float) -> None:
    outcome = decide([row(), row(squared_norm=bad)])
    assert (outcome.decision, outcome.suspects) == (Decision.REPLAY, (0, 1))


def test_copies_of_one_sum_that_differ_hold_the_step() -> None:
    outcome = decide([row(copy=1), row(copy=2), row(copy=1)])
    assert (outcome.decision, outcome.suspects) == (Decision.REPLAY, (0, 1, 2))
    assert decide([row(copy=1), row(copy=1)]).decision is Decision.COMMIT


def test_tokens_that_went_astray_hold_the_step_and_name_their_group() -> None:
    """Rank 2 got three more, of hash 5, than ranks 2 and 3 sent."""
    lost = [row(astray=9), row(astray=2**64 - 9), row(astray=7 + 5), row(astray=2**64 - 7)]
    outcome = decide(lost, ep=2)
    assert (outcome.decision, outcome.suspects, outcome.astray) == (Decision.REPLAY, (2, 3), True)
    assert decide([*lost[:2], row(astray=7), lost[3]], ep=2).decision is Decision.COMMIT
    assert not decide([row(alarm=True), *lost[1:]], ep=2).astray


def test_disagreement_about_the_last_commit_comes_before_alarms() -> None:
    outcome = decide([row(digest=1), row(digest=2, alarm=True)])
    assert outcome.decision is Decision.ROLL_BACK


def test_memory_that_changed_is_rolled_back_also_where_there_is_one_rank() -> None:
    outcome = decide([row(intact=False, alarm=True)])
    assert outcome.decision is Decision.ROLL_BACK
    assert "step 4 changed in memory: ranks [0]" in outcome.reason


@pytest.mark.parametrize("field", ["generation", "step", "attempt", "previous"])
def test_rows_that_do_not_belong_together_are_refused(field: str) -> None:
    with pytest.raises(GateError, match="rank 1"):
        decide([row(), row(**{field: 9})])


@given(
    st.builds(
        row,
        alarm=st.booleans(),
        reading=st.floats(),
        squared_norm=st.floats(),
        digest=st.integers(0, 2**64 - 1),
        copy=st.integers(0, 2**64 - 1),
        astray=st.integers(0, 2**64 - 1),
        loss=st.floats(),
        counts=st.lists(st.integers(0, 2**31), max_size=5).map(tuple),
    )
)
def test_a_row_survives_its_packing(one: Row) -> None:
    values = one.pack()
    assert all(-(2**63) <= value < 2**63 for value in values)
    again = Row.unpack(values)
    assert again.pack() == values  # NaN is not equal to itself, its bits are


@given(
    st.lists(
        st.builds(row, alarm=st.booleans(), squared_norm=st.floats(0, 1e300) | st.just(math.inf)),
        min_size=1,
        max_size=6,
    )
)
def test_nothing_suspicious_commits(rows: list[Row]) -> None:
    outcome = decide(rows)
    suspicious = any(r.alarm for r in rows) or not math.isfinite(math.fsum(r.squared_norm for r in rows))
    if suspicious:
        assert outcome.decision is not Decision.COMMIT
    else:
        assert outcome.decision is Decision.COMMIT


def test_of_ranks_that_exchange_tokens_those_that_alarmed_first_are_asked() -> None:
    """A corruption that spread alarms later elsewhere; in another group it cannot have come from here."""
    rows = [row(alarm=True, clock=4), row(alarm=True, clock=2), row(alarm=True, clock=9), row()]
    assert decide(rows, ep=2).suspects == (1, 2)
    assert decide(rows, ep=4).suspects == (1,)
    assert decide([row(alarm=True, clock=2), row(alarm=True, clock=2)], ep=2).suspects == (0, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=4, max_size=4), st.sampled_from([1, 2, 4]))
def test_where_a_rank_of_a_group_alarmed_one_of_the_group_is_suspect(ranks: list[tuple[bool, int]], ep: int) -> None:
    rows = [row(alarm=alarm, clock=clock) for alarm, clock in ranks]
    outcome = decide(rows, ep)
    alarmed = {rank for rank, one in enumerate(rows) if one.alarm}
    assert set(outcome.suspects) <= alarmed
    assert {rank // ep for rank in outcome.suspects} == {rank // ep for rank in alarmed}
    assert (outcome.decision is Decision.COMMIT) == (not alarmed)
