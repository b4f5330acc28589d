"""A configuration that cannot be is refused by the name of its field, and the presets are what they claim."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import PRESETS, V3, ConfigError, V3Config, Yarn
from agent.training.schedule import learning_rate

BASE = PRESETS["tiny"].config


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": -128}, "hidden_size"),
        ({"hidden_size": 128.0}, "hidden_size"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 8, "topk_group": 4}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"mtp_depth": -1}, "mtp_depth"),
        ({"mtp_weight": -0.1}, "mtp_weight"),
        ({"balance_alpha": math.nan}, "balance_alpha"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"initializer_range": math.inf}, "initializer_range"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: ") as caught:
        replace(BASE, **changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"factor": 0.5}, "yarn.factor"),
        ({"original_max_position_embeddings": 0}, "yarn.original_max_position_embeddings"),
        ({"beta_fast": 1.0, "beta_slow": 1.0}, "yarn.beta_fast"),
        ({"mscale": -1.0}, "yarn.mscale"),
    ],
)
def test_impossible_yarn_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Yarn(**changes)


@given(
    groups=st.integers(1, 12),
    experts=st.integers(1, 48),
    kept=st.integers(1, 12),
    top=st.integers(1, 48),
)
def test_groups_are_accepted_exactly_when_a_router_can_serve_them(
    groups: int, experts: int, kept: int, top: int
) -> None:
    possible = (
        experts % groups == 0
        and kept <= groups
        and top <= experts // groups * kept
        and (groups == 1 or experts // groups >= 2)
    )
    try:
        replace(BASE, n_group=groups, n_routed_experts=experts, topk_group=kept, num_experts_per_tok=top)
        accepted = True
    except ConfigError:
        accepted = False
    assert accepted == possible


def test_softmax_scale_has_yarn_temperature_squared() -> None:
    plain = BASE.softmax_scale
    assert plain == pytest.approx((BASE.qk_nope_head_dim + BASE.qk_rope_head_dim) ** -0.5)
    stretched = replace(BASE, yarn=Yarn(factor=40.0)).softmax_scale
    assert stretched / plain == pytest.approx((0.1 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 1.7e6, 2.3e6), ("small", 8.0e6, 8.8e6)])
def test_presets_have_the_promised_size(name: str, low: float, high: float) -> None:
    model = V3(PRESETS[name].config)
    assert low <= sum(p.numel() for p in model.parameters()) <= high


def test_small_has_the_promised_shape() -> None:
    c = PRESETS["small"].config
    shape = (c.hidden_size, c.num_hidden_layers, c.first_k_dense_replace, c.n_routed_experts, c.num_experts_per_tok)
    assert shape == (256, 4, 1, 16, 4)
    assert (c.mtp_depth, PRESETS["small"].sample_len) == (1, PRESETS["small"].seq_len + 2)


def test_the_published_configuration_is_accepted() -> None:
    published = V3Config(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        first_k_dense_replace=3,
        num_attention_heads=128,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        yarn=Yarn(),
    )
    assert published.num_moe_layers == 59


@given(step=st.integers(1, 10_000))
def test_learning_rate_warms_up_and_stays(step: int) -> None:
    for preset in PRESETS.values():
        rate = learning_rate(step, preset)
        assert 0 < rate <= preset.peak_lr
        assert rate <= learning_rate(step + 1, preset)
        assert (rate == preset.peak_lr) == (step >= preset.warmup_steps)


def test_learning_rate_has_no_step_zero() -> None:
    with pytest.raises(ValueError, match="step"):
        learning_rate(0, PRESETS["tiny"])
