"""Routing does what the paper says: limited to groups, gated by affinities alone, balanced by bias and by loss."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model import PRESETS, Router, V3Config, updated_bias
from agent.model.router import Routing, chosen_experts, sequence_balance_loss

CONFIG = replace(
    PRESETS["tiny"].config, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4, hidden_size=32
)
BATCH, TIME = 3, 20


def routed(config: V3Config, seed: int = 0, bias_scale: float = 0.0) -> tuple[Router, Routing]:
    generator = torch.Generator().manual_seed(seed)
    router = Router(config)
    router.centroids.weight.data.normal_(0, 0.3, generator=generator)
    router.router_bias.normal_(0, bias_scale, generator=generator) if bias_scale else None
    return router, router(torch.randn(BATCH * TIME, config.hidden_size, generator=generator))


def groups_used(experts: Tensor, config: V3Config) -> int:
    per_group = config.n_routed_experts // config.n_group
    return max(len({int(e) // per_group for e in row}) for row in experts)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), bias_scale=st.sampled_from([0.0, 0.1, 100.0]))
def test_routing_keeps_its_promises(seed: int, bias_scale: float) -> None:
    _, routing = routed(CONFIG, seed, bias_scale)
    tokens, top = BATCH * TIME, CONFIG.num_experts_per_tok
    assert routing.experts.shape == routing.gates.shape == (tokens, top)
    assert all(len(set(row.tolist())) == top for row in routing.experts)
    assert groups_used(routing.experts, CONFIG) <= CONFIG.topk_group
    torch.testing.assert_close(routing.gates.sum(1), torch.full((tokens,), CONFIG.routed_scaling_factor))
    assert routing.counts.dtype == torch.int64
    assert int(routing.counts.sum()) == tokens * top
    assert routing.counts.tolist() == [int((routing.experts == e).sum()) for e in range(CONFIG.n_routed_experts)]


def test_without_the_limit_tokens_spread_over_more_groups() -> None:
    unlimited = replace(CONFIG, topk_group=CONFIG.n_group)
    _, routing = routed(unlimited)
    assert groups_used(routing.experts, unlimited) > CONFIG.topk_group


def naive_choice(choice: list[float], config: V3Config) -> set[int]:
    per_group = config.n_routed_experts // config.n_group
    groups = [list(range(g * per_group, (g + 1) * per_group)) for g in range(config.n_group)]
    worth = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(config.n_group), key=lambda g: -worth[g])[: config.topk_group]
    open_experts = [e for g in kept for e in groups[g]]
    return set(sorted(open_experts, key=lambda e: -choice[e])[: config.num_experts_per_tok])


def test_choice_equals_a_naive_one() -> None:
    choice = torch.rand(200, CONFIG.n_routed_experts, generator=torch.Generator().manual_seed(5)) - 0.5
    found = [set(row.tolist()) for row in chosen_experts(choice, CONFIG)]
    assert found == [naive_choice(row.tolist(), CONFIG) for row in choice]


def gates_of(scores: Tensor, experts: Tensor, config: V3Config) -> Tensor:
    picked = scores.gather(1, experts)
    return picked / picked.sum(1, keepdim=True) * config.routed_scaling_factor


def test_bias_steers_the_choice_but_never_a_gate() -> None:
    _, plain = routed(CONFIG)
    router, biased = routed(CONFIG, bias_scale=1.0)
    torch.testing.assert_close(biased.gates, gates_of(biased.scores, biased.experts, CONFIG))
    assert not torch.equal(plain.experts.sort(1).values, biased.experts.sort(1).values)
    with_bias = gates_of(biased.scores + router.router_bias, biased.experts, CONFIG)
    assert not torch.allclose(biased.gates, with_bias, rtol=1e-2)  # had the bias entered, this test would see it


def test_gates_are_plain_affinities_when_not_normalised() -> None:
    config = replace(CONFIG, norm_topk_prob=False, routed_scaling_factor=1.0)
    _, routing = routed(config)
    assert torch.equal(routing.gates, routing.scores.gather(1, routing.experts))


def test_router_stays_in_fp32_and_changes_no_state() -> None:
    router, _ = routed(CONFIG, bias_scale=1.0)
    before = router.router_bias.clone()
    routing = router(torch.randn(8, CONFIG.hidden_size).bfloat16())
    assert routing.scores.dtype == routing.gates.dtype == torch.float32
    assert torch.equal(before, router.router_bias)
    assert not router.router_bias.requires_grad


@given(st.lists(st.integers(0, 10_000), min_size=4, max_size=4))
def test_updated_bias_moves_each_expert_towards_the_mean(counts: list[int]) -> None:
    bias = torch.tensor([0.5, -0.5, 0.0, 0.25])
    new = updated_bias(bias, torch.tensor(counts), 0.001)
    mean = sum(counts) / 4
    for old, moved, count in zip(bias.tolist(), new.tolist(), counts, strict=True):
        direction = (mean > count) - (mean < count)
        assert moved == pytest.approx(old + 0.001 * direction)
    assert bias.tolist() == [0.5, -0.5, 0.0, 0.25]


def test_updated_bias_takes_all_layers_at_once() -> None:
    counts = torch.tensor([[3, 1], [1, 3]])
    assert torch.equal(updated_bias(torch.zeros(2, 2), counts, 0.5), torch.tensor([[-0.5, 0.5], [0.5, -0.5]]))


def test_bias_updates_balance_a_skewed_router_and_without_them_it_stays_skewed() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(512, 16, generator=generator) + torch.linspace(0, 0.5, 16)

    def fullest(gamma: float) -> float:
        bias = torch.zeros(16)
        for _ in range(200):
            counts = torch.bincount(chosen_experts(scores + bias, CONFIG).flatten(), minlength=16)
            bias = updated_bias(bias, counts, gamma)
        return float(counts.max() / counts.float().mean())

    assert fullest(0.005) < 1.3
    assert fullest(0.0) > 1.9


def naive_balance(scores: Tensor, config: V3Config) -> float:
    experts, top, total = config.n_routed_experts, config.num_experts_per_tok, 0.0
    for sequence in scores.view(BATCH, TIME, experts).tolist():
        for i in range(experts):
            chosen = sum(i in sorted(range(experts), key=lambda e: -row[e])[:top] for row in sequence)
            share = sum(row[i] / sum(row) for row in sequence) / TIME
            total += experts / (top * TIME) * chosen * share
    return config.balance_alpha * total / BATCH


def test_balance_loss_equals_a_naive_one() -> None:
    scores = torch.rand(BATCH * TIME, 16, generator=torch.Generator().manual_seed(3))
    assert float(sequence_balance_loss(scores, BATCH, CONFIG)) == pytest.approx(naive_balance(scores, CONFIG), rel=1e-5)


def test_balance_loss_is_per_sequence() -> None:
    """Two sequences that each use their own experts are unbalanced, though together they look balanced."""
    config = replace(CONFIG, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    first = torch.tensor([0.9, 0.9, 0.1, 0.1]).expand(8, 4)
    scores = torch.cat([first, first.flip(1)])
    apart = float(sequence_balance_loss(scores, 2, config))
    together = float(sequence_balance_loss(scores, 1, config))
    assert apart == pytest.approx(1e-4 * 1.8)
    assert together == pytest.approx(1e-4)


def test_balance_loss_pushes_overloaded_scores_down() -> None:
    scores = torch.tensor([0.9, 0.8, 0.2, 0.1]).repeat(8, 1).requires_grad_()
    config = replace(CONFIG, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    sequence_balance_loss(scores, 1, config).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert bool((scores.grad[:, :2] > 0).all())
    assert bool((scores.grad[:, 2:] < 0).all())
