"""Triton kernels of the recipe: quantise, and multiply block-scaled codes with fp32 promotion every 128."""

from __future__ import annotations

import triton
import triton.language as tl

# The recipe's constants (see `recipe`), as Triton wants them.
_BLOCK = tl.constexpr(128)
_LARGEST = tl.constexpr(448.0)
_LEAST_AMAX = tl.constexpr(1e-4)
_NOT_BELOW = tl.constexpr(2.0**100)
_LEAST_NORMAL = tl.constexpr(2.0**-6)
_SHIFT = tl.constexpr(1.5 * 2.0**20)
_SATURATES = tl.constexpr(432.0)
_VANISHES = tl.constexpr(2.0**-10)


@triton.jit
def rounded(x):
    """x to the nearest E4M3 value, ties to even, by the adder (see `emulation`): the cast that follows is exact then.

    Triton's interpreter rounds casts otherwise than GPUs do (3.7 and 3.9: no carry, ties away, small values cut off).
    """
    step = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(step, _LEAST_NORMAL) * _SHIFT
    return (x + step) - step


@triton.jit
def quantise(
    x,
    codes,
    scales,
    counts,
    rows,
    k,
    stride_row,
    stride_k,
    HEIGHT: tl.constexpr,
    SHARED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    COUNT: tl.constexpr,
):
    """HEIGHT x 128 of x [rows, k] (any strides) to E4M3 codes [rows, k].

    SHARED: one scale for the whole tile, else one for each row. Grid: (rows / HEIGHT, k / 128), rounded up; scales
    fp32 [rows or grid rows, grid columns]; counts fp32 [grid, 4] as `Tally.add` takes them.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    row, column = i * HEIGHT + tl.arange(0, HEIGHT), j * _BLOCK + tl.arange(0, _BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < k)
    value = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_k, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(value)
    # A maximum may pass NaN by: what is not below the bound is asked for by itself.
    bad = tl.where(magnitude < _NOT_BELOW, 0.0, 1.0)
    amax, spoilt = tl.max(tl.where(bad > 0, 0.0, magnitude), 1), tl.max(bad, 1)
    if SHARED:
        amax, spoilt = tl.max(amax, 0) + tl.zeros_like(amax), tl.max(spoilt, 0) + tl.zeros_like(spoilt)
    scale = tl.div_rn(tl.maximum(amax, _LEAST_AMAX), tl.full(amax.shape, _LARGEST, tl.float32))
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(spoilt > 0, float("nan"), scale)
    scaled = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    tl.store(codes + row[:, None] * k + column[None, :], rounded(scaled).to(tl.float8e4nv), mask=inside)
    blocks = tl.num_programs(1)
    if SHARED:
        first = tl.where(tl.arange(0, HEIGHT) == 0, scale, 0.0)  # all rows have the same
        tl.store(scales + i * blocks + j, tl.sum(first, 0))
    else:
        tl.store(scales + row * blocks + j, scale, mask=row < rows)
    if COUNT:
        out = counts + (i * blocks + j) * 4
        size = tl.abs(scaled)
        tl.store(out, tl.max(amax, 0) + tl.sum(tl.where(spoilt > 0, float("nan"), 0.0), 0))
        tl.store(out + 1, tl.sum(tl.sum(tl.where(size >= _SATURATES, 1.0, 0.0), 1), 0))
        tl.store(out + 2, tl.sum(tl.sum(tl.where((size <= _VANISHES) & (magnitude > 0), 1.0, 0.0), 1), 0))
        tl.store(out + 3, tl.sum(tl.sum(tl.where(magnitude > 0, 1.0, 0.0), 1), 0))


@triton.jit
def multiply(
    a,
    b,
    scales_a,
    scales_b,
    out,
    m,
    n,
    k,
    TILED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """out fp32 [m, n] = a [m, k] times the transpose of b [n, k], both E4M3 codes, contiguous.

    a has 1x128 scales [m, k / 128]; b has them too, or 128x128 ones [n / 128, k / 128] (TILED). Grid: (m / M, n / N),
    rounded up; N divides 128. The tensor core sums 128 products in its own precision (about 14 bits on Hopper); the
    partial sums are scaled and added in fp32 (section 3.3.2, N_C = 128).
    """
    row, column = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    inner = tl.arange(0, _BLOCK)
    blocks = tl.cdiv(k, _BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for j in range(blocks):
        at = j * _BLOCK + inner
        left = tl.load(a + row[:, None] * k + at[None, :], mask=(row[:, None] < m) & (at[None, :] < k), other=0.0)
        right = tl.load(
            b + column[None, :] * k + at[:, None], mask=(column[None, :] < n) & (at[:, None] < k), other=0.0
        )
        scale_a = tl.load(scales_a + row * blocks + j, mask=row < m, other=0.0)
        which = column // _BLOCK if TILED else column
        scale_b = tl.load(scales_b + which * blocks + j, mask=column < n, other=0.0)
        total += tl.dot(left, right, out_dtype=tl.float32) * scale_a[:, None] * scale_b[None, :]
    tl.store(out + row[:, None] * n + column[None, :], total, mask=(row[:, None] < m) & (column[None, :] < n))
