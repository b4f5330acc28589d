"""The published names of all weights beside ours: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Container, Iterator

from agent.model.config import V3Config

BIAS = "e_score_correction_bias"
#: Under an MTP module's layer the published weights hold the shared embedding and head once more.
COPIES = (("embed_tokens.weight", "embedding"), ("shared_head.head.weight", "head.weight"))

_ATTENTION = {
    "kv_a_proj_with_mqa.weight": "kv_a.weight",
    "kv_a_layernorm.weight": "kv_norm.weight",
    "kv_b_proj.weight": "kv_b.weight",
    "o_proj.weight": "out.weight",
}
_DIRECT = {"q_proj.weight": "q.weight"}
_LATENT = {"q_a_proj.weight": "q_a.weight", "q_a_layernorm.weight": "q_norm.weight", "q_b_proj.weight": "q_b.weight"}
_BIASES = {"kv_a_proj_with_mqa.bias": "kv_a.bias", "o_proj.bias": "out.bias"}
_LATENT_BIASES = {"q_a_proj.bias": "q_a.bias"}
_FFN = {"gate_proj.weight": "gate.weight", "up_proj.weight": "up.weight", "down_proj.weight": "down.weight"}
_MTP = {
    "enorm.weight": "embedding_norm.weight",
    "hnorm.weight": "hidden_norm.weight",
    "eh_proj.weight": "projection.weight",
    "shared_head.norm.weight": "norm.weight",
}


def keys(config: V3Config) -> dict[str, str]:
    """Published key -> name in our ``state_dict``, in the order of the layers.

    Our embedding and head occur once more per MTP module: two published keys then name one of ours.
    """
    return dict(_pairs(config))


def modules_in(found: Container[str], config: V3Config) -> int:
    """How many MTP modules weights with these keys hold: layers behind the last whose projection is there."""
    depth = 0
    while f"model.layers.{config.num_hidden_layers + depth}.eh_proj.weight" in found:
        depth += 1
    return depth


def _pairs(config: V3Config) -> Iterator[tuple[str, str]]:
    yield "model.embed_tokens.weight", "embedding"
    for i in range(config.num_hidden_layers):
        yield from _block(config, f"model.layers.{i}.", f"layers.{i}.", dense=i < config.first_k_dense_replace)
    for k in range(config.mtp_depth):
        there, here = f"model.layers.{config.num_hidden_layers + k}.", f"mtp.{k}."
        yield from ((there + copy, original) for copy, original in COPIES)
        yield from _renamed(_MTP, there, here)
        yield from _block(config, there, f"{here}block.", dense=False)
    yield "model.norm.weight", "norm.weight"
    yield "lm_head.weight", "head.weight"


def _block(config: V3Config, there: str, here: str, *, dense: bool) -> Iterator[tuple[str, str]]:
    yield f"{there}input_layernorm.weight", f"{here}attention_norm.weight"
    yield from _renamed(_attention(config), f"{there}self_attn.", f"{here}attention.")
    yield f"{there}post_attention_layernorm.weight", f"{here}ffn_norm.weight"
    if dense:
        yield from _renamed(_FFN, f"{there}mlp.", f"{here}ffn.")
    else:
        yield from _mixture(config, f"{there}mlp.", f"{here}moe.")


def _attention(config: V3Config) -> dict[str, str]:
    direct = config.q_lora_rank is None
    found = {**(_DIRECT if direct else _LATENT), **_ATTENTION}
    if config.attention_bias:
        found |= _BIASES if direct else {**_LATENT_BIASES, **_BIASES}
    return found


def _mixture(config: V3Config, there: str, here: str) -> Iterator[tuple[str, str]]:
    yield f"{there}gate.weight", f"{here}router.centroids.weight"
    yield f"{there}gate.{BIAS}", f"{here}router.router_bias"
    if config.n_shared_experts:
        yield from _renamed(_FFN, f"{there}shared_experts.", f"{here}shared.")
    for e in range(config.n_routed_experts):
        yield from _renamed(_FFN, f"{there}experts.{e}.", f"{here}experts.{e}.")


def _renamed(names: dict[str, str], there: str, here: str) -> Iterator[tuple[str, str]]:
    return ((there + one, here + other) for one, other in names.items())
