"""Blocks over a latent cache, for the few tokens of a decoding step as well as for a whole prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from agent.model.block import Block
from agent.model.decoding.absorbed import attend_cached
from agent.model.moe import MoE

#: With so few tokens it costs less to give all of them to each expert that one of them wants than to sort them.
FEW = 8


def block_cached(block: Block, x: Tensor, turns: Tensor, rows: Tensor, start: int, real: int | None) -> Tensor:
    """``Block.forward`` over a cache: fp32 [tokens, hidden_size] -> the same. Arguments as in :func:`attend_cached`."""
    x = x + attend_cached(block.attention, block.attention_norm(x), turns, rows, start, real)
    normed = block.ffn_norm(x)
    y: Tensor
    if block.dense:
        y = block.ffn(normed)
    elif real is None and x.shape[0] > FEW:
        y, _ = block.moe(normed, 1)
    else:
        y = _by_expert(block.moe, normed, x.shape[0] if real is None else real)
    return x + y


def _by_expert(moe: MoE, x: Tensor, real: int) -> Tensor:
    """Eq. 12 with every wanted expert working on all tokens, so that its products have one shape: fp32 as ``x``.

    A token's gated sum has the order that training has.
    """
    routing = moe.router(x)
    wanted = routing.experts[:real].unique()
    place = torch.zeros_like(routing.counts)
    place[wanted] = torch.arange(len(wanted), device=x.device)
    found = torch.stack([moe.experts[index](x) for index in wanted.tolist()])
    token = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    home = found[place[routing.experts], token].float()  # [tokens, K, hidden_size]; of the filling: any expert's
    y = torch.bmm(routing.gates.unsqueeze(1), home).squeeze(1)
    return y if moe.shared is None else y + moe.shared(x)
