"""The smallest model that has every part: a dense layer and one of eight experts."""

from agent.model import V3Config

CONFIG = V3Config(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    kv_lora_rank=12,
    intermediate_size=20,
    moe_intermediate_size=12,
    n_routed_experts=8,
    num_experts_per_tok=2,
)
