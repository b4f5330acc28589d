"""Models whose steps are guarded on a GPU: Llama as Hugging Face has it, and V3."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from agent.model.presets import PRESETS
from agent.model.v3 import V3

#: Llama's: two layers, wide enough that products are worth a tensor core.
LAYERS, HIDDEN, WIDE, HEADS, VOCABULARY = 2, 512, 1408, 8, 1024
WINDOWS, TIME = 4, 256
#: Of AdamW; high enough that values move within the steps that are taken.
RATE = 1e-3


@dataclass
class Case:
    """A model with its data and optimizer."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    embedding: nn.Parameter
    optimizer: torch.optim.Optimizer

    def step(self) -> Tensor:
        """Forward and backward, with gradients made anew; the loss."""
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """A copy of each, by its parameter's name."""
        named = self.model.named_parameters()
        return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def llama(name: str, device: torch.device, autocast: bool) -> Case:
    """Hugging Face's Llama with `scaled_dot_product_attention`, fp32 or under autocast to bf16."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        attn_implementation="sdpa",
    )
    model: Any = transformers.LlamaForCausalLM._from_config(config).train().to(device)
    text = torch.randint(0, VOCABULARY, (WINDOWS, TIME)).to(device)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            found: Tensor = model(input_ids=text, labels=text, use_cache=False).loss
        return found

    return Case(name, model, loss, model.model.embed_tokens.weight, torch.optim.AdamW(model.parameters(), RATE))


def v3(name: str, device: torch.device, preset: str, dtype: torch.dtype) -> Case:
    """Our own in one of its presets."""
    chosen = PRESETS[preset]
    model = V3(chosen.config, dtype).to(device)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (chosen.micro_batch, chosen.sample_len), generator=generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), chosen.peak_lr)
    return Case(name, model, lambda: model.loss(tokens).total, model.embedding, optimizer)


#: By name, each made on a device.
CASES: dict[str, Callable[[torch.device], Case]] = {
    "llama fp32": lambda device: llama("llama fp32", device, False),
    "llama bf16 autocast": lambda device: llama("llama bf16 autocast", device, True),
    "tiny fp32": lambda device: v3("tiny fp32", device, "tiny", torch.float32),
    "tiny bf16": lambda device: v3("tiny bf16", device, "tiny", torch.bfloat16),
    "small fp32": lambda device: v3("small fp32", device, "small", torch.float32),
    "small bf16": lambda device: v3("small bf16", device, "small", torch.bfloat16),
    "tiny fp8": lambda device: v3("tiny fp8", device, "tiny", torch.float8_e4m3fn),
}
