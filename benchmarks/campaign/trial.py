"""One fault: the struck step under the guard, what would have been committed, and who is blamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agent.training.agreement import Again, Hashes
from benchmarks.campaign.bench import Bench, Computed, Excess, Point
from benchmarks.campaign.draw import Coordinates, Drawing
from benchmarks.campaign.floors import Deviation, Struck, delta_of, deviation
from benchmarks.campaign.sums import Hit, on_sum
from benchmarks.campaign.verdict import by_redo, by_ruling, by_votes, on_states
from diagnostics.faults.models import Damage, damage
from diagnostics.faults.sites import Census
from diagnostics.faults.strike import Blow, SavedFlip, Strike, Triggered
from diagnostics.sensors.digest import digest
from diagnostics.verify.votes import Ruling

#: A committed update is harmful when some tensor's deviates by more than this many natural floors.
HARMFUL = 3.0
_NOTHING = Excess(0.0, "")
#: Faults that may leave the parameters right and a moment wrong, which harms the steps to come.
_OF_STATE = ("optimizer", "state at rest")


@dataclass(slots=True)
class Seen:
    """What the blows changed, as they fell."""

    table: Any
    kernels: tuple[str, ...]
    changed: int = 0
    bit: int | None = None
    deviation: Deviation = field(default_factory=lambda: Deviation(None, None, None))
    blows: int = 0

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], harm: Damage) -> None:
        """A fault model's witness. Of several blows the first describes the fault."""
        self.changed += int(harm.changed.sum())
        self.blows += 1
        if self.blows == 1:
            self.bit = harm.bit
            self.deviation = deviation(Struck(func, args, kwargs, harm, delta_of(harm), self.table, self.kernels))


