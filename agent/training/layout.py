"""Where each part of the training state lies in a slot: one flat, aligned, hashable buffer per state."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.sensors.digest import digest
from diagnostics.sensors.multilinear import MASK

#: Floats in 64 bytes: every parameter starts on a cache line, as torch's own allocations do, so that kernels take
#: the same (aligned) path in every process.
ALIGN = 16
#: Words of the meta region: seed, step, samples consumed, RNG counter, then spare ones that stay zero.
META = 16
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Span:
    """One parameter's place in a flat buffer, in elements."""

    name: str
    start: int
    shape: tuple[int, ...]
    decay: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, slots=True)
class Piece:
    """Parameters `start`..`stop` that a rank optimises; their moments begin at element `moment` of each moment."""

    start: int
    stop: int
    moment: int
    decay: bool


@dataclass(frozen=True, slots=True)
class Region:
    """Words `start`..`stop` of a slot, and where they lie in the job's whole state, which is what digests count by."""

    start: int
    stop: int
    place: int


@dataclass(frozen=True, slots=True)
class State:
    """Typed views into one slot's bytes.

    `parameters` are float32 [flat], `exp_avg` and `exp_avg_sq` [flat, or the rank's share] in the layout's `moments`;
    `router_bias` float32 [layers * experts, padded];
    `meta` int64 [META]; `words` is all of this as int32, the view that is hashed. `replica` is int32 too: what the rank
    keeps of another's shard, empty where there are no shards.
    """

    words: Tensor
    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    router_bias: Tensor
    meta: Tensor
    replica: Tensor


