"""What node-limited routing saves: copies of tokens that cross between nodes, counted from the router's choices.

A token is sent once to each node that has one of its experts, and spread within the node from there (section 3.2.2);
limited to M groups of experts, one group per node, it crosses at most M times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.model.config import V3Config
from agent.model.fp8.recipe import BLOCK
from agent.model.router import chosen_experts


class NodeLimitExceeded(ValueError):
    """A token's experts lie in more groups than topk_group; ``token`` is its row."""

    def __init__(self, token: int, groups: int, limit: int) -> None:
        super().__init__(f"token {token}: its experts lie in {groups} groups, and topk_group is {limit}")
        self.token = token


@dataclass(frozen=True, slots=True)
class Crossing:
    """Copies that leave their node in one dispatch of one layer, or the sum of several. The way home crosses as often.

    Invariant: copies <= unmerged.
    """

    tokens: int
    copies: int  # one for each (token, other node with one of its experts)
    unmerged: int  # one for each (token, expert on another node): what a dispatch in one hop would send
    nbytes: int  # of the merged copies
    widest: int  # most nodes that one token reaches, its own included if it has an expert there


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same scores routed within topk_group groups, and without a limit."""

    limited: Crossing
    unlimited: Crossing


def summed(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The sum of several layers or steps, ``widest`` the largest of them; None when there are none."""
    if not comparisons:
        return None
    return Comparison(_sum([one.limited for one in comparisons]), _sum([one.unlimited for one in comparisons]))


def _sum(crossings: Sequence[Crossing]) -> Crossing:
    return Crossing(
        tokens=sum(one.tokens for one in crossings),
        copies=sum(one.copies for one in crossings),
        unmerged=sum(one.unmerged for one in crossings),
        nbytes=sum(one.nbytes for one in crossings),
        widest=max(one.widest for one in crossings),
    )


def assert_node_limited(experts: Tensor, config: V3Config) -> None:
    """Every token's experts lie in at most topk_group groups. ``experts`` is int64 [tokens, K].

    Raises:
        NodeLimitExceeded: the first token for which it does not hold.
    """
    reached = _reached(experts // (config.n_routed_experts // config.n_group), config.n_group).sum(1)
    if experts.shape[0] and int(reached.max()) > config.topk_group:
        token = int((reached > config.topk_group).nonzero()[0])
        raise NodeLimitExceeded(token, int(reached[token]), config.topk_group)


def crossing(experts: Tensor, home: Tensor, node_of: Tensor, copy_bytes: int) -> Crossing:
    """Count what crosses.

    Args:
        experts: int64 [tokens, K], the router's choices.
        home: int64 [tokens], each token's own node.
        node_of: int64 [N], each expert's node.
        copy_bytes: bytes of one token, see :func:`token_bytes`.
    """
    at = node_of[experts]
    reached = _reached(at, int(node_of.max()) + 1 if node_of.numel() else 0)
    abroad = at != home.unsqueeze(1)
    own = (~abroad).any(1)
    per_token = reached.sum(1)
    copies = int((per_token - own.long()).sum())
    widest = int(per_token.max()) if per_token.numel() else 0
    return Crossing(experts.shape[0], copies, int(abroad.sum()), copies * copy_bytes, widest)


def compare(choice: Tensor, home: Tensor, config: V3Config, *, copy_bytes: int, nodes: int | None = None) -> Comparison:
    """Route the same scores with the node limit and without, and count both; groups lie on nodes in order.

    Args:
        choice: fp32 [tokens, N], affinities with the router's bias added.
        home: int64 [tokens].
        config: for groups and K.
        copy_bytes: bytes of one token.
        nodes: how many; None: one per group. They divide the groups.

    Raises:
        NodeLimitExceeded: the limited choice is none.
        ValueError: the groups do not divide among the nodes.
    """
    nodes = config.n_group if nodes is None else nodes
    if nodes < 1 or config.n_group % nodes:
        raise ValueError(f"nodes: {config.n_group} groups do not divide among {nodes}")
    node_of = torch.arange(config.n_routed_experts, device=choice.device) // (config.n_routed_experts // nodes)
    limited = chosen_experts(choice, config)
    assert_node_limited(limited, config)
    unlimited = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    return Comparison(*(crossing(experts, home, node_of, copy_bytes) for experts in (limited, unlimited)))


def token_bytes(hidden_size: int, precision: str) -> int:
    """Bytes of one dispatched token: bf16, fp32, or fp8 with an fp32 scale for each 128 elements (section 3.3.2).

    Raises:
        ValueError: another precision.
    """
    if precision == "fp8":
        return hidden_size + 4 * -(-hidden_size // BLOCK)
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision: fp8, bf16 or fp32, not {precision!r}")
    return hidden_size * (2 if precision == "bf16" else 4)


def _reached(places: Tensor, count: int) -> Tensor:
    """bool [tokens, count]: which of so many places are among a token's ``places`` [tokens, K]."""
    return torch.zeros(places.shape[0], count, dtype=torch.bool, device=places.device).scatter_(1, places, True)
