"""Experts get their own tokens, tokens get their own sums, and what padding adds is nothing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model import PRESETS
from agent.model.dispatch import BF16_ROWS, combine, dispatch, plan
from agent.model.moe import MoE

CONFIG = replace(PRESETS["tiny"].config, hidden_size=32, moe_intermediate_size=24)


def choices(tokens: int, experts: int, top: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).topk(top).indices
    return chosen, torch.bincount(chosen.flatten(), minlength=experts)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 70),
    experts=st.integers(1, 9),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_slices_hold_exactly_the_tokens_of_their_expert(
    tokens: int, experts: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    top = data.draw(st.integers(1, experts))
    chosen, counts = choices(tokens, experts, top, data.draw(st.integers(0, 99)))
    layout = plan(chosen, counts, dtype)
    names = torch.arange(1, tokens + 1, dtype=torch.float32).unsqueeze(1)
    rows = dispatch(names, layout).flatten().tolist()
    assert len(rows) == sum(layout.sizes)
    start = 0
    for expert, size in enumerate(layout.sizes):
        wanted = [t + 1 for t in range(tokens) if expert in chosen[t].tolist()]
        assert rows[start : start + len(wanted)] == wanted  # in the order of the tokens
        assert not any(rows[start + len(wanted) : start + size])  # then nothing but padding
        assert size - len(wanted) < (BF16_ROWS if dtype == torch.bfloat16 else 1)
        start += size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dispatch_and_combine_have_the_gradients_of_indexing(dtype: torch.dtype) -> None:
    chosen, counts = choices(20, 5, 3, 7)
    layout = plan(chosen, counts, dtype)
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(20, 6, generator=generator).requires_grad_()
    gates = torch.rand(20, 3, generator=generator).requires_grad_()
    scale = torch.rand(sum(layout.sizes), 6, generator=generator)

    def plain() -> Tensor:
        source = torch.zeros(sum(layout.sizes), dtype=torch.int64).index_copy(
            0, layout.place, torch.arange(60) // 3
        )  # padding rows read token 0; nothing reads them back
        return ((x[source] * scale).sin()[layout.place].view(20, 3, 6) * gates.unsqueeze(-1)).sum(1)

    found = combine((dispatch(x, layout) * scale).sin(), gates, layout)
    torch.testing.assert_close(found, plain())
    ours = torch.autograd.grad(found.square().sum(), (x, gates))
    theirs = torch.autograd.grad(plain().square().sum(), (x, gates))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def filled(dtype: torch.dtype = torch.float32) -> MoE:
    moe = MoE(CONFIG, dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in moe.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return moe


def naive(moe: MoE, x: Tensor) -> Tensor:
    routing = moe.router(x)
    assert moe.shared is not None
    out = []
    for t, row in enumerate(x):
        y = moe.shared(row[None])[0]
        for expert, gate in zip(routing.experts[t].tolist(), routing.gates[t], strict=True):
            y = y + gate * moe.experts[expert](row[None])[0]
        out.append(y)
    return torch.stack(out)


def test_equals_a_naive_mixture() -> None:
    moe, x = filled(), torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    found, load = moe(x, 2)
    torch.testing.assert_close(found, naive(moe, x), rtol=1e-4, atol=1e-5)
    assert int(load.counts.sum()) == 40 * CONFIG.num_experts_per_tok


def test_bf16_is_near_fp32_and_fp32_out() -> None:
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    wide, narrow = filled()(x, 2)[0], filled(torch.bfloat16)(x.bfloat16(), 2)[0]
    assert narrow.dtype == torch.float32
    assert float(((wide - narrow).norm() / wide.norm()).detach()) < 0.02


def test_no_shared_expert_is_possible() -> None:
    moe = MoE(replace(CONFIG, n_shared_experts=0), torch.float32)
    assert moe.shared is None
    assert not [name for name, _ in moe.named_parameters() if "shared" in name]


def test_experts_without_tokens_leave_their_gradients_alone() -> None:
    moe, x = filled(), torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    favoured = torch.tensor([0, 1])  # one group of two: nobody else gets a token
    moe.router.router_bias[favoured] += 100.0
    flat = torch.zeros(sum(p.numel() for p in moe.experts.parameters()))
    start = 0
    for parameter in moe.experts.parameters():
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    y, load = moe(x, 2)
    y.square().sum().backward()
    assert load.counts.nonzero().flatten().tolist() == [0, 1]
    per_expert = flat.view(CONFIG.n_routed_experts, -1)
    assert [bool(row.any()) for row in per_expert] == [True, True] + [False] * 6
