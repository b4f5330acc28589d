"""All of a layer's routed experts, wherever they are: across nodes, within the node, the own ones, and home again."""

from __future__ import annotations

import torch
from torch import Tensor

from agent.model.config import V3Config
from agent.model.crossing import Comparison, assert_node_limited, crossing, token_bytes
from agent.model.parallel.hop import Tokens, Trip, combine, dispatch
from agent.model.parallel.own import Slices, own_sum
from agent.model.parallel.transport import ExpertParallel, Transport

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}


def routed_sum(
    tokens: Tokens, parallel: ExpertParallel, config: V3Config, dtype: torch.dtype, multiple: int, slices: Slices
) -> Tensor:
    """Each token's gated sum over its experts (eq. 12), fp32 [n, hidden_size].

    Args:
        tokens: this rank's, with the numbers of all experts.
        parallel: who holds the others.
        config: for the number of experts.
        dtype: of the products; with float8_e4m3fn rows travel to their experts in FP8, all else in bf16.
        multiple: rows of an expert are padded to multiples of this.
        slices: the own experts.
    """
    trips: list[Trip] = []
    for transport, each in _hops(parallel, config):
        tokens, trip = dispatch(tokens, transport, each, fp8=dtype == torch.float8_e4m3fn)
        trips.append(trip)
    parallel.served(tokens.experts)
    y = own_sum(tokens, len(parallel.experts(config)), multiple, slices)
    for trip in reversed(trips):
        y = combine(y, trip, tokens.rows.dtype)
    return y


def crossed(
    experts: Tensor, choice: Tensor, parallel: ExpertParallel, config: V3Config, dtype: torch.dtype
) -> Comparison:
    """Copies of this rank's tokens that leave their node, and what would leave it if groups were not limited.

    Bytes are those of the rows on the way out; gates and numbers add 12 K bytes a copy.

    Args:
        experts: int64 [tokens, K], the router's choice.
        choice: fp32 [tokens, N], affinities with the router's bias added.
        parallel: the nodes.
        config: for groups and K.
        dtype: of the products.

    Raises:
        NodeLimitExceeded: groups divide among the nodes, and a token's experts lie in more than topk_group groups.
    """
    nodes = parallel.across.world
    if config.n_group % nodes == 0:
        assert_node_limited(experts, config)
    home = torch.full((experts.shape[0],), parallel.node, dtype=torch.int64, device=experts.device)
    node_of = torch.arange(config.n_routed_experts, device=experts.device) // (config.n_routed_experts // nodes)
    free = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    copy_bytes = token_bytes(config.hidden_size, _NAMES[dtype])
    return Comparison(*(crossing(chosen, home, node_of, copy_bytes) for chosen in (experts, free)))


def _hops(parallel: ExpertParallel, config: V3Config) -> list[tuple[Transport, int]]:
    """Each hop with the experts that one of its ranks reaches. A hop of one rank is none."""
    nodes, local = parallel.across.world, parallel.within.world
    hops = ((parallel.across, config.n_routed_experts // nodes), (parallel.within, len(parallel.experts(config))))
    return [hop for hop, ranks in zip(hops, (nodes, local), strict=True) if ranks > 1]
