"""Multi-head latent attention (section 2.1.1): keys and values come from one small latent per token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agent.model.config import V3Config
from agent.model.fused import causal_attention, key_value_heads, query_heads
from agent.model.linear import Linear
from agent.model.norm import RMSNorm


class Attention(nn.Module):
    """MLA in its training form, eq. 1-11; operation names: q_a, q_b (or q), kv_a, kv_b, out."""

    def __init__(self, config: V3Config, dtype: torch.dtype) -> None:
        super().__init__()
        c = self.config = config
        heads, bias = c.num_attention_heads, c.attention_bias
        if c.q_lora_rank is None:
            self.q = Linear(c.hidden_size, heads * c.qk_head_dim, dtype)
        else:
            self.q_a = Linear(c.hidden_size, c.q_lora_rank, dtype, bias=bias)  # W^DQ
            self.q_norm = RMSNorm(c.q_lora_rank, c.latent_norm_eps, dtype)
            self.q_b = Linear(c.q_lora_rank, heads * c.qk_head_dim, dtype)  # [W^UQ; W^QR]
        self.kv_a = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, dtype, bias=bias)  # [W^DKV; W^KR]
        self.kv_norm = RMSNorm(c.kv_lora_rank, c.latent_norm_eps, dtype)
        self.kv_b = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), dtype)  # [W^UK; W^UV]
        self.out = Linear(heads * c.v_head_dim, c.hidden_size, dtype, bias=bias)  # W^O

    def forward(self, x: Tensor, turns: Tensor, apart: Tensor | None = None) -> Tensor:
        """Attend within each sequence, or within each document of it.

        Args:
            x: [batch * time, hidden_size], sequence after sequence.
            turns: rotations of the positions, [time, qk_rope_head_dim / 2]. Only differences of positions matter, so a
                document that starts anywhere in a sequence needs no others.
            apart: bool [batch, time, time], pairs of positions that are not of one document; None: all are.

        Returns:
            [batch * time, hidden_size].
        """
        time = turns.shape[0]
        query = self._query(x, turns)
        key, value = self._key_value(x, turns)
        mixed = causal_attention(query, key, value, self.config.softmax_scale, apart)
        heads_last = mixed.view(-1, self.config.num_attention_heads, time, self.config.v_head_dim).transpose(1, 2)
        y: Tensor = self.out(heads_last.reshape(x.shape[0], -1))
        return y

    def queries(self, x: Tensor) -> Tensor:
        """[tokens, hidden_size] -> all heads, not yet rotated: [tokens, heads * qk_head_dim] (eq. 6-7)."""
        flat: Tensor = self.q(x) if self.config.q_lora_rank is None else self.q_b(self.q_norm(self.q_a(x)))
        return flat

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """c^KV [tokens, kv_lora_rank] after its norm, and k^R [tokens, qk_rope_head_dim] not yet rotated (eq. 1, 3)."""
        latent, rotary = torch.split(self.kv_a(x), [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        return self.kv_norm(latent), rotary

    def _query(self, x: Tensor, turns: Tensor) -> Tensor:
        c = self.config
        return query_heads(self.queries(x), turns, c.num_attention_heads, c.qk_rope_head_dim)

    def _key_value(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        latent, shared = self.latents(x)  # k^R: one head for all, no norm
        return key_value_heads(self.kv_b(latent), shared, turns, c.num_attention_heads, c.v_head_dim)
