"""A training step of `tiny` from a point of its training, guarded, and its commit as the job makes it.

The model, the batch from the default corpus, the sensors, the optimizer's pass with its digest and the rule of the gate
are the product's. There are two ranks: the one under test, and a peer whose gradient is the clean one of another batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from agent.model import PRESETS, V3
from agent.model.linear import Linear
from agent.model.router import updated_bias
from agent.training.data import Corpus, sample_ids
from agent.training.engine import MOMENTS, sensed, vote_digest
from agent.training.layout import State, StateLayout
from agent.training.optimizer import AdamW, Pass, clip_coefficient, update
from agent.training.schedule import learning_rate
from benchmarks._fp8_training import Blockwise
from benchmarks.campaign.reordered import Reordered
from diagnostics.faults.strike import StepDiffers
from diagnostics.health import Alarm
from diagnostics.sensors.digest import digest
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.multilinear import chain
from diagnostics.sensors.quiet import quiet

PRESET = PRESETS["tiny"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
#: A quarter of the preset's positions: a step takes a third of the time, and every operator of the model runs in it.
SAMPLES, POSITIONS = 4, 32
#: Power of two that a backward in FP8 starts from, as `agent.training.engine.loss_scale` has it for this batch.
FP8_SCALE = float(SAMPLES * POSITIONS)
#: Relative size of the rounding of a stored fp32 value, rms: half a unit in the last place over sqrt(3). It is the
#: floor of tensors in which clean runs did not differ at all (norm weights near 1, experts without tokens).
HALF_ULP = 2.0**-24 / math.sqrt(3)
#: Ranks whose gradients are summed.
WORLD = 2
#: Clean runs in another order of sums, of which the natural floor is made.
REORDERED = 4
#: What torch raises when a struck index, count or size makes no sense. In a job the worker ends, and nothing commits.
REFUSED = (IndexError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError)
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Computed:
    """Forward and backward of the rank under test. error: what ended it early, "" if nothing did."""

    gradients: Tensor  # fp32 [flat]; shared with the bench, valid until it computes again
    digest: str
    finite: bool
    counts: Tensor
    alarms: tuple[Alarm, ...]
    checks: int
    reading: float
    error: str


class Excess(NamedTuple):
    """Relative L2 of the difference of a tensor's update from the clean one, over the tensor's natural floor.

    Infinite where anything is not finite, or where the clean step changes nothing and this one does; 0.0 if nothing
    differs.
    """

    ratio: float
    tensor: str


@dataclass(frozen=True, slots=True)
class Start:
    """What a step begins with."""

    step: int  # its number, from 1
    lr: float
    state: State
    tokens: Tensor  # int64 [SAMPLES, time + 1 + depth]
    peer: Tensor  # the other rank's gradient, fp32 [flat], or 0
    peer_counts: Tensor


@dataclass(frozen=True, slots=True)
class Point:
    """One point of training with its clean step. `norms` and `floors` are in the order of `Bench.tensors`."""

    start: Start
    before: int  # digest of the state that the step begins with
    clean: State  # after the clean step
    clean_digest: int
    gradients: str  # digest of the clean gradients
    counts: Tensor  # of the clean step
    norms: Tensor  # L2 of the clean step's change of each tensor of the state
    floors: Tensor  # relative L2 between clean steps that differ in the order of their sums only


class Bench:
    """`tiny` in one precision at some points of training (numbers of steps done), from one seed."""

    def __init__(
        self,
        precision: str,
        seed: int,
        points: Sequence[int],
        cache: Path,
        sensors: bool = True,
        tolerance_scale: float = 1.0,
        again: float = 1.0,
    ) -> None:
        self.precision = precision
        self.model = V3(PRESET.config, compute_dtype=DTYPES[precision])
        for module in self.model.modules():
            if isinstance(module, Linear) and module.fp8 is not None:
                module.fp8.backend = Blockwise()  # without statistics, on which no result depends: half the operators
        self.layout = StateLayout(self.model, MOMENTS[precision])
        self.settings = AdamW()
        self.guard = Guard(self.model, enabled=sensors, tolerance_scale=tolerance_scale, again=again)
        self.gradients = torch.zeros(self.layout.flat)
        self.layout.bind_gradients(self.model, self.gradients)
        self._scale = FP8_SCALE if precision == "fp8" else 1.0
        self._seed = seed
        self._corpus = Corpus.open(None, cache)
        self.after = self._state()  # what `commit` writes
        self._zero = self._state()
        self.points = list(self._reached(points))

    @property
    def quantising(self) -> frozenset[str]:
        """Names of the linears that multiply in FP8."""
        modules = self.model.named_modules()
        return frozenset(name for name, m in modules if isinstance(m, Linear) and m.fp8 is not None)

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors of the state, in the order of `Point.floors`."""
        kinds = ("parameter", "exp_avg", "exp_avg_sq")
        return [f"{kind} {span.name}" for kind in kinds for span in self.layout.spans] + ["router_bias"]

    def compute(
        self, start: Start, key: int, below: Iterable[AbstractContextManager[object]] = (), tokens: Tensor | None = None
    ) -> Computed:
        """One guarded forward and backward within the contexts `below`, which are entered before the guard's.

        Raises StepDiffers.
        """
        self.layout.bind(self.model, start.state)
        self.gradients.zero_()
        counts, error, loss = torch.zeros_like(start.peer_counts), "", math.nan
        with ExitStack() as stack:
            for context in below:
                stack.enter_context(context)
            with self.guard.step(key) as sense:
                try:
                    taken = start.tokens if tokens is None else tokens
                    result = sensed(self.model, self.guard, taken, None, self._scale)
                    counts, loss = result.counts, float(result.main.detach())
                except StepDiffers:
                    raise
                except REFUSED as refused:
                    error = f"{type(refused).__name__}: {refused}"[:200]
        if self._scale != 1.0:
            self.gradients.mul_(1 / self._scale)
        state = (vote_digest(self.gradients, counts, loss), math.isfinite(loss), counts)
        return Computed(self.gradients, *state, tuple(sense.alarms), sense.checks, sense.worst, error)

    def reduced(self, start: Start, gradients: Tensor) -> Tensor:
        """The sum over both ranks, a tensor of its own."""
        return gradients + start.peer

    def commit(self, start: Start, summed: Tensor, counts: Tensor, again: bool = False) -> int:
        """Write the state after the step into `after`; its digest."""
        old = start.state
        with quiet():  # not a part of the update: a job's ranks take it once for all of them, at the gate
            norm = float(torch.linalg.vector_norm(summed, dtype=torch.float64))
        change = Pass(start.step, start.lr, clip_coefficient(norm, self.settings.clip, WORLD), self.settings)
        hashes = update(self.layout, old, self.after, summed, change, again)
        bias, total = self.layout.bias_rows(old.router_bias), counts + start.peer_counts
        new = torch.stack([updated_bias(b, c, self.settings.bias_gamma) for b, c in zip(bias, total, strict=True)])
        self.layout.bias_rows(self.after.router_bias).copy_(new)
        return (sum(map(sum, hashes)) + digest(self.after.router_bias, self.layout.tail)) & _MASK

    def masked(self, point: Point) -> bool:
        """Whether what was committed is bit-equal to the clean step's."""
        return torch.equal(self.after.words, point.clean.words)

    def excess(self, point: Point) -> tuple[Excess, Excess]:
        """How far the committed update is from the clean one, where it is farthest: of the parameters, and of all.

        The router's biases count with the parameters; all are moments as well.
        """
        distances = self._distances(self.after, point.clean)
        ratios = torch.where(distances == 0, 0.0, distances / point.norms / point.floors)
        ratios = torch.where(torch.isfinite(ratios), ratios, math.inf)
        moments = torch.tensor([name.startswith("exp_avg") for name in self.tensors])
        return self._worst(ratios.masked_fill(moments, 0.0)), self._worst(ratios)

    def _worst(self, ratios: Tensor) -> Excess:
        worst = int(ratios.argmax())
        return Excess(float(ratios[worst]), self.tensors[worst])

    def _distances(self, one: State, other: State) -> Tensor:
        """L2 of the difference of each tensor of two states, fp64 [tensors]."""
        found = []
        for a, b in (
            (one.parameters, other.parameters),
            (one.exp_avg, other.exp_avg),
            (one.exp_avg_sq, other.exp_avg_sq),
        ):
            difference = a.float() - b.float()
            found += [_norm(difference[span.start : span.start + span.size]) for span in self.layout.spans]
        return torch.stack([*found, _norm(one.router_bias - other.router_bias)])

    def _state(self) -> State:
        state = self.layout.view(memoryview(bytearray(self.layout.nbytes)))
        state.words.zero_()
        return state

    def _batch(self, number: int) -> Tensor:
        """The tokens of a step; steps before 0 are the peer's."""
        length = POSITIONS + 1 + PRESET.config.mtp_depth
        ids = sample_ids(self._seed, abs(number), int(number < 0), 0, SAMPLES, self._corpus.total(length))
        return self._corpus.batch(ids, length).tokens

    def beginning(self) -> State:
        """The seed's initial weights."""
        fresh = V3(PRESET.config)
        fresh.initialise(self._seed)
        state = self._state()
        self.layout.capture(fresh, state)
        return state

    def advance(self, state: State, step: int) -> Computed:
        """Train by one clean step, alone, in place; steps count from 1. Commits whatever the sensors say."""
        start = self._start(state, step)
        computed = self.compute(start, chain(self._seed, step))  # no two runs draw the same weights
        self.commit(start, computed.gradients * WORLD, computed.counts)
        state.words.copy_(self.after.words)
        return computed

    def _reached(self, points: Sequence[int]) -> Iterable[Point]:
        """Train on from the seed's initial weights, and stop at each of the points.

        The way there is not guarded, which changes no bit of it: a third of the time.
        """
        state = self.beginning()
        for step in range(1, max(points, default=-1) + 2):
            if step - 1 in points:
                yield self._point(step, state)
            with self._unguarded():
                self.advance(state, step)

    @contextmanager
    def _unguarded(self) -> Iterator[None]:
        before, self.guard.enabled = self.guard.enabled, False
        yield
        self.guard.enabled = before

    def _start(self, state: State, step: int) -> Start:
        """A step from `state` beside a peer that adds nothing."""
        nothing = torch.zeros(len(self.layout.biases), self.layout.experts, dtype=torch.int64)
        return Start(step, learning_rate(step, PRESET), state, self._batch(step), torch.zeros(()), nothing)

    def _point(self, step: int, state: State) -> Point:
        """The point before `step`, with its clean step and the floors. Raises RuntimeError if that alarms."""
        held = self._state()
        held.words.copy_(state.words)
        alone = self._start(held, step)
        peer = self.compute(alone, step, tokens=self._batch(-step))
        start = replace(alone, peer=peer.gradients.clone(), peer_counts=peer.counts)
        clean_digest, gradients, counts = self._committed(start, start.tokens)
        clean = self._state()
        clean.words.copy_(self.after.words)
        if self._committed(start, start.tokens)[:2] != (clean_digest, gradients):
            raise RuntimeError("two clean steps differ: nothing can be compared with them")
        norms = self._distances(clean, held)
        before = self.layout.digest(held)
        return Point(start, before, clean, clean_digest, gradients, counts, norms, self._floors(start, clean) / norms)

    def _floors(self, start: Start, clean: State) -> Tensor:
        """L2 of each tensor's difference between clean steps whose sums have another order, rms over some orders."""
        squares = []
        for seed in range(REORDERED):
            other = Reordered(seed)
            with self._unguarded():  # an operator that is run again has its sums in another order yet
                self._committed(start, start.tokens[other.samples(SAMPLES)], (other,))
            squares.append(self._distances(self.after, clean).square())
        measured = torch.stack(squares).mean(0).sqrt()
        return torch.where(measured > 0, measured, self._distances(clean, self._zero) * HALF_ULP)

    def _committed(self, start: Start, tokens: Tensor, below: tuple[Reordered, ...] = ()) -> tuple[int, str, Tensor]:
        """Digests of the state after a clean step on these tokens and of its gradients, and its counts."""
        computed = self.compute(start, start.step, below, tokens)
        _refuse_alarms(computed)
        if self.guard.failures:
            reasons = {row.reason for row in self.guard.coverage() if "failed" in row.reason}
            raise RuntimeError(f"checks fail in a clean step: {reasons}")
        state = self.commit(start, self.reduced(start, computed.gradients), computed.counts)
        return state, computed.digest, computed.counts


def _norm(difference: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(difference, dtype=torch.float64)
    return found


def _refuse_alarms(computed: Computed) -> None:
    """A campaign on top of false alarms would count them as hits."""
    if computed.alarms or computed.error:
        raise RuntimeError(f"a clean step alarms: {computed.alarms[:1]} {computed.error}")
