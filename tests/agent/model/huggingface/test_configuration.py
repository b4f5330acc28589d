"""Configurations from Hugging Face: harmless fields pass, what cannot be computed is refused by its name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_reference import YARN, base, drawn
from hypothesis import given
from hypothesis import strategies as st

from agent.model import V3, ConfigError, V3Config, Yarn, huggingface


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "llama"}, "model_type"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"num_attention_heads": 0, "num_key_value_heads": None}, "num_attention_heads"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": None}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"n_routed_experts": 9}, "n_group"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "rope_scaling"),
        ({"rope_scaling": {**YARN, "mscale": -1.0}}, "rope_scaling.mscale"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": float("nan")}}, "rope_scaling.mscale_all_dim"),
        ({"rope_scaling": {**YARN, "attention_factor": 0.0}}, "rope_scaling.attention_factor"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
        ({"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "quantization_config"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^[a-z_.]*{field}: ") as caught:
        huggingface.config(base(**changes))
    assert field in caught.value.field


@pytest.mark.parametrize("field", ["hidden_size", "n_routed_experts", "q_lora_rank", "v_head_dim"])
def test_a_missing_size_is_named(field: str) -> None:
    d = base()
    del d[field]
    with pytest.raises(ConfigError, match=f"^{field}: missing"):
        huggingface.config(d)


def test_only_the_argument_builds_mtp_modules() -> None:
    d = base(num_nextn_predict_layers=1)
    assert huggingface.config(d).mtp_depth == 0
    assert huggingface.config(d, mtp=2).mtp_depth == 2
    with pytest.raises(ConfigError, match="mtp_depth"):
        huggingface.config(d, mtp=-1)


def test_harmless_fields_are_ignored() -> None:
    harmless = {"use_cache": True, "torch_dtype": "bfloat16", "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
    assert huggingface.config(base(**harmless, auto_map={"AutoConfig": "x"})) == huggingface.config(base())


def test_both_ways_to_write_yarn_are_one() -> None:
    old = huggingface.config(base(rope_scaling=YARN, rope_theta=500.0))
    new = {**YARN, "rope_type": "yarn", "rope_theta": 500.0}
    assert huggingface.config(base(rope_scaling=None, rope_theta=None, rope_parameters=new)) == old
    assert old.yarn is not None
    assert old.rope_theta == 500.0


def test_a_factor_that_is_not_given_is_the_ratio_of_lengths() -> None:
    yarn = huggingface.config(base(rope_scaling={**YARN, "factor": None}, max_position_embeddings=320)).yarn
    assert yarn is not None
    assert yarn.factor == 10.0


def test_the_published_configuration_is_the_paper_s() -> None:
    c = huggingface.config(huggingface.DEEPSEEK_V3, mtp=1)
    assert (c.hidden_size, c.num_hidden_layers, c.n_routed_experts, c.num_moe_layers) == (7168, 61, 256, 59)
    assert c.yarn == Yarn()
    assert c.softmax_scale == pytest.approx(0.13523377)  # 192^-1/2 (0.1 ln 40 + 1)^2
    with torch.device("meta"):
        model = V3(replace(c, mtp_depth=0))
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352


@given(seed=st.integers(0, 10_000), mtp=st.integers(0, 2))
def test_a_document_says_all_that_the_computation_needs(seed: int, mtp: int) -> None:
    config = huggingface.config(drawn(seed), mtp=mtp)
    assert huggingface.config(huggingface.document(config), mtp=mtp) == config


def test_a_document_leaves_training_constants_out() -> None:
    config = V3Config(**{**vars(huggingface.config(base())), "balance_alpha": 0.5})
    assert huggingface.config(huggingface.document(config)) == replace(config, balance_alpha=0.0)
