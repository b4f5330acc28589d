"""The norm that all ranks clip by: whoever takes his part of it wrongly once is found out."""

import math

import pytest
import torch
from struck import Struck

from agent.training.reduction import Reduction, squared_norm
from agent.training.strays import ADDED, Stray
from diagnostics.health import Verdict
from diagnostics.verify.between import Handed, Summed, sum_rulings

PARTS = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]


def bad_norm(at: int) -> Struck:
    """The `at`-th norm comes out one too large."""
    return Struck(torch.ops.aten.linalg_vector_norm, lambda out: out.add_(1), at)


def test_a_clean_norm_is_no_stray() -> None:
    assert squared_norm(PARTS, 3, checked=True) == (25.0, ())
    unknown, strays = squared_norm([torch.tensor([math.nan])], 3, checked=True)
    assert math.isnan(unknown)
    assert strays == ()


@pytest.mark.parametrize("at", range(4))
def test_a_norm_that_comes_out_otherwise_once_is_its_ranks(at: int) -> None:
    with bad_norm(at):
        norm, (stray,) = squared_norm(PARTS, 3, checked=True)
    assert stray == Stray("norm", ADDED, 3, 3, 0, 0)
    (alarm,) = Reduction(norm, strays=(stray,)).alarms
    assert (alarm.sensor, alarm.module, alarm.operation, alarm.reading) == ("reduction", "norm", "add", math.inf)
    members = [(f"n{rank}", f"cpu-n{rank}") for rank in range(4)]
    ((rank, ruling),) = sum_rulings([Summed(ADDED, Handed(3, 3, 0, 0, 0, 0, alone=False))], members)
    assert (rank, ruling.verdict, ruling.blamed_node) == (3, Verdict.CORRUPT, "n3")


def test_unchecked_it_is_believed() -> None:
    """The negative control."""
    with bad_norm(0):
        assert squared_norm(PARTS, 3, checked=False) == (32.0, ())
