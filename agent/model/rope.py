"""Rotary position embedding (arXiv 2104.09864) on interleaved pairs, with YaRN's stretched frequencies when asked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agent.model.config import V3Config, Yarn


def rotation(config: V3Config, length: int, device: torch.device | None = None) -> Tensor:
    """Rotations e^{i t theta_j} of positions 0..length-1: complex64 [length, qk_rope_head_dim / 2].

    Their length is 1, or YaRN's magnitude. Computed anew for each forward (it is tiny), in fp64 so that far positions
    keep their phase.
    """
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies(config, device))
    magnitude = config.yarn.magnitude if config.yarn else 1.0
    return torch.polar(torch.full_like(angles, magnitude), angles).to(torch.complex64)


def frequencies(config: V3Config, device: torch.device | None = None) -> Tensor:
    """theta_j = base^(-2j/d), fp64 [d/2]; under YaRN the slow ones are divided by its factor."""
    size = config.qk_rope_head_dim
    steps = torch.arange(0, size, 2, dtype=torch.float64, device=device)
    plain = config.rope_theta ** (-steps / size)
    if config.yarn is None:
        return plain
    keep = _kept_share(config.yarn, size, config.rope_theta, device)
    return plain * keep + plain / config.yarn.factor * (1 - keep)


def _kept_share(yarn: Yarn, size: int, base: float, device: torch.device | None) -> Tensor:
    """1 for pairs that turn over beta_fast times within the original context, 0 below beta_slow, a ramp between."""

    def pair_of(turns: float) -> float:
        return size * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, size - 1)
    # The public codes' guard against a ramp of no width. Where an original context shorter than one turn, or longer
    # than beta_fast turns of the slowest pair, turns the ramp round, we follow them too.
    width = high - low or 1e-3
    pairs = torch.arange(size // 2, dtype=torch.float64, device=device)
    return 1 - ((pairs - low) / width).clamp(0, 1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair (x[2j], x[2j+1]) of [batch, time, heads, d] by ``turns`` [time, d/2]; keeps shape and dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if any(stride % 2 for stride in (*wide.stride()[:-1], wide.storage_offset())):  # heads of an odd width:
        wide = wide.clone(memory_format=torch.contiguous_format)  # a complex view wants to start and stride evenly
    pairs = torch.view_as_complex(wide.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None, :]).flatten(-2).to(x.dtype)
