"""One rank's arithmetic of a step: samples in, guarded forward and backward, gradients and readings out."""

import copy
import math
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from agent.model import PRESETS, V3
from agent.model.fp8 import read, summarise
from agent.model.linear import Linear
from agent.model.parallel import Echo, ExpertParallel
from agent.model.presets import Preset
from agent.model.v3 import LossOutput
from agent.training.allocator import keep_memory
from agent.training.computation import Computation, astray, with_seals
from agent.training.data import Batch, BatchCorrupted, Corpus, CorpusError, sample_ids
from agent.training.journal import Deviation, Journal, Wire
from agent.training.layout import State, StateLayout
from agent.training.lost import lost
from agent.training.sampling import window_ids
from agent.training.scalars import Scalars
from agent.training.seals import Seals
from agent.training.shards import ShardLayout
from agent.training.spec import JobSpec, Mesh
from diagnostics.sensors.digest import chain, digest
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.guarded_step import GuardedStep
from diagnostics.sensors.tolerance import parse_table, shipped_table

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
#: Of the optimizer's moments (arXiv 2412.19437, section 3.3.3: bf16 beside FP8); masters and gradients are fp32.
MOMENTS = {"fp32": torch.float32, "bf16": torch.float32, "fp8": torch.bfloat16}

#: Scalars of a step that go into its evidence if it is held: those least like the steps before. A person reads them.
UNUSUAL = 5
_NO_COUNTS = torch.zeros(0, 0, dtype=torch.int64)
#: Called as (model, step, attempt); the context surrounds forward and backward. Drills enter here.
Surround = Callable[[nn.Module, int, int], AbstractContextManager[object]]


def undisturbed(_model: nn.Module, _step: int, _attempt: int) -> AbstractContextManager[object]:
    """No drill."""
    return nullcontext()


class Samples(Protocol):
    """What an engine needs of a corpus; `digest` (hex) covers its contents."""

    digest: str
    source: str

    def total(self, length: int) -> int:
        """Samples of `length` tokens."""

    def batch(self, ids: Sequence[int], length: int, documents: bool = False) -> Batch:
        """These samples. Raises BatchCorrupted."""


