"""What the checks between ranks add to a computation: readings, alarms in their order, when they came, lost tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agent.training.computation import Computation, astray, with_seals, with_sums
from agent.training.reduction import Reduction
from agent.training.seals import Garbled
from agent.training.strays import GIVEN, Stray
from diagnostics.health import Alarm

PIECE = Garbled(4, 2, 3, 11, 12)
SEEN = Alarm("gemm", "layers.1", "mm", "fprop", 5.0, "row 1")


def computed(clock: int | None = None) -> Computation:
    """Clean, or with an alarm after so many exchanges."""
    alarm = clock is not None
    alarms = (SEEN,) if alarm else ()
    return Computation(1.0, 5.0 if alarm else 0.2, alarm, alarms, 9, torch.zeros(1, 4), 8, clock=clock or 0)


def test_pieces_that_came_as_they_were_sent_are_counted_only() -> None:
    found = with_seals(computed(), [], 24)
    assert (found.checks, found.alarm, found.reading, found.garbled) == (33, False, 0.2, None)


@pytest.mark.parametrize(
    ("clock", "leads", "first"), [(None, True, "exchange"), (4, False, "gemm"), (5, True, "exchange")]
)
def test_whatever_came_first_leads(clock: int | None, leads: bool, first: str) -> None:
    """Exchange 4 is the fifth: a check that had seen four may not have seen it, one that had seen five has."""
    found = with_seals(computed(clock), [PIECE], 24)
    assert found.alarm
    assert not found.reading <= 1.0
    assert found.alarms[0].sensor == first
    assert len(found.alarms) == (1 if clock is None else 2)
    assert found.garbled == (PIECE if leads else None)
    assert found.clock == (5 if leads else 4)


def test_a_sum_that_alarms_alone_does_so_after_all_exchanges() -> None:
    wrong = Reduction(checks=2, strays=(Stray("dense", GIVEN, 0, 1, 0, 5),))
    found = with_sums(computed(), wrong, 24)
    assert (found.alarm, found.clock, found.reading, found.checks) == (True, 24, math.inf, 11)
    assert [alarm.location for alarm in found.alarms] == ["piece 0, from rank 0 to rank 1"]
    assert with_sums(computed(3), wrong, 24).clock == 3
    assert not with_sums(computed(), Reduction(checks=1), 24).alarm


LAYERS, EXPERTS = 3, 8


def group(seed: int, ep: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Router's counts of each rank of a group, and for each rank and layer the numbers of its experts that it got."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, EXPERTS, (ep, LAYERS, 10, 2), generator=generator)
    counts = [torch.stack([layer.flatten().bincount(minlength=EXPERTS) for layer in rank]) for rank in chosen]
    each = EXPERTS // ep
    served = []
    for rank in range(ep):
        all_of = chosen.transpose(0, 1).flatten(1, 2)
        own = torch.where(all_of // each == rank, all_of % each, -1)
        served.append(list(own))
    return counts, served


@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8]), st.data())
def test_hashes_of_a_group_add_up_to_nothing_unless_a_token_went_astray(
    seed: int, ep: int, data: st.DataObject
) -> None:
    counts, served = group(seed, ep)
    each = EXPERTS // ep

    def total() -> int:
        return sum(astray(counts[r], served[r], range(r * each, (r + 1) * each)) for r in range(ep)) % 2**64

    assert total() == 0
    rank, layer = data.draw(st.integers(0, ep - 1)), data.draw(st.integers(0, LAYERS - 1))
    row = data.draw(st.integers(0, 10 * ep - 1))
    before = int(served[rank][layer][row, 0])
    served[rank][layer][row, 0] = -1 if before >= 0 else 0  # lost, or one too many
    assert total() != 0


def test_without_other_ranks_experts_there_is_nothing_to_compare() -> None:
    assert astray(torch.ones(2, 8, dtype=torch.int64), [], range(8)) == 0
