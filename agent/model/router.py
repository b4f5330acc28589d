"""Which experts a token goes to: sigmoid affinities, node-limited groups, balance by bias (sections 2.1.2, 4.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agent.model.config import V3Config
from agent.model.linear import Linear


class Routing(NamedTuple):
    """Where each token goes. N = n_routed_experts, K = num_experts_per_tok."""

    experts: Tensor  # int64 [tokens, K]
    gates: Tensor  # fp32 [tokens, K], sums to routed_scaling_factor when normalised; carries gradient
    scores: Tensor  # fp32 [tokens, N], affinities s without bias
    counts: Tensor  # int64 [N], tokens per expert; sums to tokens * K


class Router(nn.Module):
    """Scores every expert in fp32 and picks K of them.

    ``router_bias`` b (fp32 [N]) takes part in the choice only, never in a gate (eq. 16), gets no gradient and is never
    changed here: the caller applies :func:`updated_bias` once a step with counts summed over data-parallel ranks.
    """

    router_bias: Tensor

    def __init__(self, config: V3Config) -> None:
        super().__init__()
        self.config = config
        self.centroids = Linear(config.hidden_size, config.n_routed_experts, torch.float32)  # e_i (eq. 15)
        self.register_buffer("router_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """Route [tokens, hidden_size]."""
        scores = torch.sigmoid(self.centroids(x))
        experts = chosen_experts(scores.detach() + self.router_bias, self.config)
        gates = scores.gather(1, experts)
        if self.config.norm_topk_prob:
            gates = gates / (gates.sum(1, keepdim=True) + 1e-20)  # the published code's guard against 0 / 0
        counts = torch.bincount(experts.flatten(), minlength=self.config.n_routed_experts)
        return Routing(experts, gates * self.config.routed_scaling_factor, scores, counts)


def chosen_experts(choice: Tensor, config: V3Config) -> Tensor:
    """The K best of biased scores ``choice`` [tokens, N] within the topk_group best groups: int64 [tokens, K].

    A group's worth is the sum of its two largest entries.
    """
    if config.topk_group < config.n_group:
        grouped = choice.view(choice.shape[0], config.n_group, -1)
        worth = grouped.topk(2, dim=-1).values.sum(-1)
        kept = worth.topk(config.topk_group, dim=-1, sorted=False).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
    return choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


def updated_bias(bias: Tensor, counts: Tensor, gamma: float) -> Tensor:
    """b + gamma * sign(mean(n) - n): overloaded experts lose, starved ones gain (section 2.1.2).

    Args:
        bias: fp32 [..., N].
        counts: int64 [..., N], tokens per expert summed over all data-parallel ranks of one step.
        gamma: bias update speed.

    Returns:
        A new fp32 tensor [..., N]. The comparison is made in integers, so it is exact for any count.
    """
    total = counts.sum(-1, keepdim=True)
    return bias + gamma * torch.sign(total - counts * counts.shape[-1]).to(bias.dtype)


def sequence_balance_loss(scores: Tensor, sequences: int, config: V3Config) -> Tensor:
    """alpha * sum_i f_i P_i, averaged over sequences (eq. 17-20): fp32 scalar.

    f counts the plain top-K of the scores, without bias and without groups, within each sequence; only P carries
    gradient.

    Args:
        scores: fp32 [sequences * time, N], the affinities s.
        sequences: how many sequences the rows hold, one after another.
        config: for N, K and alpha.
    """
    experts, top = config.n_routed_experts, config.num_experts_per_tok
    rows = scores.view(sequences, -1, experts)
    share = (rows / rows.sum(-1, keepdim=True)).mean(1)  # P_i
    chosen = rows.detach().topk(top, dim=-1, sorted=False).indices.flatten(1)
    hits = torch.zeros_like(share).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=share.dtype))
    frequency = hits * (experts / (top * rows.shape[1]))  # f_i
    loss: Tensor = config.balance_alpha * (frequency * share).sum(-1).mean()
    return loss


def document_balance_loss(scores: Tensor, member: Tensor, config: V3Config) -> Tensor:
    """The same for packed sequences, in which every document is a sequence: fp32 scalar.

    Averaged over documents with their positions as weights. With one document in each sequence it is the same number.

    Args:
        scores: fp32 [batch * time, N], the affinities s.
        member: fp32 [batch, documents, time], 1 where a position counts as one of a document, else 0.
        config: for N, K and alpha.
    """
    experts, top = config.n_routed_experts, config.num_experts_per_tok
    rows = scores.view(member.shape[0], -1, experts)
    sizes = member.sum(-1, keepdim=True)  # positions of each document, [batch, documents, 1]
    sums = torch.bmm(member, rows / rows.sum(-1, keepdim=True))
    chosen = rows.detach().topk(top, dim=-1, sorted=False).indices
    hits = torch.bmm(member, torch.zeros_like(rows).scatter_(2, chosen, 1.0))
    # f_i P_i of a document is experts / top * hits * sums / size^2, and its weight size / sum of sizes.
    each = (hits * sums).sum(-1, keepdim=True) / sizes.clamp(min=1.0)
    loss: Tensor = config.balance_alpha * experts / top * each.sum() / sizes.sum().clamp(min=1.0)
    return loss
