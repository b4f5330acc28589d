"""What decoding remembers: one small latent row per token and layer, from which all keys and values follow."""

from __future__ import annotations

from typing import NamedTuple

import torch

from agent.model.config import V3Config


class LatentCache:
    """Rows [c^KV ; k^R] of one sequence in so many layers (DeepSeek-V3 section 2.1.1: only these need be kept).

    c^KV is held after its norm and k^R rotated, both in the dtype of activations. ``length`` positions count; what lies
    behind them is free. Each layer's rows are an allocation of their own, so that they start on a 64-byte boundary.
    """

    def __init__(self, config: V3Config, layers: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.rows = [torch.empty(capacity, width, dtype=dtype, device=device) for _ in range(layers)]
        self.capacity = capacity
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on. Raises ValueError if there are not so many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: 0..{self.length}, what the cache holds, not {length}")
        self.length = length


class CacheBytes(NamedTuple):
    """Bytes that one token takes in the caches of all layers, by the kind of attention."""

    mla: int
    gqa: int
    mha: int


def cache_bytes(config: V3Config, itemsize: int = 2, gqa_groups: int = 8) -> CacheBytes:
    """The comparison of DeepSeek-V2 (arXiv 2405.04434, table 1), in bytes, without MTP modules.

    MLA keeps kv_lora_rank + qk_rope_head_dim elements a layer. The others are what the same heads would keep if each,
    or each of ``gqa_groups`` groups, had a key and a value of v_head_dim; 2 bytes an element is bf16.
    """
    layer = config.num_hidden_layers * itemsize
    pair = 2 * config.v_head_dim
    return CacheBytes(
        mla=(config.kv_lora_rank + config.qk_rope_head_dim) * layer,
        gqa=gqa_groups * pair * layer,
        mha=config.num_attention_heads * pair * layer,
    )