class StateLayout:
    """The layout of a model's state: fp32 master parameters, both moments, router bias, RNG key and data cursor.

    Parameters that take weight decay (matrices) come first, so that each chunk of the optimizer has one decay.
    `moments` is float32, or bfloat16 (FP8 training, arXiv 2412.19437, section 3.3.3): two to a word then, in parameter
    order like everything else. Every span starts at a multiple of ALIGN elements, so none begins within a word.
    """

    def __init__(self, model: nn.Module, moments: torch.dtype = torch.float32) -> None:
        ordered = sorted(model.named_parameters(), key=lambda named: named[1].dim() < 2)
        self.spans, self.flat = arranged(ordered)
        self.expert = sum(-(-span.size // ALIGN) * ALIGN for span in self.spans if is_expert(span.name))
        decayed = next((s.start for s in self.spans if not s.decay), self.flat)
        pieces = (Piece(0, decayed, 0, True), Piece(decayed, self.flat, decayed, False))
        self._divide(model, moments, pieces, self.flat)
        self.regions: tuple[Region, ...] = (Region(0, self.words, 0),)

    def _divide(self, model: nn.Module, moments: torch.dtype, pieces: tuple[Piece, ...], optimised: int) -> None:
        """Lay out what follows the parameters: moments of `optimised` of them, router biases, meta."""
        self.pieces = pieces
        self.biases = tuple(n for n, b in model.named_buffers() if n.endswith("router_bias"))
        self.experts = max((b.numel() for n, b in model.named_buffers() if n in self.biases), default=0)
        self.bias = -(-len(self.biases) * self.experts // ALIGN) * ALIGN
        self.moments = moments
        self._per_word = 4 // moments.itemsize
        self.region = optimised // self._per_word
        self.tail = self.flat + 2 * self.region
        self.words = self.tail + self.bias + 2 * META
        self.replica = 0

    @property
    def nbytes(self) -> int:
        """Bytes of one slot."""
        return 4 * (self.words + self.replica)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of one state by what they are, as assay.v1.Resumed names them."""
        experts = 4 * self.expert
        return {
            "parameter_bytes": 4 * self.flat - experts,
            "expert_bytes": experts,
            "optimizer_bytes": 8 * self.region,
            "replica_bytes": 4 * self.replica,
        }

    def view(self, buffer: memoryview) -> State:
        """Tensors over a slot's `nbytes` bytes; they share its memory."""
        everything = torch.frombuffer(buffer, dtype=torch.int32)
        words = everything[: self.words]
        first, second, tail, b = self.flat, self.flat + self.region, self.tail, self.bias
        return State(
            words=words,
            parameters=words[:first].view(torch.float32),
            exp_avg=words[first:second].view(self.moments),
            exp_avg_sq=words[second:tail].view(self.moments),
            router_bias=words[tail : tail + b].view(torch.float32),
            meta=words[tail + b :].view(torch.int64),
            replica=everything[self.words :],
        )

    def word(self, region: int, element: int) -> int:
        """Where an element of a region (0 parameters, 1 and 2 the moments) lies in `words`."""
        return element if region == 0 else self.flat + (region - 1) * self.region + element // self._per_word

    def place(self, word: int) -> int:
        """Where a word of the slot lies in the job's whole state."""
        region = next(r for r in self.regions if r.start <= word < r.stop)
        return region.place + word - region.start

    def digest(self, state: State) -> int:
        """64-bit digest of the rank's own words."""
        return digest_of(state.words, self.regions)

    def bind(self, model: nn.Module, state: State) -> None:
        """Point the model's parameters and router biases at `state`; nothing is copied."""
        parameters = dict(model.named_parameters())
        for span in self.spans:
            parameters[span.name].data = self._part(state.parameters, span)
        buffers = dict(model.named_buffers())
        for name, row in zip(self.biases, self.bias_rows(state.router_bias), strict=True):
            buffers[name].data = row

    def bind_gradients(self, model: nn.Module, flat: Tensor) -> None:
        """Let backward accumulate into `flat` (float32 [flat]); zero it before each step."""
        parameters = dict(model.named_parameters())
        for span in self.spans:
            parameters[span.name].grad = self._part(flat, span)

    def bias_rows(self, flat: Tensor) -> Tensor:
        """The router bias as [layers, experts], sharing memory."""
        used = len(self.biases) * self.experts
        return flat[:used].view(len(self.biases), self.experts)

    def capture(self, model: nn.Module, state: State) -> None:
        """Copy a freshly initialised model into `state`, with zero moments and meta."""
        state.words.zero_()
        parameters = dict(model.named_parameters())
        for span in self.spans:
            self._part(state.parameters, span).copy_(parameters[span.name].data)
        buffers = dict(model.named_buffers())
        for name, row in zip(self.biases, self.bias_rows(state.router_bias), strict=True):
            row.copy_(buffers[name])

    def parts(self, state: State) -> list[tuple[str, int, Tensor]]:
        """Every part of the state as (name in a checkpoint, place of its first word, tensor sharing memory).

        Together they are all its words but padding, which is zero and so adds nothing to the digest.
        """
        parts = [(f"master.{span.name}", span.start, self._part(state.parameters, span)) for span in self.spans]
        parts += self._moments(state)
        for index, row in enumerate(self.bias_rows(state.router_bias)):
            parts.append((f"router_bias.{self.biases[index]}", self.tail + index * self.experts, row))
        parts.append(("meta", self.tail + self.bias, state.meta))
        return [(name, self.place(word), tensor) for name, word, tensor in parts]

    def _moments(self, state: State) -> list[tuple[str, int, Tensor]]:
        return [
            (f"{kind}.{span.name}", self.word(index, span.start), self._part(readable(flat), span))
            for index, (kind, flat) in enumerate((("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)), 1)
            for span in self.spans
        ]

    @staticmethod
    def _part(flat: Tensor, span: Span) -> Tensor:
        return flat[span.start : span.start + span.size].view(span.shape)


def is_expert(name: str) -> bool:
    """Whether a parameter of that name belongs to a routed expert, which expert parallelism spreads."""
    return _EXPERT.search(name) is not None


def arranged(named: Sequence[tuple[str, nn.Parameter]], start: int = 0) -> tuple[tuple[Span, ...], int]:
    """Spans of these parameters in their order from `start`, each aligned; and where the last one ends."""
    spans = []
    for name, parameter in named:
        spans.append(Span(name, start, tuple(parameter.shape), parameter.dim() >= 2))
        start += -(-parameter.numel() // ALIGN) * ALIGN
    return tuple(spans), start


def digest_of(words: Tensor, regions: Iterable[Region]) -> int:
    """64-bit digest of these regions of `words`, each counted by its place in the whole state."""
    return sum(digest(words[r.start : r.stop], r.place) for r in regions) & MASK


def readable(flat: Tensor) -> Tensor:
    """bf16 as the int16 that its bits are, since numpy and the files' readers know no bfloat16; others as they are."""
    return flat if flat.dtype == torch.float32 else flat.view(torch.int16)
