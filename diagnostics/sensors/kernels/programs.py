"""The kernels themselves, in Triton's language; what launches them says what they are for."""

from __future__ import annotations

import triton
import triton.language as tl

_BLOCK = tl.constexpr(128)  # values that share a scale (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)
_LEAST_NORMAL = tl.constexpr(2.0**-6)  # E4M3's smallest normal value; below it values are multiples of 2^-9
# fp32 has 20 bits more below the leading one than E4M3: adding 1.5 * 2^20 times a value's power of two moves the last
# kept bit to the end of the sum.
_SHIFT = tl.constexpr(1.5 * 2.0**20)
# splitmix64's constants, as in `multilinear`.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_AGAIN = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def rounded(x):
    """x to the nearest E4M3 value, ties to even, by the fp32 adder: the cast that follows is exact.

    Triton's interpreter rounds casts otherwise than GPUs do.
    """
    step = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(step, _LEAST_NORMAL) * _SHIFT
    return (x + step) - step


@triton.jit
def quantise_and_sum(
    x,
    along,
    down,
    codes,
    scales,
    row_sums,
    column_sums,
    rows,
    k,
    stride_row,
    stride_k,
    largest,
    least_amax,
    not_below,
    HEIGHT: tl.constexpr,
    SHARED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    DOWN: tl.constexpr,
):
    """HEIGHT x 128 of x [rows, k] (any strides) to E4M3 codes [rows, k], and the sums of what the codes stand for.

    SHARED: one scale for the whole tile, else one for each row. Grid: (rows / HEIGHT, k / 128), rounded up. scales
    fp32 [rows or grid rows, grid columns]; row_sums fp32 [2, rows, grid columns]: value times along [k], and squares;
    column_sums fp32 [grid rows, k]: value times down [rows], where DOWN.
    """
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks = tl.num_programs(1)
    row, column = i * HEIGHT + tl.arange(0, HEIGHT), j * _BLOCK + tl.arange(0, _BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < k)
    value = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_k, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(value)
    bad = tl.where(magnitude < not_below, 0.0, 1.0)  # a maximum may pass NaN by
    amax, spoilt = tl.max(tl.where(bad > 0, 0.0, magnitude), 1), tl.max(bad, 1)
    if SHARED:
        amax, spoilt = tl.max(amax, 0) + tl.zeros_like(amax), tl.max(spoilt, 0) + tl.zeros_like(spoilt)
    scale = tl.div_rn(tl.maximum(amax, least_amax), largest + tl.zeros_like(amax))
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(spoilt > 0, float("nan"), scale)
    code = rounded(tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape)))
    tl.store(codes + row[:, None] * k + column[None, :], code.to(tl.float8e4nv), mask=inside)
    if SHARED:
        first = tl.where(tl.arange(0, HEIGHT) == 0, scale, 0.0)  # all rows have the same
        tl.store(scales + i * blocks + j, tl.sum(first, 0))
    else:
        tl.store(scales + row * blocks + j, scale, mask=row < rows)
    stands = tl.where(inside, code * scale[:, None], 0.0)
    weight = tl.load(along + column, mask=column < k, other=0.0)
    tl.store(row_sums + row * blocks + j, tl.sum(stands * weight[None, :], 1), mask=row < rows)
    tl.store(row_sums + (rows + row) * blocks + j, tl.sum(stands * stands, 1), mask=row < rows)
    if DOWN:
        sign = tl.load(down + row, mask=row < rows, other=0.0)
        tl.store(column_sums + i * k + column, tl.sum(stands * sign[:, None], 0), mask=column < k)


