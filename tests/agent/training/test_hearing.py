"""A hearing: all suspects are judged first, and a verdict that ends the job is said last, if it still stands."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agent.training.computation import Computation
from agent.training.gate import Decision, Outcome
from agent.training.hearing import Hearing, Told, unless_spread
from agent.training.held import Held, Member
from agent.training.reduction import Reduction
from agent.training.replay import Judged
from agent.training.strays import GIVEN, Explained, Stray, alarm_of
from diagnostics.health import Verdict
from diagnostics.verify.between import Handed, Summed
from diagnostics.verify.votes import Ruling


def ruling(verdict: Verdict, rank: int, recurrent: bool = False) -> Ruling:
    blamed = f"n{rank}" if verdict is Verdict.CORRUPT else None
    return Ruling(verdict, blamed, blamed, recurrent=recurrent, needs=None, reason=f"of rank {rank}")


QUIET = Computation(0.0, 9.0, True, (), 1, torch.zeros(0, 0, dtype=torch.int64), 0)


class Court:
    """A replayer whose verdicts are known, and what was asked of it, in order."""

    members = tuple(Member(f"n{rank}", f"cpu-n{rank}", rank) for rank in range(3))

    def __init__(self, verdicts: dict[int, Verdict], recurrent: tuple[int, ...] = ()) -> None:
        self.verdicts = verdicts
        self.recurrent = recurrent
        self.order: list[tuple[Any, ...]] = []
        self.reason = ""

    def judge(self, held: Held, suspect: int) -> Judged:
        self.order.append(("judged", suspect))
        return Judged(suspect, (), ruling(self.verdicts[suspect], suspect, suspect in self.recurrent))

    def alarm(self, held: Held, suspect: int, votes: Any, needs_third: bool) -> None:
        self.order.append(("alarmed", suspect, *held.computation.alarms))
        self.reason = held.reason

    def publish(self, held: Held, judged: Judged) -> None:
        self.order.append(("published", judged.suspect, judged.ruling.verdict))


class Chorus:
    """A group whose ranks all say the same."""

    rank = 0

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * 8


class Discord(Chorus):
    """One of ranks whose copies of the sum differ."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [replace(value, copy=rank) if isinstance(value, Told) else value for rank in range(3)]


class Silent:
    """A daemon that hears nothing."""

    @contextmanager
    def span(self, name: str, parent: str, **attributes: Any) -> Iterator[str]:
        yield f"{parent}/{name}"


def heard(verdicts: dict[int, Verdict], recurrent: tuple[int, ...] = ()) -> tuple[Court, list[Judged]]:
    court = Court(verdicts, recurrent)
    hearing = Hearing(court, Chorus(), Silent())  # type: ignore[arg-type]
    held = Held(1, 5, 1, QUIET, "digest", None)  # type: ignore[arg-type]
    _, found = hearing.hear(held, Outcome(Decision.REPLAY, "sensor alarm", suspects=tuple(verdicts)))
    return court, found


def test_a_suspect_whose_software_is_blamed_does_not_keep_the_next_from_being_judged() -> None:
    court, found = heard({0: Verdict.SOFTWARE, 2: Verdict.CORRUPT})
    assert court.order == [
        ("judged", 0),
        ("judged", 2),
        ("published", 2, Verdict.CORRUPT),
        ("published", 0, Verdict.UNDECIDED),
    ]
    assert [judged.ruling.verdict for judged in found] == [Verdict.UNDECIDED, Verdict.CORRUPT]
    assert "n2 corrupted the same step" in found[0].ruling.reason


def test_no_verdict_is_said_before_all_are_judged_and_what_ends_most_is_said_last() -> None:
    """The first one may have the workers stopped: what is not said by then is never said."""
    verdicts = {0: Verdict.UNDECIDED, 1: Verdict.CORRUPT, 2: Verdict.FALSE_ALARM, 3: Verdict.CORRUPT}
    court, found = heard(verdicts, recurrent=(1,))
    assert [entry[0] for entry in court.order] == ["judged"] * 4 + ["published"] * 4
    assert [entry[1] for entry in court.order if entry[0] == "published"] == [2, 3, 1, 0]
    assert [judged.suspect for judged in found] == [0, 1, 2, 3]


