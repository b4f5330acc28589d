"""A step's exchanges on record: replayed without another rank, compared with what was sent, dated by the checks."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agent.training.collective import PeerLost
from agent.training.held import Held
from agent.training.journal import Deviation, Journal, Wire
from agent.training.replay import Redone
from diagnostics.health import Verdict
from diagnostics.verify.votes import Role, Vote, decide

NOT_FINITE: tuple[tuple[Role, str], ...] = (("original", "n0"), ("suspect", "n0"), ("peer", "n1"))


class Doubling:
    """Another rank that answers with twice what it got."""

    world = 1

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return rows * 2


class Lost:
    """Another rank that is gone."""

    world = 1

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        raise RuntimeError("Connection closed by peer")


def step(wire: Wire, journal: Journal, start: float = 1.0) -> Tensor:
    checks = iter(range(10, 100, 10))
    journal.begin(lambda: next(checks))
    rows = torch.full((3, 2), start)
    for _ in range(3):
        rows = wire.exchange(rows, [3], [3]) + 1
    return rows


def test_a_replay_gives_the_same_without_the_other_rank() -> None:
    journal = Journal()
    live = step(Wire(journal, 1, Doubling()), journal)
    record = journal.record()
    alone = Journal()
    with alone.replaying(record):
        assert torch.equal(step(Wire(alone, 1), alone), live)


def test_a_replay_that_sends_something_else_stops_there_and_two_of_them_agree() -> None:
    journal = Journal()
    wire = Wire(journal, 1, Doubling())
    step(wire, journal)
    record = journal.record()
    found = []
    for start in (1.5, 1.5, 1.75):
        alone = Journal()
        with pytest.raises(Deviation, match="exchange 0") as raised, alone.replaying(record):
            step(Wire(alone, 1), alone, start)
        found.append(raised.value.digest)
    assert found[0] == found[1] != found[2]


def test_the_same_deviation_at_another_exchange_is_another() -> None:
    assert Deviation(0, 5).digest != Deviation(1, 5).digest


def test_rows_that_do_not_fit_the_record_deviate() -> None:
    journal = Journal()
    step(Wire(journal, 1, Doubling()), journal)
    alone = Journal()
    alone.begin(int)
    with alone.replaying(journal.record()):
        wire = Wire(alone, 1)
        with pytest.raises(Deviation):
            wire.exchange(torch.ones(3, 2), [3], [4])


def test_a_replay_leaves_the_record_as_it_was() -> None:
    journal = Journal()
    wire = Wire(journal, 1, Doubling())
    step(wire, journal)
    record = journal.record()
    with journal.replaying(record):
        step(wire, journal)
    again = journal.record()
    assert [p.sent for p in again] == [p.sent for p in record]


def test_the_clock_counts_exchanges_before_a_check() -> None:
    """Exchanges after 10, 20 and 30 checks: check 9 knows of none, checks 10 to 19 of the first."""
    journal = Journal()
    step(Wire(journal, 1, Doubling()), journal)
    assert [journal.clock(check) for check in (0, 9, 10, 19, 20, 30, 99)] == [0, 0, 1, 1, 2, 3, 3]


def test_a_lost_rank_is_reported_as_one() -> None:
    journal = Journal()
    with pytest.raises(PeerLost, match="Connection closed"):
        step(Wire(journal, 1, Lost()), journal)
    with pytest.raises(PeerLost, match="not in this group"):
        step(Wire(journal, 1), journal)


def test_agreement_on_what_is_not_finite_is_settled_by_sending_again() -> None:
    votes = [Vote(role, node, node, 1, "d", True, False) for role, node in NOT_FINITE]
    ruling = decide(votes)
    assert ruling.verdict is Verdict.SOFTWARE
    redone = Redone()
    softened = redone.unless_first(held(1), 0, ruling)
    assert (softened.verdict, softened.blamed_node) == (Verdict.UNDECIDED, None)
    assert "redone" in softened.reason
    assert redone.unless_first(held(2), 0, ruling) is ruling
    false_alarm = decide([replace(vote, finite=True) for vote in votes])
    assert Redone().unless_first(held(1), 0, false_alarm) is false_alarm


@pytest.mark.parametrize(
    ("suspect", "step", "attempt", "first", "again"),
    [
        (0, 5, 3, 1, True),  # whatever came between
        (1, 5, 3, 1, False),  # another rank's rows
        (0, 6, 1, 1, False),
        (0, 5, 4, 4, False),  # the step was rolled back, and is taken again
    ],
)
def test_rows_are_sent_again_once_in_each_try_and_not_by_the_number_of_the_attempt(
    suspect: int, step: int, attempt: int, first: int, again: bool
) -> None:
    """The attempt in which they are bad first need not be the first one."""
    ruling = decide([Vote(role, node, node, 1, "d", True, False) for role, node in NOT_FINITE])
    redone = Redone()
    assert redone.unless_first(held(2), 0, ruling).verdict is Verdict.UNDECIDED
    assert (redone.unless_first(held(attempt, step, first), suspect, ruling) is ruling) is again


def held(attempt: int, step: int = 5, first: int = 1) -> Held:
    return Held(1, step, attempt, None, "", None, first=first)  # type: ignore[arg-type]
