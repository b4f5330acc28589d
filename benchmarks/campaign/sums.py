"""The sum of both ranks' gradients, as a job without a mesh makes it and checks it before it commits.

The sum, its checks and the ruling are the product's (`agent.training.division`); its ranks are two threads here, and
what they send is copied from the one's memory into the other's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from agent.training.collective import Group, Subgroup
from agent.training.division import Replicated
from agent.training.layout import StateLayout
from agent.training.summing import Cut
from benchmarks.campaign.verdict import PEER, STRUCK
from diagnostics.verify.between import sum_rulings
from diagnostics.verify.votes import Ruling

#: Longer than any thread takes to come to an exchange; whoever waits longer waits for one that has failed.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Hit:
    """What strikes the first rank's memory: its gradient as it leaves, its hashes made; or its copy of the sum."""

    sent: bool
    change: Callable[[Tensor], object]


class Wire:
    """What both threads show each other, in turns."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=PATIENCE_S)
        self._shown: list[Any] = [None, None]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Both ranks' values, in rank order, once both are there."""
        self._shown[rank] = value
        self._barrier.wait()
        return list(self._shown)

    def done(self) -> None:
        """What was shown has been read, and may change."""
        self._barrier.wait()


class Ends(Subgroup):
    """One thread's end: what a sum asks of its ranks. Strikes once the gradient it is given has been hashed."""

    def __init__(self, wire: Wire, rank: int, gradients: Tensor, hit: Hit | None) -> None:
        super().__init__(None, (0, 1), rank)
        self._wire = wire
        self._gradients = gradients
        self._hit = hit
        self._trades = 0
        self._pieces = Cut.of(gradients.numel(), 2).pieces  # traded one by one; then the sums are

    def everybody(self) -> Subgroup:
        """See `Group`."""
        return self

    def gather(self, row: Sequence[int]) -> list[list[int]]:
        """See `Group`."""
        return cast(list[list[int]], self.gather_objects(list(row)))

    def gather_objects(self, value: Any) -> list[Any]:
        """See `Group`."""
        both = self._wire.exchange(self.rank, value)
        self._wire.done()
        return both

    def transpose(self, rows: Tensor) -> Tensor:
        """See `Subgroup`."""
        return torch.stack([given[self.rank] for given in self.gather_objects(rows)])

    def trade(self, give: Sequence[Tensor], take: Sequence[Tensor]) -> None:
        """See `Subgroup`."""
        if self._hit is not None and self._hit.sent and self._trades == 0:
            self._hit.change(self._gradients)
        other = 1 - self.rank
        take[other].copy_(self._wire.exchange(self.rank, give)[other][self.rank])
        self._wire.done()
        if self._hit is not None and not self._hit.sent and self._trades == self._pieces:
            self._hit.change(self._gradients)
        self._trades += 1


def on_sum(layout: StateLayout, struck: Tensor, peer: Tensor, hit: Hit, key: int) -> Ruling | None:
    """The ruling on the sum of both gradients, which are left alone; None where everything compares."""
    wire = Wire()
    gradients = (struck.clone(), peer.clone())
    ends = (Ends(wire, 0, gradients[0], hit), Ends(wire, 1, gradients[1], None))
    with ThreadPoolExecutor(2) as threads:
        rulings = list(threads.map(lambda rank: _ruled(layout, ends[rank], gradients[rank], key), (0, 1)))
    return rulings[0]


def _ruled(layout: StateLayout, end: Ends, gradients: Tensor, key: int) -> Ruling | None:
    division = Replicated(layout, cast(Group, end))
    reduction = division.reduce(gradients, key)
    if not any(end.gather_objects(bool(reduction.strays))):
        return None
    parts = [stray.part for stray in division.explain(reduction)]
    return sum_rulings(parts, [(STRUCK, STRUCK), (PEER, PEER)])[0][1]