class Trials:
    """Faults in the steps of one bench."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench = bench
        self.drawings = [self._drawing(number, seed) for number in range(len(bench.points))]

    def run(self, index: int, point: int) -> dict[str, Any]:
        """Fault number `index` at that point: its line of the record."""
        drawn = self.drawings[point].fault(index)
        return {**coordinates(drawn), **_Trial(self.bench, self.bench.points[point], drawn).outcome()}

    def _drawing(self, number: int, seed: int) -> Drawing:
        bench, start = self.bench, self.bench.points[number].start
        step, update = Census(bench.model), Census(bench.model)
        computed = bench.compute(start, 0, [step])
        summed = bench.reduced(start, computed.gradients)
        with update:
            bench.commit(start, summed, computed.counts)
        return Drawing(seed, bench.precision, number, step.sites, update.sites, bench.quantising)


@dataclass(frozen=True, slots=True)
class _Committed:
    """What the rank under test would have committed, and the digests that both ranks bring to the next gate."""

    masked: bool
    excess: Excess  # of the parameters' update
    of_state: Excess  # of parameters and moments
    finite: bool
    ours: int
    peers: int
    ruling: Ruling | None = None  # on the sum of both ranks' gradients, or on what they made of it, if it is wrong
    by: str = "reduction"  # what the ruling is about


class _Trial:
    """One fault, from the blow to the verdict."""

    def __init__(self, bench: Bench, point: Point, drawn: Coordinates) -> None:
        self._bench = bench
        self._point = point
        self._drawn = drawn
        fp8 = drawn.site is not None and drawn.site.module in bench.quantising
        self._seen = Seen(bench.guard.table, ("fp8", "mm") if fp8 else ("mm",))

    def outcome(self) -> dict[str, Any]:
        """The fields of the record that are measured."""
        with ExitStack() as damaged:
            if self._drawn.operation == "state at rest":
                damaged.enter_context(self._flipped())
            computed = self._bench.compute(self._point.start, self._drawn.index, self._below())
            done = self._commit(computed, damaged)
        sensed = bool(computed.alarms or computed.error or not done.finite or done.ruling)
        differs = not sensed and done.ours != done.peers
        found = self._seen.deviation
        judged = done.of_state if self._drawn.operation in _OF_STATE else done.excess
        return {
            "changed": self._seen.changed,
            "bit": self._seen.bit,
            "deviation": found.size,
            "floor": found.floor,
            "above": found.above,
            "stopped": bool(computed.error),
            "masked": done.masked,
            "harmful": judged.ratio > HARMFUL,
            "excess": _short(judged.ratio),
            "worst": judged.tensor,
            "harms_state": done.of_state.ratio > HARMFUL,
            "caught": sensed or differs,
            "before_commit": sensed,
            "by": self._by(computed, done) if sensed else "digest" if differs else "",
            "sensors": sorted({alarm.sensor for alarm in computed.alarms}),
            "named": self._named(computed),
            "auditable": computed.digest != self._point.gradients or bool(computed.error),
            **self._judged(computed, done, sensed),
        }

    def _below(self) -> list[AbstractContextManager[object]]:
        """What corrupts the forward and backward; made anew for each run of the step."""
        drawn = self._drawn
        if drawn.operation == "saved activation":
            return [SavedFlip(drawn.ordinal, drawn.fault, self._seen)]
        if drawn.site is None or drawn.operation == "optimizer":
            return []
        blow = Blow(drawn.site.operator, drawn.fault, drawn.result)
        if drawn.model == "triggered":
            return [Triggered(drawn.site.number, blow, self._seen)]
        return [Strike({drawn.site.number: blow}, self._seen)]

    @contextmanager
    def _flipped(self) -> Iterator[None]:
        """The rank's state with a word changed at rest; put back afterwards."""
        part: Tensor = getattr(self._point.start.state, self._drawn.part)
        harm = damage(part, self._drawn.fault)
        self._seen(None, (), {}, harm)
        yield
        part.copy_(harm.before.view_as(part))

    def _commit(self, computed: Computed, damaged: ExitStack) -> _Committed:
        """Commit as both ranks would if nobody had looked; closes `damaged` where the peer's memory counts."""
        bench, point, drawn = self._bench, self._point, self._drawn
        if computed.error:
            return _Committed(False, _NOTHING, _NOTHING, True, 0, 0)
        alike = drawn.operation not in ("optimizer", "state at rest", "reduced gradient")
        if drawn.site is not None and alike and self._is_clean(computed):
            return _Committed(True, _NOTHING, _NOTHING, True, 0, 0)
        ruling = self._of_sum(computed.gradients) if bench.guard.enabled else None
        summed = bench.reduced(point.start, self._sent(computed.gradients))
        finite = math.isfinite(float(torch.linalg.vector_norm(summed, dtype=torch.float64)))
        peers_sum = None if alike else summed.clone()
        if drawn.operation == "reduced gradient":
            self._hit(summed)
            finite = math.isfinite(float(torch.linalg.vector_norm(summed, dtype=torch.float64)))
        with self._striking_update():
            ours = bench.commit(point.start, summed, computed.counts)
        masked = bench.masked(point)
        excess = (_NOTHING, _NOTHING) if masked else bench.excess(point)
        seen = None if peers_sum is None else self._looked_again(summed, computed)
        damaged.close()
        peers = ours if peers_sum is None else bench.commit(point.start, peers_sum, computed.counts)
        by = "reduction"
        if ruling is None and bench.guard.enabled and peers_sum is not None and seen is not None and ours != peers:
            known, by = Hashes(point.before, digest(peers_sum)), "states"
            ruling = on_states((ours, peers), known, (seen, Again(known, peers)))
        return _Committed(masked, *excess, finite, ours, peers, ruling, by)

    def _looked_again(self, summed: Tensor, computed: Computed) -> Again:
        """What the struck rank finds when its new state is not the peer's: a defect that stays strikes again."""
        bench, start = self._bench, self._point.start
        operands = Hashes(bench.layout.digest(start.state), digest(summed))
        with self._striking_update(strict=False) if self._drawn.recurrent else nullcontext():
            return Again(operands, bench.commit(start, summed, computed.counts, again=True))

    def _is_clean(self, computed: Computed) -> bool:
        return computed.digest == self._point.gradients and torch.equal(computed.counts, self._point.counts)

    def _sent(self, gradients: Tensor) -> Tensor:
        """The rank's gradient as it enters the reduction."""
        if self._drawn.operation == "sent gradient":
            self._hit(gradients)
        return gradients

    def _of_sum(self, gradients: Tensor) -> Ruling | None:
        """What the product says of the sum when the fault strikes in it, at another time, in copies of both gradients.

        What would be committed is made apart, since the product hands out no sum of what it saw to be wrong. Where the
        fault is elsewhere the sum is right, whatever is added, and is not made.
        """
        operation = self._drawn.operation
        if operation not in ("sent gradient", "reduced gradient"):
            return None
        hit = Hit(operation == "sent gradient", self._damage)
        return on_sum(self._bench.layout, gradients, self._point.start.peer, hit, self._drawn.index)

    def _hit(self, flat: Tensor) -> None:
        """Corrupt the payload of a reduction, within the gradient of one parameter."""
        self._seen(None, (), {}, self._damage(flat))

    def _damage(self, flat: Tensor) -> Damage:
        spans = self._bench.layout.spans
        span = spans[self._drawn.ordinal % len(spans)]
        return damage(flat[span.start : span.start + span.size].view(span.shape), self._drawn.fault)

    def _striking_update(self, strict: bool = True) -> AbstractContextManager[object]:
        drawn = self._drawn
        if drawn.operation != "optimizer" or drawn.site is None:
            return nullcontext()
        blow = Blow(drawn.site.operator, drawn.fault, drawn.result)

        def seen(_func: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any], harm: Damage) -> None:
            self._seen(None, (), {}, harm)  # no sensor looks on here: what comes of it is held against the peer's

        return Strike({drawn.site.number: blow}, seen, strict)

    def _by(self, computed: Computed, done: _Committed) -> str:
        """Who saw it first: the sensors, torch itself, the comparisons of the sum, of the new states, or the gate."""
        if computed.alarms:
            return computed.alarms[0].sensor
        return "error" if computed.error else done.by if done.ruling else "gate"

    def _named(self, computed: Computed) -> bool | None:
        """Whether the first alarm names the module that was struck, or one in it; None without an alarm or a module."""
        if not computed.alarms or self._drawn.site is None or not self._drawn.site.module:
            return None
        return f"{computed.alarms[0].module}.".startswith(f"{self._drawn.site.module}.")

    def _judged(self, computed: Computed, done: _Committed, sensed: bool) -> dict[str, Any]:
        """The verdict on what was caught; nobody votes on a step that ended early."""
        point = self._point
        if done.ruling is not None and not computed.alarms:
            return by_ruling(done.ruling)
        if sensed:
            return {} if computed.error else by_votes(computed, point.gradients, self._again)
        return by_redo(done.ours, done.peers, point.clean_digest) if done.ours != done.peers else {}

    def _again(self) -> Computed | None:
        """The replay on the suspect's device, if the fault comes back there; None: it gives the clean gradients.

        What changed in memory stays.
        """
        if self._drawn.operation == "state at rest":
            with self._flipped():
                return self._bench.compute(self._point.start, self._drawn.index)
        if not self._drawn.recurrent or not self._below():
            return None
        return self._bench.compute(self._point.start, self._drawn.index, self._below())


def coordinates(drawn: Coordinates) -> dict[str, Any]:
    """The fields of the record that are drawn."""
    site = drawn.site
    return {
        "index": drawn.index,
        "precision": drawn.precision,
        "point": drawn.point,
        "operation": drawn.operation,
        "model": drawn.model,
        "pass": site.pass_ if site else drawn.part,
        "module": site.module if site else "",
        "operator": site.operator.removeprefix("aten.") if site else "",
        "number": site.number if site else drawn.ordinal,
        "result": drawn.result,
        "shape": list(site.results[drawn.result].shape) if site else [],
        "seed": drawn.fault.seed,
        "strength": _short(drawn.fault.strength),
        "recurrent": drawn.recurrent,
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")
