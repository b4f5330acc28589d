"""Who is wrong when ranks that should make the same state do not: by what each sees when it looks once more."""

from hypothesis import given
from hypothesis import strategies as st

from agent.training.agreement import Again, Hashes, findings
from diagnostics.health import Verdict
from diagnostics.verify.between import Changed, Repeat, changed_ruling, update_ruling
from diagnostics.verify.votes import Ruling

KNOWN = Hashes(state=11, summed=22)
TRUTH, WRONG = 33, 44
WORLDS = st.integers(2, 6)


def members(world: int) -> list[tuple[str, str]]:
    return [(f"n{rank}", f"gpu-n{rank}") for rank in range(world)]


def rulings(first: list[int], seen: list[Again]) -> list[Ruling]:
    found = []
    for finding in findings(first, KNOWN, seen):
        if isinstance(finding.evidence, Changed):
            found.append(changed_ruling(finding.evidence, members(len(first))))
        else:
            assert isinstance(finding.evidence, Repeat)
            found.append(update_ruling(finding.evidence, members(len(first))))
    return found


@given(WORLDS, st.data())
def test_one_rank_that_erred_once_is_named(world: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, world - 1))
    first = [WRONG if rank == bad else TRUTH for rank in range(world)]
    (ruling,) = rulings(first, [Again(KNOWN, TRUTH)] * world)
    assert (ruling.verdict, ruling.blamed_node, ruling.recurrent) == (Verdict.CORRUPT, f"n{bad}", False)


@given(WORLDS, st.data())
def test_one_rank_that_errs_again_is_named_where_there_is_a_majority(world: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, world - 1))
    first = [WRONG if rank == bad else TRUTH for rank in range(world)]
    (ruling,) = rulings(first, [Again(KNOWN, made) for made in first])
    if world == 2:
        assert (ruling.verdict, ruling.blamed_node) == (Verdict.UNDECIDED, None)
    else:
        assert (ruling.verdict, ruling.blamed_node, ruling.recurrent) == (Verdict.CORRUPT, f"n{bad}", True)


def test_of_two_the_one_that_contradicts_itself_is_named() -> None:
    """A bad lane that meets other elements the second time."""
    for bad in (0, 1):
        first = [WRONG if rank == bad else TRUTH for rank in range(2)]
        (ruling,) = rulings(first, [Again(KNOWN, WRONG + 1 if rank == bad else TRUTH) for rank in range(2)])
        assert (ruling.verdict, ruling.blamed_node, ruling.recurrent) == (Verdict.CORRUPT, f"n{bad}", False)


@given(WORLDS, st.data())
def test_memory_that_changed_is_its_own_devices_and_nobody_votes_on_updates(world: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, world - 1))
    what = data.draw(st.sampled_from(["state", "sum"]))
    now = Hashes(99, KNOWN.summed) if what == "state" else Hashes(KNOWN.state, 99)
    first = [WRONG if rank == bad else TRUTH for rank in range(world)]
    seen = [Again(now if rank == bad else KNOWN, made) for rank, made in enumerate(first)]
    (ruling,) = rulings(first, seen)
    assert (ruling.verdict, ruling.blamed_node) == (Verdict.CORRUPT, f"n{bad}")
    assert f"the {what} of n{bad}" in ruling.reason


def test_several_ranks_are_judged_each() -> None:
    first = [TRUTH, WRONG, TRUTH, WRONG + 1, TRUTH]
    assert [r.blamed_node for r in rulings(first, [Again(KNOWN, TRUTH)] * 5)] == ["n1", "n3"]
    both = rulings([WRONG, WRONG + 1], [Again(KNOWN, TRUTH)] * 2)
    assert [ruling.blamed_node for ruling in both] == ["n0", "n1"]
