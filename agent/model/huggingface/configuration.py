"""Between a Hugging Face configuration dictionary and ours: what we cannot compute is refused by the field's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.model.config import ConfigError, V3Config, Yarn
from agent.model.huggingface.blocks import BLOCK

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
)
#: The values we compute, the first being what Hugging Face assumes where the field is not given.
_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v3",),
    "hidden_act": ("silu", "swish"),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "tie_word_embeddings": (False,),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
}
#: What Hugging Face's configuration class assumes where a field is not given (transformers 5.24).
_DEFAULTS: Mapping[str, Any] = {
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
}


def config(d: Mapping[str, Any], mtp: int = 0) -> V3Config:
    """Our configuration for a Hugging Face one, as in config.json or from ``to_dict()`` of its configuration class.

    The loss is the one Hugging Face computes: the balance loss, which it does not have, is off. Whoever trains sets
    ``balance_alpha`` and its companions with ``dataclasses.replace``.

    Args:
        d: the dictionary. Fields that change nothing of what we compute are ignored; sizes must be given, and so must
            ``q_lora_rank`` (null: queries are projected directly).
        mtp: how many MTP modules to build. ``num_nextn_predict_layers`` alone builds none, as with Hugging Face.

    Raises:
        ConfigError: a field is missing, cannot be, or asks for what is not supported; it names the field.
    """
    _refuse_what_is_not_supported(d)
    for name in (*_SIZES, "q_lora_rank"):
        if name not in d:
            raise ConfigError(name, "missing from the configuration")
    known = {**_DEFAULTS, **d}
    layers, dense = d["num_hidden_layers"], known["first_k_dense_replace"]
    if isinstance(layers, int) and isinstance(dense, int):
        dense = min(dense, layers)  # three dense layers of two are two: Hugging Face compares indices only
    return V3Config(
        **{name: d[name] for name in _SIZES},
        q_lora_rank=d["q_lora_rank"],
        first_k_dense_replace=dense,
        n_shared_experts=0 if known["n_shared_experts"] is None else known["n_shared_experts"],
        n_group=known["n_group"],
        topk_group=known["topk_group"],
        routed_scaling_factor=known["routed_scaling_factor"],
        norm_topk_prob=_flag(known, "norm_topk_prob"),
        attention_bias=_flag(known, "attention_bias"),
        rms_norm_eps=known["rms_norm_eps"],
        initializer_range=known["initializer_range"],
        rope_theta=_rope(d)[1].get("rope_theta", d.get("rope_theta", 10000.0)),
        yarn=_yarn(known),
        balance_alpha=0.0,
        mtp_depth=mtp,
    )


def document(c: V3Config, dtype: str = "float32") -> dict[str, Any]:
    """The published form of a configuration: a config.json from which :func:`config` with ``mtp`` makes it again.

    Training constants (``balance_alpha``, ``bias_update_speed``, ``mtp_weight``) and ``mtp_after_norm`` have no field
    there. ``dtype`` is torch's name of the weights' type.
    """
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: getattr(c, name) for name in _SIZES},
        "num_key_value_heads": c.num_attention_heads,
        "num_nextn_predict_layers": c.mtp_depth,
        "q_lora_rank": c.q_lora_rank,
        "first_k_dense_replace": c.first_k_dense_replace,
        "n_shared_experts": c.n_shared_experts,
        "n_group": c.n_group,
        "topk_group": c.topk_group,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": c.norm_topk_prob,
        "routed_scaling_factor": c.routed_scaling_factor,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "attention_bias": c.attention_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": c.rms_norm_eps,
        "initializer_range": c.initializer_range,
        "rope_theta": c.rope_theta,
        "rope_interleave": True,
        "rope_scaling": _rope_scaling(c.yarn),
        "max_position_embeddings": _positions(c.yarn),
        "tie_word_embeddings": False,
        # A vocabulary of bytes has no such marks; the published ids would be two of its bytes.
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
    }


def _refuse_what_is_not_supported(d: Mapping[str, Any]) -> None:
    for name, values in _SUPPORTED.items():
        if name in d and d[name] not in values:
            raise ConfigError(name, f"{d[name]!r} is not supported; use {values[0]!r}")
    heads, kv_heads = d.get("num_attention_heads"), d.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ConfigError("num_key_value_heads", f"must be num_attention_heads, {heads}, not {kv_heads!r}")
    quantised = d.get("quantization_config")
    if quantised is None:
        return
    if not isinstance(quantised, Mapping):
        raise ConfigError("quantization_config", f"must be a table of settings, not {quantised!r}")
    method, size = quantised.get("quant_method"), quantised.get("weight_block_size")
    if method != "fp8" or size != [BLOCK, BLOCK]:
        supported = f"only fp8 in blocks of {BLOCK} x {BLOCK} is supported"
        raise ConfigError("quantization_config", f"{supported}, not {method!r} in {size!r}")


def _flag(known: Mapping[str, Any], name: str) -> bool:
    flag = known[name]
    if flag is not None and not isinstance(flag, bool):
        raise ConfigError(name, f"must be true or false, not {flag!r}")
    return bool(flag)


def _rope(d: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The rotary settings and the name they were given under; the older name wins, as with Hugging Face."""
    for name in ("rope_scaling", "rope_parameters"):
        if rope := d.get(name):
            if not isinstance(rope, Mapping):
                raise ConfigError(name, f"must be a table of settings, not {rope!r}")
            return name, rope
    return "rope_parameters", {}


def _yarn(known: Mapping[str, Any]) -> Yarn | None:
    source, rope = _rope(known)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{source}.partial_rotary_factor", "only 1.0 is supported")
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"{source}.rope_type", f"{kind!r} is not supported; use 'yarn' or 'default'")
    longest = known["max_position_embeddings"]
    original = known.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", longest))
    factor = rope.get("factor")
    try:
        return Yarn(
            factor=longest / original if factor is None else factor,
            original_max_position_embeddings=original,
            beta_fast=rope.get("beta_fast") or 32,
            beta_slow=rope.get("beta_slow") or 1,
            mscale=rope.get("mscale") or 0.0,
            mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
            attention_factor=rope.get("attention_factor"),
            truncate=rope.get("truncate", True),
        )
    except ConfigError as error:
        raise ConfigError(error.field.replace("yarn", source), error.reason) from error
    except (TypeError, ZeroDivisionError) as error:
        raise ConfigError(source, f"holds what is not a number: {error}") from error


def _rope_scaling(yarn: Yarn | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    given = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    if yarn.attention_factor is not None:
        given["attention_factor"] = yarn.attention_factor
    return given if yarn.truncate else {**given, "truncate": False}


def _positions(yarn: Yarn | None) -> int:
    """Nothing in the model depends on it; Hugging Face wants to know."""
    if yarn is None:
        return int(_DEFAULTS["max_position_embeddings"])
    return round(yarn.factor * yarn.original_max_position_embeddings)