class Engine:
    """Model, data and sensors of one rank, over whatever state it is pointed at.

    `samples` replaces the job's corpus, which is not opened then.
    """

    def __init__(self, spec: JobSpec, surround: Surround = undisturbed, samples: Samples | None = None) -> None:
        torch.set_num_threads(spec.threads)
        keep_memory()
        preset = preset_of(spec)
        self.spec = spec
        self.preset = preset
        self.journal = Journal()
        self.seals = Seals(0)
        self.corpus: Samples = _corpus(spec, preset.config.vocab_size) if samples is None else samples
        self.surround = surround
        self._loss_scale = loss_scale(preset) if spec.precision == "fp8" else 1.0
        self._window = preset.sample_len
        self.total = self.corpus.total(self._window)
        self._packed = spec.pack == "documents"
        self._build(0, None if spec.mesh is None else _echoes(spec.mesh))
        self.gradients = torch.zeros(self.layout.flat)

    def _build(self, rank: int, live: ExpertParallel | None) -> None:
        """Model, layout and sensors of a rank; without `live` links to others, exchanges can only be replayed."""
        spec = self.spec
        mesh = spec.mesh
        self.rank = rank
        self._served: list[Tensor] = []
        self.parallel = None if mesh is None else _journalled(mesh, rank, self.journal, live, self._served)
        self.model = V3(self.preset.config, _DTYPES[spec.precision], self.parallel)
        moments = MOMENTS[spec.precision]
        self.layout = StateLayout(self.model, moments) if mesh is None else ShardLayout(self.model, mesh, rank, moments)
        self.guard = self._guarded(spec.tolerance_scale)
        self._scalars = Scalars(self.model)
        self._tallies = tuple(
            (name, tally)
            for name, module in self.model.named_modules()
            if isinstance(module, Linear) and module.fp8 is not None
            for tally in module.fp8.tallies
        )

    def take(self, rank: int, live: ExpertParallel) -> None:
        """Become `rank` of the mesh, whose exchanges go through `live`, and are sealed where there are sensors."""
        self.seals = Seals(rank)
        mesh = self.spec.mesh
        self._build(rank, self.seals.around(live, mesh) if mesh is not None and self.spec.sensors else live)

    def acting(self, rank: int) -> "Engine":
        """An engine that can replay `rank`'s part of a step: this one, or one with that rank's experts."""
        if self.spec.mesh is None or rank == self.rank:
            return self
        other = copy.copy(self)
        other.journal, other.seals = Journal(), Seals(rank)
        other._build(rank, None)
        return other

    def bind(self, state: State) -> None:
        """Compute from `state` from now on."""
        self.layout.bind(self.model, state)

    def initialise(self, state: State) -> None:
        """Write the initial state of the job's seed into `state`, but for the replica of another rank's."""
        fresh = V3(self.preset.config, parallel=self.parallel)
        fresh.initialise(self.spec.seed)
        self.layout.capture(fresh, state)
        state.meta[0] = self.spec.seed

    def compute(self, step: int, rank: int, attempt: int, gradients: Tensor) -> Computation:
        """Forward and backward of `rank`'s samples of `step`, into `gradients` (float32 [flat], overwritten).

        Attempt 0 is a replay, whose exchanges are none. Raises PeerLost if an exchange with another rank fails.
        """
        if attempt:
            self.seals.begin()
        batch = self.batch(step, rank)
        for _, tally in self._tallies:
            tally.clear()
        self._served.clear()
        gradients.zero_()
        self.layout.bind_gradients(self.model, gradients)
        key = chain(self.spec.seed, step, rank)
        result: LossOutput | None = None
        deviation = ""
        with self.guard.step(key) as sense, self.surround(self.model, step, attempt):
            self.journal.begin(lambda: sense.checks)
            try:
                result = sensed(self.model, self.guard, batch.tokens, batch.documents, self._loss_scale)
            except Deviation as found:
                deviation = found.digest
        if self._loss_scale != 1.0:
            gradients.mul_(1 / self._loss_scale)
        loss = math.nan if result is None else float(result.main)
        if not deviation:
            # A replay is none of the run's steps.
            sense.observe("loss", loss, remember=attempt > 0)
            sense.check_finite("gradients", gradients)  # before any sum, in which nobody could tell whose they were
        quantised = read(self._tallies)
        if attempt and result is not None and self.spec.sensors:
            self._scalars.observe(sense, result.counts, quantised)
        computation = Computation(
            loss=loss,
            reading=sense.worst,
            alarm=not sense.clean,
            alarms=tuple(sense.alarms),
            checks=sense.checks,
            counts=_NO_COUNTS if result is None else result.counts,
            tokens=batch.tokens.shape[0] * self.preset.seq_len,
            fp8=summarise(quantised),
            unusual=tuple(sense.unusual(UNUSUAL)),
            lost=lost(sense.failures, sense.skipped),
            clock=self._clock(sense),
            crossing=None if result is None else result.crossing,
            deviation=deviation,
        )
        return self._sealed(computation) if attempt else computation

    def _sealed(self, computation: Computation) -> Computation:
        """The computation with what is wrong with what arrived in it. Raises PeerLost."""
        with self.journal.waiting():
            garbled = self.seals.compare()
        if self.parallel is not None and self.spec.sensors:
            own = self.parallel.experts(self.preset.config)
            computation = replace(computation, astray=astray(computation.counts, self._served, own))
        return with_seals(computation, garbled, self.seals.count)

    def _guarded(self, scale: float) -> Guard:
        given = self.spec.tolerances
        table = None if given is None else parse_table(given).over(shipped_table())
        spec = self.spec
        return Guard(self.model, tolerance_scale=scale, enabled=spec.sensors, again=spec.again, table=table)

    def _clock(self, sense: GuardedStep) -> int:
        first = sense.first_alarm
        return 0 if first is None else self.journal.clock(first)

    def warm_up(self) -> None:
        """Run one step on throw-away state, so that a promotion finds kernels and allocator warm."""
        scratch = memoryview(bytearray(self.layout.nbytes))
        state = self.layout.view(scratch)
        self.initialise(state)
        self.bind(state)
        guard, surround = self.guard, self.surround
        self.guard, self.surround = self._guarded(1.0), undisturbed
        self.compute(0, 0, 1, torch.zeros(self.layout.flat))
        self.guard, self.surround = guard, surround

    def samples(self, step: int, rank: int) -> list[int]:
        """Sample ids of `rank` in `step`: a pure function of the seed.

        Packed windows lie side by side, seq_len apart, so that each position is trained on once in an epoch.
        """
        count = self.preset.micro_batch
        if not self._packed:
            return sample_ids(self.spec.seed, step, rank, 0, count, self.total)
        windows = (self.total - 1) // self.preset.seq_len + 1
        found = window_ids(self.spec.seed, step, rank, count, self.spec.world, windows)
        return [window * self.preset.seq_len for window in found]

    def link(self, previous: int, step: int, state_digest: int) -> int:
        """The chain after `step`: previous link, the state's digest, and every rank's samples."""
        ids = [i for rank in range(self.spec.world) for i in self.samples(step, rank)]
        return chain(previous, state_digest, *ids)

    def batch(self, step: int, rank: int) -> Batch:
        """`rank`'s micro-batch of `step`. Raises BatchCorrupted if the corpus does not give it twice running."""
        ids = self.samples(step, rank)
        try:
            return self.corpus.batch(ids, self._window, self._packed)
        except BatchCorrupted:  # a copy went wrong: the corpus itself is intact until a second read fails too
            return self.corpus.batch(ids, self._window, self._packed)


