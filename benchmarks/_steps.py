"""Training steps of the same shape by us and by Hugging Face, as `train_speed` times, measures and takes them apart."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from agent.model import PRESETS, V3, huggingface
from agent.training.allocator import keep_memory
from agent.training.spec import AGAIN
from diagnostics.sensors.guard import Guard

#: The shape that the targets were set with: `small` with a vocabulary of 4,096, and no MTP module, which Hugging Face
#: does not train.
CONFIG = replace(PRESETS["small"].config, vocab_size=4096, mtp_depth=0)
BATCH, TIME = 4, 256
TOKENS = BATCH * TIME
SEED = 1
#: Of Hugging Face's ways to run experts; "batched_mm" copies a weight for each token and takes 9 s a step here.
EXPERTS = ("grouped_mm", "eager")
ATTENTION = ("sdpa", "eager")

Step = Callable[[], float]


@dataclass(frozen=True)
class Variant:
    """One way to train. Ours where `dtype` is given, else Hugging Face's."""

    name: str
    dtype: torch.dtype | None = None
    sensors: bool = False
    autocast: bool = False
    compiled: bool = False
    experts: str | None = None  # None: as the library comes
    attention: str | None = None
    keeps: bool = False  # freed memory is kept for the next step, as our ranks keep it


OURS = (
    Variant("ours fp32", torch.float32, keeps=True),
    Variant("ours fp32, sensors on", torch.float32, sensors=True, keeps=True),
    Variant("ours bf16", torch.bfloat16, keeps=True),
    Variant("ours bf16, sensors on", torch.bfloat16, sensors=True, keeps=True),
)
DEFAULT = Variant("HF default, fp32")
#: Of the ways that compile in minutes; the other experts are a loop of which every turn is compiled anew (121 s and
#: 181 s until the first steps were through).
COMPILED = Variant("HF compiled, bf16", autocast=True, compiled=True, experts="grouped_mm", attention="sdpa")
#: What Hugging Face gains by our ranks' setting of the allocator, which it does not make itself.
COMPILED_KEEPING = replace(COMPILED, name="HF compiled, bf16, keeping memory", keeps=True)


def transformers_version() -> str | None:
    """The peer's version, or None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    return str(importlib.import_module("transformers").__version__)


def tokens() -> Tensor:
    """The same samples for every variant: int64 [BATCH, TIME + 1]."""
    return torch.randint(0, CONFIG.vocab_size, (BATCH, TIME + 1), generator=torch.Generator().manual_seed(SEED))


def alone(variant: Variant, threads: int) -> Step:
    """Prepare this process to take steps of one variant only, as its users would run it."""
    torch.set_num_threads(threads)
    if variant.keeps:
        keep_memory()
    return step_of(variant)[1]


def step_of(variant: Variant) -> tuple[nn.Module, Step]:
    """A fresh model, and what trains it for one step and returns the loss: clipping and fused AdamW included."""
    if variant.dtype is not None:
        model: nn.Module = V3(CONFIG, compute_dtype=variant.dtype)
        run = _our_pass(model, variant)
    else:
        model = hugging_face(variant)
        run = _their_pass(model, variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = run()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step


def hugging_face(variant: Variant) -> nn.Module:
    """`DeepseekV3ForCausalLM` of CONFIG's shape, with weights drawn by its own initialisation."""
    library: Any = importlib.import_module("transformers")
    fields = huggingface.document(CONFIG)
    config = library.DeepseekV3Config(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    asked = {"experts_implementation": variant.experts, "attn_implementation": variant.attention}
    torch.manual_seed(SEED)
    model: nn.Module = library.DeepseekV3ForCausalLM._from_config(config, **{k: v for k, v in asked.items() if v})
    return model.train()


def _our_pass(model: nn.Module, variant: Variant) -> Step:
    sample = tokens()
    guard = Guard(model, enabled=variant.sensors, again=AGAIN)  # as a job's engine guards
    key = 0

    def run() -> float:
        nonlocal key
        key += 1
        with guard.step(key) as sense:
            loss: Tensor = model.loss(sample).total
            torch.autograd.backward(loss)
        if not sense.clean:
            raise RuntimeError(f"false alarm: {sense.alarms[0]}")
        return float(loss.detach())

    return run


def _their_pass(model: nn.Module, variant: Variant) -> Step:
    sample = tokens()
    forward = torch.compile(model) if variant.compiled else model

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16) if variant.autocast else nullcontext():
            # The labels are shifted within, so that the last position has none: 255 of 256 count.
            loss: Tensor = forward(input_ids=sample[:, :TIME], labels=sample[:, :TIME]).loss
        torch.autograd.backward(loss)
        return float(loss.detach())

    return run
