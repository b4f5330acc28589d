"""MLA against a naive writing of equations 1-11, rotary embedding by 2x2 rotations, and causality."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agent.model import PRESETS, V3, V3Config, Yarn
from agent.model import attention as attention_module
from agent.model.attention import Attention
from agent.model.rope import frequencies, rotate, rotation

CONFIG = replace(PRESETS["tiny"].config, hidden_size=48, q_lora_rank=24, kv_lora_rank=20, v_head_dim=12)
BATCH, TIME = 2, 11


def filled(config: V3Config) -> Attention:
    attention = Attention(config, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in attention.parameters():
        spread = 0.5 if parameter.dim() == 1 else 2 * parameter.shape[-1] ** -0.5
        parameter.data.normal_(float(parameter.dim() == 1), spread, generator=generator)
    return attention


def naive_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def naive_rope(x: Tensor, position: int, base: float) -> Tensor:
    out = x.clone()
    for j in range(len(x) // 2):
        angle = position * base ** (-2 * j / len(x))
        a, b = float(x[2 * j]), float(x[2 * j + 1])
        out[2 * j] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def naive_attention(m: Attention, x: Tensor) -> Tensor:
    """One sequence [time, hidden], token by token and head by head."""
    c = m.config
    heads, nope, base, eps = c.num_attention_heads, c.qk_nope_head_dim, c.rope_theta, c.rms_norm_eps
    queries, keys, values = [], [], []
    for t, h in enumerate(x):
        if c.q_lora_rank is None:
            q = m.q.weight @ h
        else:
            q = m.q_b.weight @ naive_norm(m.q_a.weight @ h, m.q_norm.weight, eps)
        down = m.kv_a.weight @ h
        up = (m.kv_b.weight @ naive_norm(down[: c.kv_lora_rank], m.kv_norm.weight, eps)).view(heads, -1)
        shared = naive_rope(down[c.kv_lora_rank :], t, base)
        rotated = [torch.cat([row[:nope], naive_rope(row[nope:], t, base)]) for row in q.view(heads, -1)]
        queries.append(torch.stack(rotated))
        keys.append(torch.stack([torch.cat([row[:nope], shared]) for row in up]))
        values.append(up[:, nope:])
    out = []
    for t in range(len(x)):
        scores = torch.einsum("hd,shd->hs", queries[t], torch.stack(keys[: t + 1])) * c.softmax_scale
        mixed = torch.einsum("hs,shd->hd", scores.softmax(-1), torch.stack(values[: t + 1]))
        out.append(m.out.weight @ mixed.flatten())
    return torch.stack(out)


@pytest.mark.parametrize(("q_lora_rank", "odd"), [(24, 0), (None, 0), (24, 1)])
def test_equals_a_naive_attention(q_lora_rank: int | None, odd: int) -> None:
    nope, latent = CONFIG.qk_nope_head_dim + odd, CONFIG.kv_lora_rank + odd
    config = replace(CONFIG, q_lora_rank=q_lora_rank, qk_nope_head_dim=nope, kv_lora_rank=latent)
    attention = filled(config)
    x = torch.randn(BATCH, TIME, config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = attention(x.flatten(0, 1), rotation(config, TIME)).view_as(x)
        wanted = torch.stack([naive_attention(attention, sequence) for sequence in x])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    unturned = attention(x.flatten(0, 1), torch.ones_like(rotation(config, TIME))).view_as(x)
    assert not torch.allclose(unturned, wanted, rtol=1e-2)  # without rotations the comparison fails


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    turns = rotation(CONFIG, 64)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(CONFIG.qk_rope_head_dim, generator=generator) for _ in range(2))
    turned_a, turned_b = (rotate(v.expand(1, 64, 1, -1), turns)[0, :, 0] for v in (a, b))
    torch.testing.assert_close(turned_a.norm(dim=1), a.norm().expand(64))
    products = turned_a @ turned_b.T
    for distance in (0, 1, 17):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_rotation_turns_neighbouring_pairs() -> None:
    x = torch.zeros(1, 2, 1, 4)
    x[..., 0] = 1.0
    turned = rotate(x, rotation(replace(CONFIG, qk_rope_head_dim=4), 2))[0, 1, 0]
    torch.testing.assert_close(turned, torch.tensor([math.cos(1), math.sin(1), 0.0, 0.0]))


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    config = replace(CONFIG, qk_rope_head_dim=64, yarn=Yarn(factor=40.0))
    plain, stretched = frequencies(replace(config, yarn=None)), frequencies(config)
    ratio = plain / stretched
    # The published code's ramp for 64 dimensions, base 10000, 4096 positions: pairs 10 to 23.
    torch.testing.assert_close(ratio[:11], torch.ones(11, dtype=torch.float64))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0, dtype=torch.float64))
    assert bool((ratio.diff() >= -1e-12).all())


def changes_before(model: V3, position: int) -> bool:
    tokens = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(4))
    other = tokens.clone()
    other[0, position:] = (other[0, position:] + 1) % 256
    with torch.no_grad():
        first, second = model(tokens).logits, model(other).logits
    assert not torch.equal(first[:, position:], second[:, position:])
    return not torch.allclose(first[:, :position], second[:, :position], rtol=1e-5, atol=1e-6)


def test_later_tokens_never_change_earlier_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = V3(PRESETS["tiny"].config)
    assert not any(changes_before(model, position) for position in (1, 12, 23))

    def attend_to_all(query: Tensor, key: Tensor, value: Tensor, scale: float, apart: None) -> Tensor:
        return (query @ key.transpose(1, 2) * scale).softmax(-1) @ value

    monkeypatch.setattr(attention_module, "causal_attention", attend_to_all)
    assert changes_before(model, 12)
