"""MLA over cached latents, with W^UK absorbed into the query and W^UV into the output (DeepSeek-V2, section 2.1.2).

A score is (W^UK c)^T q = c^T (W^UK^T q), and the mix of values W^UV c is W^UV times the mix of c: neither keys nor
values of cached tokens are ever made. All heads share the cached rows, so that one matrix product serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agent.model.attention import Attention
from agent.model.rope import rotate


def attend_cached(attention: Attention, x: Tensor, turns: Tensor, rows: Tensor, start: int, real: int | None) -> Tensor:
    """Attend from new tokens over themselves and all that is cached; their rows are added to the cache.

    Args:
        attention: whose weights to use.
        x: [tokens, hidden_size] of one sequence, normed.
        turns: rotations of the tokens' positions, [tokens, qk_rope_head_dim / 2].
        rows: the layer's cache [capacity, kv_lora_rank + qk_rope_head_dim]; its first ``start`` rows count.
        start: position of the first token.
        real: so many tokens are meant, those behind only fill up, and each attends in products of its own, whose shapes
            depend on its position alone. None: all are, and attend together.

    Returns:
        [tokens, hidden_size]; what it has for the filling means nothing.
    """
    c = attention.config
    tokens, heads = x.shape[0], c.num_attention_heads
    flat = attention.queries(x).view(tokens, heads, c.qk_head_dim)
    plain, rotary = torch.split(flat, [c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    latent, shared = attention.latents(x)
    # The shared key turns as one more head. Alone it would be turned in one run over all tokens, whose last elements
    # torch computes in another way than the rest: a token's bits would depend on its place.
    turned = rotate(torch.cat([rotary, shared.unsqueeze(1)], 1).unsqueeze(0), turns)[0]
    meant = tokens if real is None else real
    rows[start : start + meant] = torch.cat([latent, turned[:, heads]], -1)[:meant]
    up_key, up_value = _up(attention, flat.dtype)
    absorbed = torch.bmm(plain.transpose(0, 1), up_key).transpose(0, 1)  # W^UK^T q: [tokens, heads, kv_lora_rank]
    query = torch.cat([absorbed, turned[:, :heads]], -1) * c.softmax_scale
    size = c.kv_lora_rank
    mixed = _together(query, rows, start, size) if real is None else _each(query, rows, start, size, real)
    value = torch.bmm(mixed.transpose(0, 1), up_value.transpose(1, 2))
    y: Tensor = attention.out(value.transpose(0, 1).reshape(tokens, -1))
    return y


def _up(attention: Attention, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W^UK [heads, qk_nope_head_dim, kv_lora_rank] and W^UV [heads, v_head_dim, kv_lora_rank]."""
    c = attention.config
    weight = attention.kv_b.weight.to(dtype).view(c.num_attention_heads, -1, c.kv_lora_rank)
    plain, value = torch.split(weight, [c.qk_nope_head_dim, c.v_head_dim], 1)
    return plain, value


def _together(query: Tensor, rows: Tensor, start: int, size: int) -> Tensor:
    """Mixes of the cached c^KV for all tokens in one product: [tokens, heads, size]."""
    tokens, heads, width = query.shape
    seen = rows[: start + tokens]
    scores = (query.reshape(-1, width) @ seen.T).float().view(tokens, heads, -1)
    future = torch.ones(tokens, start + tokens, dtype=torch.bool, device=query.device).triu(start + 1)
    share = scores.masked_fill_(future.unsqueeze(1), float("-inf")).softmax(-1)
    return (share.to(rows.dtype).view(tokens * heads, -1) @ seen[:, :size]).view(tokens, heads, size)


def _each(query: Tensor, rows: Tensor, start: int, size: int, real: int) -> Tensor:
    """The same for the ``real`` tokens, one by one; zero behind them."""
    mixed = query.new_zeros(*query.shape[:2], size)
    for token in range(real):
        seen = rows[: start + token + 1]
        own = query[token].clone()  # on a 64-byte boundary whatever the token's place: kernels may differ by it
        mixed[token] = (own @ seen.T).float().softmax(-1).to(rows.dtype) @ seen[:, :size]
    return mixed
