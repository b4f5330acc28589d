"""The shape of a model as one frozen value, checked when it is made, so that no later code meets an impossible one.

Field names are those of the published ``config.json`` where it has the field; symbols in comments are the paper's
(DeepSeek-V3, arXiv 2412.19437).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be; ``field`` is the name of the field at fault, ``reason`` what is wrong with it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


@dataclass(frozen=True)
class Yarn:
    """Context extension by YaRN (arXiv 2309.00071; V3 section 4.3): factor 40, beta 32 and 1 at 671B.

    YaRN sharpens attention by m(a) = 0.1 a ln(factor) + 1. The published code does it in two places: the softmax scale
    takes m(mscale_all_dim) squared, and the rotated part of queries and of keys is longer by m(mscale) /
    m(mscale_all_dim), or by m(1) when either is 0. At 671B both are 1: the rotated parts keep their length.
    """

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0  # 0: the softmax scale stays as it is
    attention_factor: float | None = None  # length of the rotated parts, if not by the rule above
    truncate: bool = True  # the ramp between kept and stretched pairs begins and ends at whole pairs

    def __post_init__(self) -> None:
        _require("yarn.factor", math.isfinite(self.factor) and self.factor >= 1, f"must be >= 1, not {self.factor}")
        _whole("yarn.original_max_position_embeddings", self.original_max_position_embeddings)
        ordered = self.beta_fast > self.beta_slow > 0
        _require("yarn.beta_fast", ordered, f"must be above beta_slow > 0, not {self.beta_fast} and {self.beta_slow}")
        for name in ("mscale", "mscale_all_dim"):
            _number(f"yarn.{name}", getattr(self, name), positive=False)
        if self.attention_factor is not None:
            _number("yarn.attention_factor", self.attention_factor, positive=True)

    @property
    def temperature(self) -> float:
        """Factor on all of queries and keys alike: 0.1 mscale_all_dim ln(factor) + 1 (YaRN, section 3.4)."""
        return self._sharpening(self.mscale_all_dim)

    @property
    def magnitude(self) -> float:
        """Length that the rotated part of queries and of keys is given; 1 at 671B."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._sharpening(self.mscale) / self._sharpening(self.mscale_all_dim)
        return self._sharpening(1.0)

    def _sharpening(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class V3Config:
    """One model's shape and the constants of its loss.

    Raises:
        ConfigError: a value out of range, or two values that do not fit together; it names the field.
    """

    vocab_size: int
    hidden_size: int  # d
    num_hidden_layers: int  # L, without the MTP modules
    first_k_dense_replace: int  # the first layers have a plain FFN (section 4.2: three at 671B)
    num_attention_heads: int  # n_h
    qk_nope_head_dim: int  # d_h
    qk_rope_head_dim: int  # d_h^R
    v_head_dim: int
    kv_lora_rank: int  # d_c
    intermediate_size: int  # of the plain FFN
    moe_intermediate_size: int  # of one expert
    n_routed_experts: int  # N_r
    num_experts_per_tok: int  # K_r
    q_lora_rank: int | None = None  # d_c'; None: queries are projected directly
    n_shared_experts: int = 1  # N_s, computed as one FFN of N_s times the width
    n_group: int = 1  # groups of experts, one per node in the paper's deployment
    topk_group: int = 1  # M: a token's experts lie in at most so many groups (section 2.1.2, node-limited routing)
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True  # normalise the gates (eq. 13)
    balance_alpha: float = 1e-4  # of the sequence-wise balance loss (eq. 17; value from section 4.2)
    bias_update_speed: float = 1e-3  # gamma (section 4.2)
    mtp_depth: int = 1  # D
    mtp_weight: float = 0.3  # lambda (eq. 25; 0.3, later 0.1: section 4.2)
    mtp_after_norm: bool = True  # h^0 is taken after the final norm; public codes differ
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6  # of the norms on both latents; public codes fix it whatever rms_norm_eps is
    attention_bias: bool = False  # on the products that leave the residual stream for a latent, and on the output
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    initializer_range: float = 0.006  # standard deviation of the initial weights (section 4.2)

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            _whole(name, getattr(self, name))
        for name in _AT_LEAST_ZERO:
            _whole(name, getattr(self, name), least=0)
        for name in _POSITIVE:
            _number(name, getattr(self, name), positive=True)
        for name in _NOT_NEGATIVE:
            _number(name, getattr(self, name), positive=False)
        if self.q_lora_rank is not None:
            _whole("q_lora_rank", self.q_lora_rank)
        self._check_layers()
        self._check_groups()

    def _check_layers(self) -> None:
        dense, layers = self.first_k_dense_replace, self.num_hidden_layers
        _require("first_k_dense_replace", dense <= layers, f"{dense} dense layers of {layers} in all")
        _require("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, f"must be even, not {self.qk_rope_head_dim}")
        _require(
            "rope_theta", self.yarn is None or self.rope_theta > 1, f"must be above 1 with YaRN: {self.rope_theta}"
        )

    def _check_groups(self) -> None:
        experts, groups, kept, top = self.n_routed_experts, self.n_group, self.topk_group, self.num_experts_per_tok
        _require("n_group", experts % groups == 0, f"{experts} routed experts do not divide into {groups} groups")
        _require("topk_group", kept <= groups, f"{kept} groups kept of {groups}")
        reachable = experts // groups * kept
        _require("num_experts_per_tok", top <= reachable, f"top {top} of {reachable} reachable experts")
        enough = groups == 1 or experts // groups >= 2
        _require("n_group", enough, "a group's score is the sum of its two best experts, so it needs two")

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head, d_h + d_h^R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with a router, MTP modules included; the rows of ``counts`` in a loss."""
        return self.num_hidden_layers - self.first_k_dense_replace + self.mtp_depth

    @property
    def softmax_scale(self) -> float:
        """(d_h + d_h^R)^-1/2 (eq. 10), times YaRN's temperature squared."""
        temperature = self.yarn.temperature if self.yarn else 1.0
        return float(self.qk_head_dim**-0.5 * temperature**2)


_AT_LEAST_ONE = (
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
    "n_group",
    "topk_group",
)
_AT_LEAST_ZERO = ("first_k_dense_replace", "n_shared_experts", "mtp_depth")
_POSITIVE = ("rms_norm_eps", "latent_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range")
_NOT_NEGATIVE = ("balance_alpha", "bias_update_speed", "mtp_weight")


def _require(field: str, holds: bool, reason: str) -> None:
    if not holds:
        raise ConfigError(field, reason)


def _whole(field: str, value: Any, least: int = 1) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    _require(field, is_whole and value >= least, f"must be a whole number >= {least}, not {value!r}")


def _number(field: str, value: Any, *, positive: bool) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    bound = "above 0" if positive else ">= 0"
    _require(field, is_number and (value > 0 if positive else value >= 0), f"must be {bound}, not {value!r}")
