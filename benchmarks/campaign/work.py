"""What a shard does with a fault's number: sets up the bench of its precision, and tries it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.campaign.bench import Bench
from benchmarks.campaign.draw import BLOCK, PRECISIONS, placed
from benchmarks.campaign.pool import Block
from benchmarks.campaign.trial import Trials


@dataclass(frozen=True)
class Plan:
    """What a campaign is. points: steps of training done where faults strike; weights and data are the seed's.

    again: the guard's share of operators without an identity that are run again.
    """

    seed: int
    points: tuple[int, ...]
    cache: Path
    sensors: bool = True
    again: float = 1.0

    def bench(self, precision: str) -> Bench:
        """Set up one precision: train to the points, measure the clean steps there."""
        return Bench(precision, self.seed, self.points, self.cache, self.sensors, again=self.again)


class Striking:
    """Tries faults; keeps the bench of one precision."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._precision = ""
        self._trials: Trials | None = None

    def line(self, block: Block, index: int) -> dict[str, Any]:
        """The record of fault number `index`."""
        precision, point = placed(index, len(self._plan.points))
        if self._trials is None or self._precision != precision:
            self._trials = None  # two benches need not lie in memory together
            self._trials, self._precision = Trials(self._plan.bench(precision), self._plan.seed), precision
        return self._trials.run(index, point)


def blocks_of(faults: int) -> list[Block]:
    """So many faults in blocks, those of one precision together, so that a shard seldom sets up another."""
    blocks = []
    for number, start in enumerate(range(0, faults, BLOCK)):
        indices = tuple(range(start, min(start + BLOCK, faults)))
        blocks.append(Block(number, placed(start, 1)[0], indices))
    return sorted(blocks, key=lambda block: (PRECISIONS.index(block.place), block.number))


def lost(block: Block, index: int) -> dict[str, Any]:
    """The record of a fault that ended its process: nothing was committed, and nobody says where it struck."""
    return {
        "index": index,
        "precision": block.place,
        "operation": "unknown",
        "model": "unknown",
        "stopped": True,
        "masked": False,
        "harmful": False,
        "harms_state": False,
        "caught": True,
        "before_commit": True,
        "by": "death",
        "sensors": [],
        "recurrent": False,
        "above": None,
        "auditable": True,
    }
