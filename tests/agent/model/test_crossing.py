"""Copies that cross between nodes, counted by hand and by the code; node-limited routing stays within its limit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model import PRESETS, V3, V3Config, huggingface
from agent.model.crossing import Crossing, NodeLimitExceeded, assert_node_limited, compare, crossing, token_bytes
from agent.model.router import chosen_experts

CONFIG = replace(PRESETS["tiny"].config, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2)


def scores(tokens: int, config: V3Config, seed: int) -> Tensor:
    return torch.rand(tokens, config.n_routed_experts, generator=torch.Generator().manual_seed(seed))


def by_hand(experts: Tensor, home: Tensor, node_of: Tensor, copy_bytes: int) -> Crossing:
    copies = unmerged = widest = 0
    for chosen, own in zip(experts.tolist(), home.tolist(), strict=True):
        nodes = [int(node_of[expert]) for expert in chosen]
        copies += len(set(nodes) - {own})
        unmerged += sum(node != own for node in nodes)
        widest = max(widest, len(set(nodes)))
    return Crossing(len(home), copies, unmerged, copies * copy_bytes, widest)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 40), nodes=st.integers(1, 5), top=st.integers(1, 6), seed=st.integers(0, 99))
def test_copies_are_counted_as_by_hand(tokens: int, nodes: int, top: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, 12, generator=generator).topk(top).indices
    home = torch.randint(0, nodes, (tokens,), generator=generator)
    node_of = torch.randint(0, nodes, (12,), generator=generator)
    assert crossing(experts, home, node_of, 7) == by_hand(experts, home, node_of, 7)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 50), seed=st.integers(0, 999))
def test_the_router_keeps_to_its_groups(tokens: int, seed: int) -> None:
    choice = scores(tokens, CONFIG, seed)
    assert_node_limited(chosen_experts(choice, CONFIG), CONFIG)
    found = compare(choice, torch.arange(tokens) % 4, CONFIG, copy_bytes=1)
    assert found.limited.widest <= CONFIG.topk_group


def test_without_the_limit_it_does_not() -> None:
    choice = scores(64, CONFIG, 1)
    free = choice.topk(CONFIG.num_experts_per_tok).indices
    with pytest.raises(NodeLimitExceeded, match="topk_group is 2") as caught:
        assert_node_limited(free, CONFIG)
    reached = {int(expert) // 4 for expert in free[caught.value.token]}
    assert len(reached) > 2
    assert_node_limited(free[: caught.value.token], CONFIG)  # it is the first
    assert_node_limited(free[:0], CONFIG)


def test_the_choices_of_a_model_are_within_the_limit() -> None:
    model = V3(PRESETS["tiny"].config)
    seen = []
    for router in model.routers():
        router.register_forward_hook(lambda _m, _a, routing: seen.append(routing.experts))
    model.loss(torch.randint(0, 256, (2, 34), generator=torch.Generator().manual_seed(0)))
    assert len(seen) == 3
    for experts in seen:
        assert_node_limited(experts, model.config)


def test_the_limit_saves_bytes_at_the_published_shape() -> None:
    config = huggingface.config(huggingface.DEEPSEEK_V3)
    home = torch.arange(4096) % config.n_group
    found = compare(scores(4096, config, 0), home, config, copy_bytes=token_bytes(config.hidden_size, "fp8"))
    assert found.limited.widest == 4
    assert found.unlimited.widest > 4
    assert found.limited.nbytes < 0.8 * found.unlimited.nbytes
    assert found.limited.copies < found.limited.unmerged
    same = compare(scores(64, config, 0), home[:64], replace(config, topk_group=8), copy_bytes=1)
    assert same.limited == same.unlimited  # with every group kept there is no limit


def test_two_groups_may_share_a_node() -> None:
    choice, home = scores(64, CONFIG, 3), torch.zeros(64, dtype=torch.int64)
    assert compare(choice, home, CONFIG, copy_bytes=1, nodes=1).limited.copies == 0
    assert compare(choice, home, CONFIG, copy_bytes=1, nodes=2).limited.widest <= 2
    with pytest.raises(ValueError, match="nodes: 4 groups"):
        compare(choice, home, CONFIG, copy_bytes=1, nodes=3)


def test_bytes_of_a_token() -> None:
    assert [token_bytes(7168, kind) for kind in ("fp8", "bf16", "fp32")] == [7168 + 224, 14336, 28672]
    with pytest.raises(ValueError, match="precision"):
        token_bytes(7168, "int4")
