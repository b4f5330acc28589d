"""The choice of state: what every living rank has, never a left-over, never a doubtful one."""

from hypothesis import given
from hypothesis import strategies as st

from agent.training.restore import Choice, Holding, ShardChoice, choose, choose_shards


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


def test_the_shard_of_a_lost_rank_is_with_its_neighbour() -> None:
    every = [[held(9), held(8)] for _ in range(4)]
    lost = [*every[:2], [], every[3]]
    assert choose_shards(lost, lost) == ShardChoice(held(9), (0, 1, 3), (0, 1, 3))
    assert choose_shards(every, [[], [], [], []]) == ShardChoice(held(9), (0, 1, 2, 3), ())


def test_without_the_neighbour_it_is_gone() -> None:
    two = [[held(9), held(8)], [held(9), held(8)], [], []]
    assert choose_shards(two, two) is None


def test_a_neighbour_that_is_behind_holds_the_step_before() -> None:
    """Rank 2 was lost before it had passed on step 9, so rank 3 never committed it."""
    own = [[held(9), held(8)], [held(9), held(8)], [], [held(8), held(7)]]
    assert choose_shards(own, own) == ShardChoice(held(8), (0, 1, 3), (0, 1, 3))


@given(st.lists(st.booleans(), min_size=2, max_size=8))
def test_shards_are_found_unless_two_neighbours_are_lost(alive: list[bool]) -> None:
    holdings = [[held(9), held(8)] if living else [] for living in alive]
    choice = choose_shards(holdings, holdings)
    gone = any(not living and not alive[(rank + 1) % len(alive)] for rank, living in enumerate(alive))
    assert (choice is None) == gone
