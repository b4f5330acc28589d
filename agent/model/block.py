"""One transformer block (figure 2): attention, then a feed-forward layer or a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agent.model.attention import Attention
from agent.model.config import V3Config
from agent.model.ffn import FeedForward
from agent.model.moe import MoE, RouterLoad
from agent.model.norm import RMSNorm
from agent.model.packing import Packed
from agent.model.parallel.transport import ExpertParallel


class Block(nn.Module):
    """x + Attention(norm(x)), then x + FFN(norm(x)); the residual stream is fp32.

    Either ``ffn`` or ``moe`` exists, so that operation names tell which kind of layer they belong to.
    """

    def __init__(
        self, config: V3Config, *, dense: bool, dtype: torch.dtype, parallel: ExpertParallel | None = None
    ) -> None:
        super().__init__()
        self.dense = dense
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if dense:
            self.ffn = FeedForward(config.hidden_size, config.intermediate_size, dtype)
        else:
            self.moe = MoE(config, dtype, parallel)

    def forward(self, x: Tensor, turns: Tensor, packed: Packed | None = None) -> tuple[Tensor, RouterLoad | None]:
        """fp32 [batch * time, hidden_size] -> the same, and the router's load if there is a router."""
        x = x + self.attention(self.attention_norm(x), turns, packed.apart if packed else None)
        normed = self.ffn_norm(x)
        if self.dense:
            return x + self.ffn(normed), None
        y, load = self.moe(normed, x.shape[0] // turns.shape[0], packed.member if packed else None)
        return x + y, load
