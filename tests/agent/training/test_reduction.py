"""The norm that all ranks clip by: whoever takes his part of it wrongly once is found out."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agent.training.reduction import Reduction, squared_norm
from agent.training.strays import ADDED, Stray
from diagnostics.health import Verdict
from diagnostics.verify.between import Handed, Summed, sum_rulings

PARTS = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]


class BadNorm(TorchDispatchMode):
    """Adds one to what the `at`-th norm comes out as."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "vector_norm" not in str(func):
            return out
        self._left -= 1
        return out + 1 if self._left == -1 else out


def test_a_clean_norm_is_no_stray() -> None:
    assert squared_norm(PARTS, 3, checked=True) == (25.0, ())
    unknown, strays = squared_norm([torch.tensor([math.nan])], 3, checked=True)
    assert math.isnan(unknown)
    assert strays == ()


@pytest.mark.parametrize("at", range(4))
def test_a_norm_that_comes_out_otherwise_once_is_its_ranks(at: int) -> None:
    with BadNorm(at):
        norm, (stray,) = squared_norm(PARTS, 3, checked=True)
    assert stray == Stray("norm", ADDED, 3, 3, 0, 0)
    (alarm,) = Reduction(norm, strays=(stray,)).alarms
    assert (alarm.sensor, alarm.module, alarm.operation, alarm.reading) == ("reduction", "norm", "add", math.inf)
    members = [(f"n{rank}", f"cpu-n{rank}") for rank in range(4)]
    ((rank, ruling),) = sum_rulings([Summed(ADDED, Handed(3, 3, 0, 0, 0, 0, alone=False))], members)
    assert (rank, ruling.verdict, ruling.blamed_node) == (3, Verdict.CORRUPT, "n3")


def test_unchecked_it_is_believed() -> None:
    """The negative control."""
    with BadNorm(0):
        assert squared_norm(PARTS, 3, checked=False) == (32.0, ())
