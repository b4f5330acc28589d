"""Named models that train on any machine, each with the batch and learning rate it was tried with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agent.model.config import V3Config

# Byte vocabulary: ids 0..255 are the bytes; eight more (a multiple of 8 keeps rows of logits aligned) are kept for
# document marks, padding and the like. Corpora of plain bytes never produce them.
BYTE_VOCAB = 256 + 8

# Twenty times the paper's 0.001: these runs last hundreds of steps, not hundreds of thousands. Measured over 100 steps
# of `tiny`: the fullest expert falls from 4.0 times the mean load (every token) to below 1.6, at the same loss.
_BIAS_UPDATE_SPEED = 0.02


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained. The learning rate rises over ``warmup_steps`` to ``peak_lr`` and stays there."""

    name: str
    config: V3Config
    seq_len: int  # positions per sequence, time
    micro_batch: int  # sequences per rank and step
    peak_lr: float
    warmup_steps: int

    @property
    def sample_len(self) -> int:
        """Tokens of one sample: time + 1 + D, what ``V3.loss`` takes."""
        return self.seq_len + 1 + self.config.mtp_depth


_TINY = Preset(
    name="tiny",
    config=V3Config(
        vocab_size=BYTE_VOCAB,
        hidden_size=128,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        q_lora_rank=96,
        kv_lora_rank=64,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        bias_update_speed=_BIAS_UPDATE_SPEED,
        initializer_range=0.02,
    ),
    seq_len=128,
    micro_batch=4,
    peak_lr=2e-3,
    warmup_steps=10,
)

_SMALL = Preset(
    name="small",
    config=V3Config(
        vocab_size=BYTE_VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        q_lora_rank=128,
        kv_lora_rank=64,
        intermediate_size=768,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        bias_update_speed=_BIAS_UPDATE_SPEED,
        initializer_range=0.012,
    ),
    seq_len=256,
    micro_batch=4,
    peak_lr=1e-3,
    warmup_steps=30,
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in (_TINY, _SMALL)})
