"""A device that is wrong now and then: each operator's result has one bit flipped with probability q.

Steps in which nothing is flipped are clean, and clean steps raise no alarm (benchmarks/false_alarms.py), so only steps
in which something is flipped are run. With P(q) = 1 - (1 - q)^n the chance of such a step among n operators, and c the
measured share of them that is caught, the chance to be caught within N steps is 1 - (1 - P c)^N.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks._figures import Figure
from benchmarks.campaign.bench import Bench
from benchmarks.campaign.draw import PRECISIONS
from benchmarks.campaign.intervals import wilson
from benchmarks.campaign.pool import Block
from benchmarks.campaign.work import Plan
from diagnostics.faults.models import Fault
from diagnostics.faults.sites import Census, Site
from diagnostics.faults.strike import Blow, Strike

#: Per operator call. What AEGIS saw of a bad GPU was 2e-9 a product; below 1e-6 hardly a step has two flips.
RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
#: Steps within which a device should be found: at once, in minutes, within a day.
WITHIN = (1, 100, 10_000)


def curve_blocks(trials: int) -> list[Block]:
    """One block for each precision and q; indices count through all of them."""
    blocks = []
    for place, precision in enumerate(PRECISIONS):
        for which in range(len(RATES)):
            number = place * len(RATES) + which
            # Indices leave room, so that more trials are the same ones and some more.
            indices = tuple(range(number * 1_000_000, number * 1_000_000 + trials))
            blocks.append(Block(number, precision, indices))
    return blocks


class Curve:
    """Runs struck steps; keeps the bench of one precision."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._precision = ""
        self._bench: Bench | None = None
        self._sites: list[list[Site]] = []

    def line(self, block: Block, index: int) -> dict[str, Any]:
        """One step in which something is flipped: how many blows, whether it is caught, whether an audit could."""
        bench = self._bench_of(block.place)
        rate, rng = RATES[block.number % len(RATES)], random.Random(f"{self._plan.seed}/{index}")
        number = index % len(bench.points)
        point, sites = bench.points[number], self._sites[number]
        blows = {}
        for at in struck(len(sites), rate, rng):
            site = sites[at]
            blows[site.number] = Blow(site.operator, Fault("bitflip", rng.getrandbits(62)))
        computed = bench.compute(point.start, index, [Strike(blows, lambda *_: None, strict=False)])
        return {
            "index": index,
            "precision": block.place,
            "rate": rate,
            "operators": len(sites),
            "blows": len(blows),
            "caught": bool(computed.alarms or computed.error),
            "auditable": bool(computed.error) or computed.digest != point.gradients,
        }

    def _bench_of(self, precision: str) -> Bench:
        if self._bench is None or self._precision != precision:
            self._bench = None
            self._bench, self._precision = self._plan.bench(precision), precision
            self._sites = [_sites(self._bench, number) for number in range(len(self._bench.points))]
        return self._bench


def _sites(bench: Bench, number: int) -> list[Site]:
    """The operators of a clean step whose (first) result is floating point."""
    census = Census(bench.model)
    bench.compute(bench.points[number].start, 0, [census])
    return [site for site in census.sites if site.results[0].dtype.is_floating_point]


def struck(n: int, rate: float, rng: random.Random) -> list[int]:
    """Which of n operators are struck, each with chance `rate`, given that one is at least: ascending."""
    found = []
    at = _gap(rate, rng, 1 - (1 - rate) ** n)
    while at < n:
        found.append(at)
        at += 1 + _gap(rate, rng, 1.0)
    return found


def _gap(rate: float, rng: random.Random, within: float) -> int:
    """Operators that are spared before the next is struck, given that it is within the chance `within`."""
    return int(math.log1p(-rng.random() * within) / math.log1p(-rate))


def chance(rate: float, operators: float, share: float, steps: int) -> float:
    """1 - (1 - P c)^steps, for c = `share`; exact where P c is tiny."""
    a_step = -math.expm1(operators * math.log1p(-rate)) * share
    return 1.0 if a_step >= 1 else -math.expm1(steps * math.log1p(-a_step))


def curve_figures(lines: Iterable[Mapping[str, Any]], audit: float) -> Iterator[Figure]:
    """By precision and q: what share of struck steps is caught, and the chance within so many steps, audits apart."""
    found = list(lines)
    for precision in PRECISIONS:
        for rate in RATES:
            part = [line for line in found if line["precision"] == precision and line["rate"] == rate]
            if part:
                yield from _at(f"q {rate:g}, {precision}", rate, part, audit)


def _at(name: str, rate: float, part: list[Mapping[str, Any]], audit: float) -> Iterator[Figure]:
    operators = sum(line["operators"] for line in part) / len(part)
    seen = sum(line["caught"] for line in part)
    differing = sum(line["auditable"] for line in part)
    low, high = wilson(seen, len(part))
    by_audit = audit * differing / len(part)
    interval = f"95 % interval {low:.4f} to {high:.4f}"
    title = f"caught, of struck steps, {name}"
    yield Figure(title, seen / len(part), "share", "higher", coverage=interval, samples=len(part))
    for steps in WITHIN:
        least, most = (chance(rate, operators, end, steps) for end in (low, high))
        value = chance(rate, operators, seen / len(part), steps)
        coverage = f"95 % interval {least:.4g} to {most:.4g}"
        title = f"caught by sensors within {steps:,} steps, {name}"
        yield Figure(title, value, "probability", "higher", coverage=coverage, samples=len(part))
        title = f"caught by audits within {steps:,} steps, {name}"
        coverage = f"a spare audits a step with {audit:g}"
        value = chance(rate, operators, by_audit, steps)
        yield Figure(title, value, "probability", "higher", coverage=coverage, samples=len(part))