@triton.jit
def multiply_and_sum(
    a,
    b,
    scales_a,
    scales_b,
    signs,
    out,
    sums,
    m,
    n,
    k,
    a_row,
    a_k,
    b_column,
    b_k,
    SCALED: tl.constexpr,
    TILED: tl.constexpr,
    WIDEN: tl.constexpr,
    SUM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """out [m, n] = a [m, k] times the transpose of b [n, k] (any strides), and sums fp32 [m, grid columns] beside it.

    sums: the fp32 accumulator of each row times signs [n], before it is rounded to out's type. SCALED: a and b are
    E4M3 codes with 1x128 scales [rows, k / 128], K is 128, and each block's sum is scaled in fp32; TILED: b's scales
    are 128x128 ones [n / 128, k / 128], and N divides 128. WIDEN: operands go to fp32 first, for Triton's interpreter,
    which multiplies bf16 as the integers of its bits. SUM: False leaves the sums out, to time what they cost. Grid:
    (m / M times n / N), each rounded up; TOGETHER rows of tiles go through all columns side by side, so that what they
    read of b comes from the cache.
    """
    downs, alongs = tl.cdiv(m, M), tl.cdiv(n, N)
    band = tl.program_id(0) // (TOGETHER * alongs)
    height = tl.minimum(downs - band * TOGETHER, TOGETHER)
    inside_band = tl.program_id(0) % (TOGETHER * alongs)
    i, j = band * TOGETHER + inside_band % height, inside_band // height
    row, column = (i * M + tl.arange(0, M)).to(tl.int64), (j * N + tl.arange(0, N)).to(tl.int64)
    blocks = tl.cdiv(k, K)
    total = tl.zeros((M, N), tl.float32)
    for block in range(blocks):
        at = block * K + tl.arange(0, K)
        left = tl.load(
            a + row[:, None] * a_row + at[None, :] * a_k, mask=(row[:, None] < m) & (at[None, :] < k), other=0.0
        )
        right = tl.load(
            b + column[None, :] * b_column + at[:, None] * b_k,
            mask=(column[None, :] < n) & (at[:, None] < k),
            other=0.0,
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        if SCALED:
            scale_a = tl.load(scales_a + row * blocks + block, mask=row < m, other=0.0)
            which = column // _BLOCK if TILED else column
            scale_b = tl.load(scales_b + which * blocks + block, mask=column < n, other=0.0)
            total += tl.dot(left, right, out_dtype=tl.float32) * scale_a[:, None] * scale_b[None, :]
        else:
            total = tl.dot(left, right, total, out_dtype=tl.float32)
    if SUM:
        sign = tl.load(signs + column, mask=column < n, other=0.0)
        tl.store(sums + row * alongs + j, tl.sum(total * sign[None, :], 1), mask=row < m)
    inside = (row[:, None] < m) & (column[None, :] < n)
    tl.store(out + row[:, None] * n + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def nearest(x):
    """fp32 x to the nearest bf16 value, ties to even: the cast that follows is exact, under the interpreter too."""
    bits = x.to(tl.int32, bitcast=True)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, up.to(tl.float32, bitcast=True), x)


@triton.jit
def thin(
    x,
    vectors,
    batch_x,
    batch_vectors,
    row,
    rows,
    k,
    stride_row,
    stride_k,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """Rows of x [rows, k] (any strides) times vectors [k, V], fp32 [ROWS, V], and the squares of these rows [ROWS].

    WIDEN: as in `multiply_and_sum`.
    """
    lane = tl.arange(0, V)
    total, squares = tl.zeros((ROWS, V), tl.float32), tl.zeros((ROWS,), tl.float32)
    start = x + batch_x + row.to(tl.int64)[:, None] * stride_row
    for block in range(tl.cdiv(k, K)):
        at = block * K + tl.arange(0, K)
        left = tl.load(
            start + at.to(tl.int64)[None, :] * stride_k, mask=(row[:, None] < rows) & (at[None, :] < k), other=0.0
        )
        right = tl.load(vectors + batch_vectors + at[:, None] * V + lane[None, :], mask=at[:, None] < k, other=0.0)
        wide = left.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        if WIDEN:
            left, right = wide, right.to(tl.float32)
        total = tl.dot(left, right, total, out_dtype=tl.float32)
    return total, squares


@triton.jit
def along_probes(
    x,
    vectors,
    out,
    squares,
    parts,
    rows,
    k,
    stride_batch,
    stride_row,
    stride_k,
    alpha,
    PER_BATCH: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """out [batch, rows, V] = alpha x [batch, rows, k] (any strides) vectors, in out's type; x's squared row norms fp32.

    vectors [k, V], or PER_BATCH [batch, k, V]. parts fp32 [batch, 2, tiles]: sums over a tile's rows of out's squares
    and of x's, of rows where both are finite. Grid: (rows / ROWS rounded up, batch).
    """
    i, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    row, lane = i * ROWS + tl.arange(0, ROWS), tl.arange(0, V)
    from_vectors = batch * k * V if PER_BATCH else batch * 0
    total, norms = thin(
        x, vectors, batch * stride_batch, from_vectors, row, rows, k, stride_row, stride_k, WIDEN, ROWS, K, V
    )
    total *= alpha
    place = batch * rows + row
    tl.store(squares + place, norms, mask=row < rows)
    kept = total if out.dtype.element_ty == tl.float32 else nearest(total)
    tl.store(out + place[:, None] * V + lane[None, :], kept.to(out.dtype.element_ty), mask=row[:, None] < rows)
    of_out = tl.sum(total * total, 1)
    finite = (of_out < float("inf")) & (norms < float("inf"))  # NaN is not
    tl.store(parts + batch * 2 * tiles + i, tl.sum(tl.where(finite, of_out, 0.0), 0))
    tl.store(parts + (batch * 2 + 1) * tiles + i, tl.sum(tl.where(finite, norms, 0.0), 0))


@triton.jit
def energy(
    c,
    vectors,
    predicted,
    squares,
    parts,
    parts_of_weights,
    heavy,
    readings,
    rows,
    n,
    stride_batch,
    stride_row,
    stride_n,
    tiles,
    tiles_of_weights,
    scale,
    rounding,
    sums,
    floor,
    WIDEN: tl.constexpr,
    TILES: tl.constexpr,
    TILES_OF_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """readings fp32 [batch, rows] of c [batch, rows, n] (any strides): the formula of `checks.rounded`.

    predicted fp32 [batch, rows, V], squares and parts: `along_probes` of the left operand, parts_of_weights [batch, 2,
    tiles_of_weights] that of the right one; heavy int64 [batch]: how many rows of that are not zero. scale: alpha^2;
    rounding, sums: the constants times what they are multiplied by. TILES, TILES_OF_WEIGHTS: powers of two not below
    tiles. Grid: as `along_probes`.
    """
    i, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, lane = i * ROWS + tl.arange(0, ROWS), tl.arange(0, V)
    total, _ = thin(c, vectors, batch * stride_batch, batch * 0, row, rows, n, stride_row, stride_n, WIDEN, ROWS, K, V)
    place = batch * rows + row
    there = row < rows
    expected = tl.load(predicted + place[:, None] * V + lane[None, :], mask=there[:, None], other=0.0)
    gap = total - expected
    residual = tl.sqrt(tl.sum(gap * gap, 1) / V)
    square = tl.load(squares + place, mask=there, other=0.0)
    at, at_weight = tl.arange(0, TILES), tl.arange(0, TILES_OF_WEIGHTS)
    first = parts + batch * 2 * tiles
    estimates = tl.sum(tl.load(first + at, mask=at < tiles, other=0.0), 0) / V
    all_squares = tl.sum(tl.load(first + tiles + at, mask=at < tiles, other=0.0), 0)
    of_weights = parts_of_weights + batch * 2 * tiles_of_weights
    weights = tl.sum(tl.load(of_weights + at_weight, mask=at_weight < tiles_of_weights, other=0.0), 0) / V
    gain = tl.minimum(estimates / tl.maximum(all_squares, floor * floor), 1 / floor / floor)
    estimate = tl.sum(expected * expected, 1) / V
    typical = weights * scale / tl.maximum(tl.load(heavy + batch), 1)
    limit = tl.maximum(tl.sqrt(estimate + square * tl.maximum(gain, typical)), floor) * rounding
    limit += tl.maximum(tl.sqrt(square), floor) * (tl.maximum(tl.sqrt(weights), floor) * sums)
    tl.store(readings + place, residual / limit, mask=there)


@triton.jit
def splitmix64(x):
    """uint64 to uint64, as in `multilinear`."""
    x += _GOLDEN
    x = (x ^ (x >> 30)) * _MIX
    x = (x ^ (x >> 27)) * _MIX_AGAIN
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["start", "count"])
def hash_words(words, table, total, start, count, seed, BLOCK_WORDS: tl.constexpr, TILE: tl.constexpr):
    """Add the hash of int32 words [count], whose first has the global index `start`, to total int64 [].

    Program p takes the p-th tile of TILE words, counted from the tile in which `start` lies; TILE divides BLOCK_WORDS.
    Additions modulo 2^64 commute, so the order in which programs end changes no bit.
    """
    first = start // TILE * TILE + tl.program_id(0).to(tl.int64) * TILE  # global index of the tile
    lane = tl.arange(0, TILE)
    at = first - start + lane
    word = tl.load(words + at, mask=(at >= 0) & (at < count), other=0).to(tl.int64) & 0xFFFFFFFF
    weight = tl.load(table + first % BLOCK_WORDS + lane)
    block = (first // BLOCK_WORDS).to(tl.uint64)
    multiplier = splitmix64(block ^ seed.to(tl.uint64)) | 1
    tl.atomic_add(total, tl.sum(word * weight, 0) * multiplier.to(tl.int64, bitcast=True))
