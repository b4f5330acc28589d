"""The choice of state: what every living rank has, never a left-over, never a doubtful one."""

from hypothesis import given
from hypothesis import strategies as st

from agent.training.restore import Choice, Holding, choose


def held(step: int, digest: int = 0) -> Holding:
    return Holding(step, digest or 1000 + step, 5)


def test_ranks_one_step_apart_go_on_from_the_one_behind() -> None:
    choice = choose([[held(25), held(24)], [held(24), held(23)]])
    assert choice == Choice(held(24), (0, 1))


def test_a_rank_without_state_receives_it() -> None:
    assert choose([[held(24), held(23)], []]) == Choice(held(24), (0,))


def test_a_left_over_is_not_asked() -> None:
    assert choose([[held(30)], [held(12), held(11)]]) == Choice(held(30), (0,))


def test_a_majority_decides_and_a_tie_falls_back_one_step() -> None:
    assert choose([[held(9, 1)], [held(9, 1)], [held(9, 2)]]) == Choice(held(9, 1), (0, 1))
    assert choose([[held(9, 1), held(8)], [held(9, 2), held(8)]]) == Choice(held(8), (0, 1))
    assert choose([[held(9, 1)], [held(9, 2)]]) is None


def test_nothing_held_means_a_checkpoint() -> None:
    assert choose([[], []]) is None


@given(st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=6), st.integers(2, 50))
def test_no_step_that_all_have_passed_is_lost(ranks: list[tuple[int, bool]], front: int) -> None:
    """Whatever rank was killed between which stores, at most one step is executed again."""
    holdings = [[held(front - back), held(front - back - 1)] if alive else [] for back, alive in ranks]
    choice = choose(holdings)
    alive = [front - back for back, living in ranks if living]
    if not alive:
        assert choice is None
    else:
        assert choice is not None
        assert choice.state.step == min(alive)
        assert choice.state.step >= max(alive) - 1
