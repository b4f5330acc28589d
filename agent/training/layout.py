"""Where each part of the training state lies in a slot: one flat, aligned, hashable buffer per state."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

#: Floats in 64 bytes: every parameter starts on a cache line, as torch's own allocations do, so that kernels take
#: the same (aligned) path in every process.
ALIGN = 16
#: Words of the meta region: seed, step, samples consumed, RNG counter, then spare ones that stay zero.
META = 16


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
class State:
    """Typed views into one slot's bytes.

    `parameters` are float32 [flat], `exp_avg` and `exp_avg_sq` [flat] in the layout's `moments`;
    `router_bias` float32 [layers * experts, padded];
    `meta` int64 [META]; `words` is the whole as int32, the view that is hashed.
    """

    words: Tensor
    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    router_bias: Tensor
    meta: Tensor


class StateLayout:
    """The layout of a model's state: fp32 master parameters, both moments, router bias, RNG key and data cursor.

    Parameters that take weight decay (matrices) come first, so that each chunk of the optimizer has one decay.
    `moments` is float32, or bfloat16 (FP8 training, arXiv 2412.19437, section 3.3.3): two to a word then, in parameter
    order like everything else. Every span starts at a multiple of ALIGN elements, so none begins within a word.
    """

    def __init__(self, model: nn.Module, moments: torch.dtype = torch.float32) -> None:
        named = [(name, p) for name, p in model.named_parameters()]
        ordered = [(n, p) for n, p in named if p.dim() >= 2] + [(n, p) for n, p in named if p.dim() < 2]
        spans = []
        start = 0
        for name, parameter in ordered:
            spans.append(Span(name, start, tuple(parameter.shape), parameter.dim() >= 2))
            start += -(-parameter.numel() // ALIGN) * ALIGN
        self.spans = tuple(spans)
        self.flat = start
        self.decayed = next((s.start for s in spans if not s.decay), start)
        self.biases = tuple(n for n, b in model.named_buffers() if n.endswith("router_bias"))
        self.experts = max((b.numel() for n, b in model.named_buffers() if n in self.biases), default=0)
        self.bias = -(-len(self.biases) * self.experts // ALIGN) * ALIGN
        self.moments = moments
        self._per_word = 4 // moments.itemsize
        self.region = self.flat // self._per_word
        self.tail = self.flat + 2 * self.region
        self.nbytes = 4 * (self.tail + self.bias) + 8 * META

    def view(self, buffer: memoryview) -> State:
        """Tensors over a slot's `nbytes` bytes; they share its memory."""
        words = torch.frombuffer(buffer, dtype=torch.int32)
        first, second, tail, b = self.flat, self.flat + self.region, self.tail, self.bias
        return State(
            words=words,
            parameters=words[:first].view(torch.float32),
            exp_avg=words[first:second].view(self.moments),
            exp_avg_sq=words[second:tail].view(self.moments),
            router_bias=words[tail : tail + b].view(torch.float32),
            meta=words[tail + b :].view(torch.int64),
        )

    def word(self, region: int, element: int) -> int:
        """Where an element of a region (0 parameters, 1 and 2 the moments) lies in `words`."""
        return element if region == 0 else self.flat + (region - 1) * self.region + element // self._per_word

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
        """Every part of the state as (name in a checkpoint, first 32-bit word, tensor sharing memory).

        Together they are all its words but padding, which is zero and so adds nothing to the digest. bf16 moments come
        as the int16 that their bits are, since numpy and the files' readers know no bfloat16.
        """
        moments = [
            flat if flat.dtype == torch.float32 else flat.view(torch.int16)
            for flat in (state.exp_avg, state.exp_avg_sq)
        ]
        regions = (("master", state.parameters), ("exp_avg", moments[0]), ("exp_avg_sq", moments[1]))
        parts = [
            (f"{kind}.{span.name}", self.word(index, span.start), self._part(flat, span))
            for index, (kind, flat) in enumerate(regions)
            for span in self.spans
        ]
        start = self.tail
        for index, row in enumerate(self.bias_rows(state.router_bias)):
            parts.append((f"router_bias.{self.biases[index]}", start + index * self.experts, row))
        parts.append(("meta", start + self.bias, state.meta))
        return parts

    @staticmethod
    def _part(flat: Tensor, span: Span) -> Tensor:
        return flat[span.start : span.start + span.size].view(span.shape)
