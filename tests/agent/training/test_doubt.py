"""States in doubt: what is known of them before the ranks go back is said before, the rest after the redo, once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from agent.slots import ShardDigests, SlotRecord
from agent.training.doubt import Doubt
from agent.training.gate import Row
from agent.training.held import Member
from agent.training.sources import Tell
from agent.training.transaction import Altered, StateLost

WORLD = 3
OWN = [10, 20, 30]  # what each rank's shard hashed to when it was committed


class Ranks:
    """A group in which rank 0 is asked; what the others answer is given."""

    def __init__(self, now: Sequence[int], redone: Sequence[int], rank: int = 0) -> None:
        self.rank, self.world = rank, WORLD
        self.now, self.redone = now, redone

    def gather_objects(self, value: Any) -> list[Any]:
        answers = list(zip(OWN, self.now, strict=True))
        assert value == answers[self.rank]
        return answers

    def gather(self, row: Sequence[int]) -> list[list[int]]:
        answers = [[int(now != redone)] for now, redone in zip(self.now, self.redone, strict=True)]
        assert list(row) == answers[self.rank]
        return answers


class Past:
    """A recovery that finds the step before, or does not."""

    def __init__(self, lost: bool, altered: Sequence[Sequence[Altered]]) -> None:
        self.lost = lost
        self.altered = altered

    def roll_back(self, tell: Tell) -> None:
        tell(self.altered)
        if self.lost:
            raise StateLost("no rank holds step 4 unharmed")


class Reports:
    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    @contextmanager
    def span(self, name: str, parent: str, **attributes: Any) -> Iterator[str]:
        yield parent

    def report(self, kind: str, body: dict[str, Any], urgent: bool = False) -> None:
        assert (kind, urgent) == ("digest_disagreement", True)
        self.told.append(body)


def doubted(
    now: Sequence[int],
    redone: Sequence[int],
    digests: Sequence[int],
    *,
    rank: int = 0,
    lost: bool = False,
    altered: Sequence[Sequence[Altered]] = (),
) -> list[dict[str, Any]]:
    """What `rank` says of step 5, of which each rank's shard now hashes to `now` and, redone, to `redone`."""
    reports, group = Reports(), Ranks(now, redone, rank)
    members = [Member(f"n{number}", f"cpu-n{number}", 1) for number in range(WORLD)]
    doubt = Doubt("job", 1, group, members, Past(lost, altered), reports)  # type: ignore[arg-type]
    rows = [
        Row(1, 6, 1, False, 0.0, 0.0, 5, digest, 0.0, (), intact=now[number] == OWN[number])
        for number, digest in enumerate(digests)
    ]
    record = SlotRecord(1, 5, digests[rank], 0, ShardDigests(OWN[rank], 0))
    if lost:
        with pytest.raises(StateLost):
            doubt.roll_back(record, rows, now[rank], "trace")
        return reports.told
    doubt.roll_back(record, rows, now[rank], "trace")
    doubt.settle(SlotRecord(1, 5, 60, 0, ShardDigests(redone[rank], 0)))
    return reports.told


ALIKE, APART = [60, 60, 60], [60, 61, 60]


@pytest.mark.parametrize("lost", [True, False])
def test_memory_that_changed_is_blamed_once_though_there_may_be_nothing_to_go_back_to(lost: bool) -> None:
    (told,) = doubted([10, 21, 30], OWN, ALIKE, lost=lost)
    assert (told["step"], told["blamed_rank"], told["times"]) == (5, 1, 1)
    assert set(told["digests"].values()) == {f"{60:016x}"}
    assert told["reason"] == f"in memory: the state of n1 hashes to {21:016x}, it was {20:016x}"
    assert doubted([10, 21, 30], OWN, ALIKE, rank=1, lost=lost) == []  # the blamed rank says nothing of itself


@pytest.mark.parametrize("lost", [True, False])
def test_whose_state_differs_is_known_after_the_redo_only(lost: bool) -> None:
    """The negative control: all memories hash to their records."""
    told = doubted(OWN, [10, 22, 30], APART, lost=lost)
    assert [(body["blamed_rank"], "the redo gave" in body["reason"]) for body in told] == ([] if lost else [(1, True)])


def test_the_redo_completes_what_is_known() -> None:
    told = doubted([10, 21, 30], [10, 20, 33], ALIKE)
    assert [body["blamed_rank"] for body in told] == [1, 2]
    told = doubted([10, 21, 31], OWN, ALIKE)
    assert [body["blamed_rank"] for body in told] == [1, 2]


def test_memory_of_all_ranks_that_changed_is_told_by_the_first() -> None:
    assert [body["blamed_rank"] for body in doubted([11, 21, 31], OWN, ALIKE)] == [0, 1, 2]


def altered(rank: int, *steps: int) -> list[list[Altered]]:
    """Slots of `rank` with these steps, which hash to the step now."""
    slots = [Altered(SlotRecord(1, step, 40, 0, ShardDigests(OWN[rank], 0)), step) for step in steps]
    return [slots if number == rank else [] for number in range(WORLD)]


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_of_a_rank_that_is_found_when_a_state_is_looked_for_is_reported_once(rank: int) -> None:
    """Of both slots, the newest; by a rank whose memory did not change."""
    reports = Reports()
    members = [Member(f"n{number}", f"cpu-n{number}", 1) for number in range(WORLD)]
    doubt = Doubt("job", 2, Ranks(OWN, OWN, rank), members, Past(False, ()), reports)  # type: ignore[arg-type]
    doubt.altered(altered(0, 4, 5))
    doubt.altered(altered(0))
    assert len(reports.told) == rank
    for body in reports.told:
        assert (body["step"], body["blamed_rank"], body["times"]) == (5, 0, 1)
        assert body["digests"] == {0: f"{40:016x}"}
        assert f"the state of n0 hashes to {5:016x}, it was {10:016x}, when a state was looked for" in body["reason"]


@pytest.mark.parametrize(("rank", "found"), [(1, [(5, 1)]), (2, [(4, 2), (5, 1)])])
def test_what_a_wrong_state_was_made_of_is_no_fault_beside_it(rank: int, found: list[tuple[int, int]]) -> None:
    """The state of rank 1 is another one, for its memory changed before; of rank 2 nobody would know."""
    told = doubted(OWN, [10, 22, 30], APART, altered=altered(rank, 4))
    assert [(body["step"], body["blamed_rank"]) for body in told] == found
