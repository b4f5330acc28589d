"""Hugging Face's DeepSeek-V3 as the reference: random small configurations, and its stacked experts taken apart."""

import copy
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()  # it comments on lengths that small configurations cannot have right

YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}


def base(**changes: Any) -> dict[str, Any]:
    """A small configuration as a config.json would have it."""
    return {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        **changes,
    }


def drawn(seed: int) -> dict[str, Any]:
    """A random small configuration; the seed decides everything."""
    r = random.Random(seed)
    heads, groups, layers = r.choice([1, 2, 4]), r.choice([1, 2, 4]), r.choice([1, 2, 3])
    kept, per_group = r.randint(1, groups), r.choice([2, 3, 4])
    rope: dict[str, Any] | None = None
    if r.random() < 0.6:
        rope = {
            **YARN,
            "factor": r.choice([1.5, 4.0, 40.0]),
            "original_max_position_embeddings": r.choice([4, 32, 512]),
        }
        rope |= r.choice([{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.3}])
        rope |= r.choice([{}, {}, {"mscale_all_dim": 0.8}, {"attention_factor": 1.2}, {"truncate": False}])
    return base(
        hidden_size=r.choice([16, 40, 64]),
        intermediate_size=r.choice([24, 72]),
        num_hidden_layers=layers,
        first_k_dense_replace=r.randint(0, layers + 1),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=r.randint(1, kept * per_group),
        n_shared_experts=r.choice([1, 2]),
        q_lora_rank=r.choice([None, 12]),
        kv_lora_rank=r.choice([8, 20]),
        qk_rope_head_dim=r.choice([2, 8, 16]),
        v_head_dim=r.choice([4, 12]),
        norm_topk_prob=r.random() < 0.5,
        routed_scaling_factor=r.choice([1.0, 2.5]),
        rms_norm_eps=r.choice([1e-6, 1e-5, 1e-2]),
        rope_theta=r.choice([100.0, 10000.0]),
        attention_bias=r.random() < 0.5,
        rope_scaling=rope,
    )


def reference(d: Mapping[str, Any], seed: int = 0) -> DeepseekV3ForCausalLM:
    """Hugging Face's model in fp32 with every weight, norm and bias drawn anew."""
    own = copy.deepcopy({k: v for k, v in d.items() if k != "model_type"})  # it writes into its rotary settings
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**own)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        if name.endswith(("norm.weight", "layernorm.weight")):
            tensor.data.normal_(1.0, 0.2, generator=generator)
        else:
            spread = 0.2 if tensor.dim() == 1 else max(1, tensor.shape[-1]) ** -0.5
            tensor.data.normal_(0.0, spread, generator=generator)
    return model


def starve(model: DeepseekV3ForCausalLM, expert: int) -> None:
    """Bias one expert out of every choice."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data[expert] = -10.0


def published(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 holds the experts of a layer as two stacks; the published layout has one key per matrix."""
    found = {}
    for key, tensor in stacked.items():
        stem, _, kind = key.rpartition(".experts.")
        if kind == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found[f"{stem}.experts.{e}.gate_proj.weight"] = gate
                found[f"{stem}.experts.{e}.up_proj.weight"] = up
        elif kind == "down_proj":
            found |= {f"{stem}.experts.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        else:
            found[key] = tensor
    return found


def gradients(model: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    """Gradients in the published layout."""
    return published({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def difference(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """Relative L2 difference, of two tensors of no more than a `least` size and of two zeros 0."""
    sizes = [float(tensor.double().norm()) for tensor in (found, wanted)]
    if max(sizes) <= least:
        return 0.0
    return float((found.double() - wanted.double()).norm()) / (sizes[1] or 1.0)
