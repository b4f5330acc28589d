"""Multi-token prediction (section 2.2): extra modules that keep the causal chain while predicting further ahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agent.model.block import Block
from agent.model.config import V3Config
from agent.model.fp8 import activation_dtype
from agent.model.linear import Linear
from agent.model.moe import RouterLoad
from agent.model.norm import RMSNorm
from agent.model.packing import Packed
from agent.model.parallel.transport import ExpertParallel


class MTPModule(nn.Module):
    """Module k: joins h^{k-1}_i with the embedding of token i + k and predicts token i + k + 1 (eq. 21-23).

    Embedding and output head are the model's own and are not held here. The concatenation has the embedding first, as
    the published weights do (the paper's eq. 21 writes it second).
    """

    def __init__(self, config: V3Config, dtype: torch.dtype, parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = RMSNorm(size, eps, dtype)
        self.hidden_norm = RMSNorm(size, eps, dtype)
        self.projection = Linear(2 * size, size, activation_dtype(dtype))  # M_k; not FP8: no block's linear
        self.block = Block(config, dense=False, dtype=dtype, parallel=parallel)  # TRM_k
        self.norm = RMSNorm(size, eps, torch.float32)

    def forward(
        self, hidden: Tensor, embedded: Tensor, turns: Tensor, packed: Packed | None = None
    ) -> tuple[Tensor, Tensor, RouterLoad]:
        """One step further along the chain.

        Args:
            hidden: h^{k-1}_i, fp32 [batch * time, hidden_size].
            embedded: Emb(t_{i+k}), the same shape.
            turns: rotations of the positions.
            packed: the documents of packed sequences, for this module's distance k.

        Returns:
            h^k before and after the norm that precedes the head, both fp32 as ``hidden``, and the router's load.
        """
        joined = torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        y, load = self.block(self.projection(joined).float(), turns, packed)
        assert load is not None, "an MTP module's block always routes"
        return y, self.norm(y), load