def test_software_stands_where_no_device_is_to_blame() -> None:
    court, found = heard({0: Verdict.SOFTWARE, 2: Verdict.FALSE_ALARM})
    assert court.order[-1] == ("published", 0, Verdict.SOFTWARE)
    assert [judged.ruling.verdict for judged in found] == [Verdict.SOFTWARE, Verdict.FALSE_ALARM]


@given(st.lists(st.sampled_from(Verdict), min_size=1, max_size=5))
def test_whatever_the_verdicts_all_are_published_once_and_only_software_changes(verdicts: list[Verdict]) -> None:
    court, found = heard(dict(enumerate(verdicts)))
    published = sorted(entry[1] for entry in court.order if entry[0] == "published")
    assert published == list(range(len(verdicts)))
    for verdict, judged in zip(verdicts, found, strict=True):
        softened = verdict is Verdict.SOFTWARE and Verdict.CORRUPT in verdicts
        assert judged.ruling.verdict is (Verdict.UNDECIDED if softened else verdict)


@pytest.mark.parametrize("verdict", [v for v in Verdict if v is not Verdict.CORRUPT])
def test_without_a_corrupt_device_nothing_changes(verdict: Verdict) -> None:
    judged = [Judged(1, (), ruling(verdict, 1))]
    assert unless_spread(judged) == judged


def test_who_gave_a_piece_otherwise_than_announced_is_blamed_with_the_alarm_of_the_rank_that_got_it() -> None:
    court, stray = Court({}), Stray("gradient", GIVEN, 2, 0, 0, 6)
    explained = Explained(alarm_of(stray), Summed(GIVEN, Handed(2, 0, 5, 6, 6, 6, alone=False)))
    held = Held(1, 5, 1, QUIET, "", None, reduction=Reduction(strays=(stray,)), sums=(explained,))  # type: ignore[arg-type]
    hearing = Hearing(court, Chorus(), Silent())  # type: ignore[arg-type]
    _, found = hearing.hear(held, Outcome(Decision.REPLAY, "sensor alarm", suspects=(0,)))
    assert court.order == [("alarmed", 2, alarm_of(stray)), ("published", 2, Verdict.CORRUPT)]
    assert [(judged.suspect, judged.ruling.blamed_node) for judged in found] == [(2, "n2")]


class Mixed(Chorus):
    """Rank 2 alarms by its own sensors, and what it gave rank 0 is not what it announced."""

    def gather_objects(self, value: Any) -> list[Any]:
        if not isinstance(value, Told):
            return [value] * 3
        return [replace(value, sensors=rank == 2, strays=rank == 0) for rank in range(3)]


def test_a_rank_that_is_heard_for_its_sensors_has_no_second_verdict_by_the_sum() -> None:
    court, stray = Court({2: Verdict.CORRUPT}), Stray("gradient", GIVEN, 2, 0, 0, 6)
    explained = Explained(alarm_of(stray), Summed(GIVEN, Handed(2, 0, 5, 6, 6, 6, alone=False)))
    held = Held(1, 5, 1, QUIET, "", None, reduction=Reduction(strays=(stray,)), sums=(explained,))  # type: ignore[arg-type]
    hearing = Hearing(court, Mixed(), Silent())  # type: ignore[arg-type]
    hearing.hear(held, Outcome(Decision.REPLAY, "sensor alarm", suspects=(0, 2)))
    assert court.order == [("judged", 2), ("published", 2, Verdict.CORRUPT)]


def test_copies_that_differ_though_all_else_compares_are_nobodys() -> None:
    court = Court({})
    held = Held(1, 5, 1, QUIET, "", None)  # type: ignore[arg-type]
    hearing = Hearing(court, Discord(), Silent())  # type: ignore[arg-type]
    _, found = hearing.hear(held, Outcome(Decision.REPLAY, "copies differ", suspects=(0, 1, 2)))
    assert [(judged.suspect, judged.ruling.verdict) for judged in found] == [(0, Verdict.UNDECIDED)]
    assert "copies of the sum differ" in found[0].ruling.reason
    assert court.reason == "copies differ"
