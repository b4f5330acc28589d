"""Clean training under the sensors, run after run from new initial weights: every alarm in it is a false one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._figures import Figure
from benchmarks.campaign.bench import Bench, Computed
from benchmarks.campaign.draw import PRECISIONS
from benchmarks.campaign.intervals import wilson
from benchmarks.campaign.pool import Block
from benchmarks.campaign.verdict import by_votes

#: Steps of a run: the warm-up (10 steps), in which gradients change most, and what follows.
STEPS = 120
QUICK_STEPS = 3
BOUND = "alarms per 1e6 clean checks, 95 % upper bound"


@dataclass(frozen=True)
class Runs:
    """What is run. seed: of the first run; every run has another one."""

    seed: int
    steps: int
    cache: Path
    tolerance_scale: float = 1.0


class Training:
    """Does whole runs; a block is one."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def line(self, block: Block, index: int) -> dict[str, Any]:
        """One run from its first step on: how many checks, and what alarmed.

        `verdicts` counts alarmed steps that the product's rules, given their repetition, call anything but FALSE_ALARM.
        """
        runs = self._runs
        bench = Bench(block.place, runs.seed + index, (), runs.cache, tolerance_scale=runs.tolerance_scale)
        state = bench.beginning()
        checks, alarms, verdicts, largest, first = 0, 0, 0, 0.0, ""
        for step in range(1, runs.steps + 1):
            before = state.words.clone()
            computed = bench.advance(state, step)
            checks += computed.checks
            alarms += len(computed.alarms)
            largest = max(largest, computed.reading) if not math.isnan(computed.reading) else math.inf
            if computed.alarms:
                first = first or f"step {step}: {computed.alarms[0]}"
                after = state.words.clone()
                state.words.copy_(before)
                again = bench.advance(state, step)
                verdicts += by_votes(computed, again.digest, partial(_itself, again))["verdict"] != "FALSE_ALARM"
                state.words.copy_(after)
        found = {"index": index, "precision": block.place, "seed": runs.seed + index, "steps": runs.steps}
        return found | {
            "checks": checks,
            "alarms": alarms,
            "verdicts": verdicts,
            "largest": float(f"{largest:.3g}"),
            "first": first,
        }


def _itself(again: Computed) -> Computed:
    return again


def run_blocks(first: int, precisions: Iterable[str]) -> list[Block]:
    """Runs number first, first + 1, ..., one in each of these precisions."""
    return [Block(n, precision, (n,)) for n, precision in enumerate(precisions, first)]


def lost_run(block: Block, index: int) -> dict[str, Any]:
    """Clean training does not end its process. Raises RuntimeError: that is no figure but a defect."""
    raise RuntimeError(f"clean run {index} in {block.place} ended its process twice")


def _bound(name: str, checks: int, alarms: int) -> Figure:
    return Figure(name, 1e6 * wilson(alarms, checks)[1], "alarms", "lower", 1.0, samples=checks)


def clean_figures(lines: Iterable[Mapping[str, Any]]) -> Iterator[Figure]:
    """Alarms by precision, and what their number proves of each, and of all checks together."""
    found = list(lines)
    for precision in PRECISIONS:
        part = [line for line in found if line["precision"] == precision]
        if part:
            name, checks = f"clean training, {precision}", sum(line["checks"] for line in part)
            coverage = f"{len(part)} runs from the first step on"
            alarms = sum(line["alarms"] for line in part)
            yield Figure(f"alarms, {name}", alarms, "alarms", "lower", 0.0, coverage=coverage, samples=checks)
            largest = max(line["largest"] for line in part)
            yield Figure(f"largest reading, {name}", largest, "tolerances", "lower", coverage=coverage, samples=checks)
            yield _bound(f"{BOUND}, {precision}", checks, alarms)
    checks, alarms = (sum(line[key] for line in found) for key in ("checks", "alarms"))
    yield _bound(BOUND, checks, alarms)
    verdicts = sum(line["verdicts"] for line in found)
    yield Figure("false verdicts on clean training", verdicts, "verdicts", "lower", 0.0, samples=checks)
