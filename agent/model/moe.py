"""DeepSeekMoE (section 2.1.2): shared experts for every token, K routed experts for each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agent.model.config import V3Config
from agent.model.dispatch import combine, dispatch, plan
from agent.model.ffn import FeedForward
from agent.model.router import Router, document_balance_loss, sequence_balance_loss


class RouterLoad(NamedTuple):
    """What one MoE layer reports beside its output."""

    balance: Tensor  # fp32 scalar, sequence-wise balance loss, alpha included
    counts: Tensor  # int64 [n_routed_experts]


class MoE(nn.Module):
    """Eq. 12: shared experts plus gated routed experts; operation names: router.centroids, shared.*, experts.N.*."""

    def __init__(self, config: V3Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        width = config.moe_intermediate_size
        self.router = Router(config)
        self.shared = (
            FeedForward(config.hidden_size, config.n_shared_experts * width, dtype) if config.n_shared_experts else None
        )
        self.experts = nn.ModuleList(
            FeedForward(config.hidden_size, width, dtype) for _ in range(config.n_routed_experts)
        )

    def forward(self, x: Tensor, sequences: int, member: Tensor | None = None) -> tuple[Tensor, RouterLoad]:
        """[tokens, hidden_size] of so many ``sequences`` -> fp32 [tokens, hidden_size] and the router's load.

        With ``member`` (see ``Packed``) the sequences are packed, and balance is asked of each document.
        """
        routing = self.router(x)
        layout = plan(routing.experts, routing.counts, self.dtype)
        y = combine(self._routed(dispatch(x, layout), layout.sizes), routing.gates, layout)
        if self.shared is not None:
            y = y + self.shared(x)
        if member is None:
            balance = sequence_balance_loss(routing.scores, sequences, self.config)
        else:
            balance = document_balance_loss(routing.scores, member, self.config)
        return y, RouterLoad(balance, routing.counts)

    def _routed(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Each expert on its own slice. One without tokens is not called: its gradients stay as they are."""
        slices = torch.split(rows, sizes)
        return torch.cat([expert(part) for expert, part in zip(self.experts, slices, strict=True) if part.shape[0]])
