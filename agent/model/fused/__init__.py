"""Operations whose gradient is written by hand, because autograd's own record of them costs memory passes."""

from agent.model.fused.attention import causal_attention
from agent.model.fused.cross_entropy import NO_LABEL, cross_entropy
from agent.model.fused.experts import Weights, routed_experts
from agent.model.fused.heads import key_value_heads, query_heads
from agent.model.fused.norm import rms_norm

__all__ = [
    "NO_LABEL",
    "Weights",
    "causal_attention",
    "cross_entropy",
    "key_value_heads",
    "query_heads",
    "rms_norm",
    "routed_experts",
]
