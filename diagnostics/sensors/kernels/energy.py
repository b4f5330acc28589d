"""The check of products rounded to bf16 in three kernels, where torch's own operators would be 36 launches.

Identity, tolerance and blindness: those of `checks.rounded`, but that C S and A (W S) are not rounded to bf16, so that
of its sources of noise two are missing. One pass each over W, A and C; the norms of A are a by-product of its pass.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from diagnostics.sensors.kernels import programs
from diagnostics.sensors.tolerance import NORM_FLOOR, Kappa, Z

#: Rows of which on programs take the larger tiles: with fewer there would be too few programs for the multiprocessors.
_MANY = 4096
#: Triton's stages. The tiles are the best of six on an H200: at 8192 x 2048 x 6144 all three kernels take 0.107 ms, at
#: 2048 x 8192 x 6144 0.140, and cuBLAS's product 0.26.
_STAGES = 3
#: Tiles whose parts one program adds up at most, 8 KiB of registers.
_MOST_TILES = 1 << 12


def can_read(c: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether `readings` takes these: bf16 matrices, or batches of them, none empty and none too tall."""
    bf16 = all(each.dtype == torch.bfloat16 and each.numel() for each in (c, left, right))
    return bf16 and c.dim() in (2, 3) and max(_tiles(left.shape[-2]), _tiles(right.shape[-2])) <= _MOST_TILES


def readings(c: Tensor, left: Tensor, right: Tensor, probes: Tensor, kappa: Kappa, alpha: float, tail: float) -> Tensor:
    """Readings fp32 [..., M] of bf16 c [..., M, N] against alpha times left [..., M, K] times right [..., K, N].

    probes: bf16 [N, V] random signs, V a power of two from 16 on. tail: see `rounded.TAIL`. Any strides.
    """
    inner, n = right.shape[-2], right.shape[-1]
    seen, rows_of_weights, of_weights = _along(right, probes, 1.0, torch.bfloat16)
    predicted, squares, parts = _along(left, seen, alpha, torch.float32)
    whole = _batched(c)
    out = torch.empty(whole.shape[:-1], dtype=torch.float32, device=c.device)
    rows, terms = _tile(whole.shape[1])
    programs.energy[(triton.cdiv(whole.shape[1], rows), whole.shape[0])](
        whole,
        probes,
        predicted,
        squares,
        parts,
        of_weights,
        rows_of_weights.count_nonzero(-1),
        out,
        whole.shape[1],
        n,
        *whole.stride(),
        parts.shape[2],
        of_weights.shape[2],
        alpha * alpha,
        tail * kappa.output * (1 + 4 / n) ** 0.5,
        Z * abs(alpha) * kappa.accumulate_at(max(n, inner)),
        NORM_FLOOR,
        WIDEN=c.device.type == "cpu",
        TILES=triton.next_power_of_2(parts.shape[2]),
        TILES_OF_WEIGHTS=triton.next_power_of_2(of_weights.shape[2]),
        ROWS=rows,
        K=terms,
        V=probes.shape[1],
        num_stages=_STAGES,
    )
    return out.view(c.shape[:-1])


def _along(x: Tensor, vectors: Tensor, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """alpha x [..., m, k] times vectors [k, V] or [batch, k, V]; x's squared row norms; parts, as `along_probes`."""
    whole = _batched(x)
    (batch, m, k), v = whole.shape, vectors.shape[-1]
    rows, terms = _tile(m)
    tiles = triton.cdiv(m, rows)
    out = torch.empty(batch, m, v, dtype=dtype, device=x.device)
    squares = torch.empty(batch, m, dtype=torch.float32, device=x.device)
    parts = torch.empty(batch, 2, tiles, dtype=torch.float32, device=x.device)
    programs.along_probes[(tiles, batch)](
        whole,
        vectors,
        out,
        squares,
        parts,
        m,
        k,
        *whole.stride(),
        alpha,
        PER_BATCH=vectors.dim() == 3,
        WIDEN=x.device.type == "cpu",
        ROWS=rows,
        K=terms,
        V=v,
        num_stages=_STAGES,
    )
    return out, squares, parts


def _batched(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.unsqueeze(0)


def _tile(rows: int) -> tuple[int, int]:
    """Rows that a program takes, and the terms a step of it sums; 16 rows are the least that a tensor core takes."""
    return (64, 128) if rows > _MANY else (16, 256)


def _tiles(rows: int) -> int:
    return int(triton.cdiv(rows, _tile(rows)[0]))
