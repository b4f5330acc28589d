"""DeepSeekMoE (section 2.1.2): shared experts for every token, K routed experts for each."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from agent.model.config import V3Config
from agent.model.crossing import Comparison
from agent.model.dispatch import combine, dispatch, plan, slice_rows
from agent.model.ffn import FeedForward
from agent.model.fused import routed_experts
from agent.model.parallel.hop import Tokens
from agent.model.parallel.routed import crossed, routed_sum
from agent.model.parallel.transport import ExpertParallel
from agent.model.router import Router, Routing, document_balance_loss, sequence_balance_loss


class RouterLoad(NamedTuple):
    """What one MoE layer reports beside its output."""

    balance: Tensor  # fp32 scalar, sequence-wise balance loss, alpha included
    counts: Tensor  # int64 [n_routed_experts]
    crossing: Comparison | None = None  # copies between nodes; None where every expert is here


class MoE(nn.Module):
    """Eq. 12: shared experts plus gated routed experts; operation names: router.centroids, shared.*, experts.N.*.

    With ``parallel`` (of more than one rank) it holds its own experts only, under their numbers in the whole layer.
    """

    def __init__(self, config: V3Config, dtype: torch.dtype, parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.parallel = parallel if parallel is not None and parallel.ep > 1 else None
        width = config.moe_intermediate_size
        self.router = Router(config)
        self.shared = (
            FeedForward(config.hidden_size, config.n_shared_experts * width, dtype) if config.n_shared_experts else None
        )
        self.experts = nn.ModuleList()
        for number in range(config.n_routed_experts) if self.parallel is None else self.parallel.experts(config):
            self.experts.add_module(str(number), FeedForward(config.hidden_size, width, dtype))

    def forward(self, x: Tensor, sequences: int, member: Tensor | None = None) -> tuple[Tensor, RouterLoad]:
        """[tokens, hidden_size] of so many ``sequences`` -> fp32 [tokens, hidden_size] and the router's load.

        With ``member`` (see ``Packed``) the sequences are packed, and balance is asked of each document.
        """
        routing = self.router(x)
        y, crossing = self._mixture(x, routing)
        if self.shared is not None:
            y = y + self.shared(x)
        if member is None:
            balance = sequence_balance_loss(routing.scores, sequences, self.config)
        else:
            balance = document_balance_loss(routing.scores, member, self.config)
        return y, RouterLoad(balance, routing.counts, crossing)

    def _mixture(self, x: Tensor, routing: Routing) -> tuple[Tensor, Comparison | None]:
        """Each token's gated sum over its routed experts, fp32 [tokens, hidden_size], and what crossed for it."""
        if self.parallel is None:
            layout = plan(routing.experts, routing.counts, self.dtype)
            return combine(self._routed(dispatch(x, layout), layout.sizes), routing.gates, layout), None
        choice = routing.scores.detach() + self.router.router_bias
        crossing = crossed(routing.experts, choice, self.parallel, self.config, self.dtype)
        tokens, multiple = Tokens(x, routing.gates, routing.experts), slice_rows(self.dtype)
        y = routed_sum(tokens, self.parallel, self.config, self.dtype, multiple, self._routed)
        return y, crossing

    def _routed(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Each expert on its own slice. One without tokens makes no product: its gradients stay as they are."""
        if self.dtype != torch.float8_e4m3fn:
            weights = [cast(FeedForward, expert).weights for expert in self.experts]
            return routed_experts(rows.to(self.dtype), sizes, weights)
        slices = torch.split(rows, sizes)
        return torch.cat([expert(part) for expert, part in zip(self.experts, slices, strict=True) if part.shape[0]])