def preset_of(spec: JobSpec) -> Preset:
    """The job's preset, with the vocabulary that its corpus asks for."""
    preset = PRESETS[spec.preset]
    if spec.vocab_size is None:
        return preset
    return replace(preset, config=replace(preset.config, vocab_size=spec.vocab_size))


def _corpus(spec: JobSpec, vocabulary: int) -> Corpus:
    """The job's corpus. Raises CorpusError if it is another one, or has ids that the model has not."""
    corpus = Corpus.open(spec.corpus, Path(spec.cache), spec.tokenizer)
    corpus.content.check_vocabulary(vocabulary)
    if spec.corpus_digest not in (None, corpus.digest):
        told = f"the job's has digest {spec.corpus_digest}, this one {corpus.digest}"
        raise CorpusError(f"corpus {corpus.source} is not the one that the job was given: {told}")
    return corpus


def sensed(model: V3, guard: Guard, tokens: Tensor, documents: Tensor | None, scale: float) -> LossOutput:
    """Forward and backward of `scale` times the loss within a guarded step, and checks of what no operator vouches for.

    That is what lies beside the graph meanwhile: the number that the backward starts from, and the expert counts, of
    which every token of every MoE layer has num_experts_per_tok.
    """
    result = model.loss(tokens, documents)
    start = result.total.new_full((), scale)
    torch.autograd.backward(result.total, start)
    guard.check_finite("loss", result.total)
    guard.check_equal("backward's start", start, scale)
    positions = tokens.shape[0] * (tokens.shape[1] - 1 - model.config.mtp_depth)
    guard.check_equal("expert counts", result.counts.sum(-1), positions * model.config.num_experts_per_tok)
    return result


def loss_scale(preset: Preset) -> float:
    """What the loss is multiplied by for an FP8 backward: about the positions it is a mean over, as a power of two.

    The mean makes a token's gradient so small that whole blocks lie below the least amax of FP8's scales, 1e-4:
    measured without it on `small`, up to 82 % of a module's gradient became zero. A power of two changes no other bit,
    and is taken out of the gradients again.
    """
    return 2.0 ** math.floor(math.log2(preset.micro_batch * preset.seq_len))


def _journalled(
    mesh: Mesh, rank: int, journal: Journal, live: ExpertParallel | None, served: list[Tensor]
) -> ExpertParallel:
    """The rank's place among the experts, with the journal on both hops; what its experts are asked for is kept."""
    across = Wire(journal, mesh.ep // mesh.local, live.across if live else None)
    within = Wire(journal, mesh.local, live.within if live else None)
    return ExpertParallel(rank % mesh.ep, across, within, served.append)


def _echoes(mesh: Mesh) -> ExpertParallel:
    """What stands in for other ranks until there are any."""
    return ExpertParallel(0, Echo(mesh.ep // mesh.local), Echo(mesh.local))


def vote_digest(gradients: Tensor, counts: Tensor, loss: float) -> str:
    """The vote: 16 hex digits over all the bits of what a rank's computation gives to the step.

    Its own gradients, the expert counts that move the router's biases, and the loss.
    """
    bits = int.from_bytes(struct.pack("<d", loss), "little")
    return f"{chain(digest(gradients), digest(counts), bits):016x}"
