"""The position-weighted multilinear hash on plain bytes, for readers of checkpoints that have no use for torch.

digest = sum over i of x_i * w(i) mod 2^64, x_i the unsigned 32-bit little-endian words, i their global index, w(i) an
odd pseudo-random 64-bit weight. The sum is order-independent, so shards and segments of one state add up to the
digest of the whole; w depends on the position, so permutations, swaps and the same bit flipped in many lanes show
(XOR folds and plain sums miss those). Not cryptographic: it guards against faults, not against people.

Words have 32 bits and weights 64 on purpose: with 64-bit words two flips of bit 63 would always cancel, since
2^63 * w is the same for every odd w. With 32-bit words the flip of bit b moves the digest by 2^b * w, and two such
moves cancel only when the low 64 - b >= 33 bits of their weights agree (up to sign): 2^-32 for odd weights. Weights
are a table's entry times its block's factor; the same flip at the four corners of a rectangle of two blocks and two
offsets moves the digest by 2^b (t - t') (m - m') and hides with 33 * 2^-32, 2^-27, at b = 31.

The sum is compiled as this module is imported, in half a second, for the vector units of the processor that runs it:
numpy has no product of 32 and 64 bits, and makes those of 64 one by one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import register_jitable
from typing_extensions import Buffer

WORD_BYTES = 4
# 2^12 words: the weights of a block, 32 KiB, stay in a 48 KiB L1 while the data stream by.
BLOCK_WORDS = 1 << 12
MASK = (1 << 64) - 1
TABLE_SEED = 0x41535341592F5631  # "ASSAY/V1": changing it changes every stored digest

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's step, 2^64 over the golden ratio

Words = npt.NDArray[np.uint32]
Unsigned = npt.NDArray[np.uint64]
_OneOrMany = TypeVar("_OneOrMany", np.uint64, Unsigned)


def splitmix64(x: int) -> int:
    """A bijective 64-bit mixer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x + _GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@register_jitable
def _splitmix64(x: _OneOrMany) -> _OneOrMany:
    """The same of many, and of one where it is compiled: these wrap modulo 2^64 by themselves."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1)
def weight_table() -> Unsigned:
    """The odd weights of one block, uint64 [BLOCK_WORDS]; read-only and the same on every machine."""
    index = np.arange(BLOCK_WORDS, dtype=np.uint64)
    return _frozen(_splitmix64(index * np.uint64(_GOLDEN) + np.uint64(TABLE_SEED)) | np.uint64(1))


def block_multipliers(first: int, count: int) -> Unsigned:
    """The odd factors that set the weights of the blocks first, first + 1, ... apart: uint64 [count].

    w(i) = weight_table()[i mod BLOCK_WORDS] * the multiplier of block i // BLOCK_WORDS.
    """
    return _multiplier(np.arange(first, first + count, dtype=np.uint64))


@register_jitable
def _multiplier(block: _OneOrMany) -> _OneOrMany:
    return _splitmix64(block ^ np.uint64(TABLE_SEED)) | np.uint64(1)


def _frozen(array: Unsigned) -> Unsigned:
    array.flags.writeable = False
    return array


def check_start(start: int, words: int) -> None:
    """Raises ValueError where so many words from this global index on have no indices from 0 to 2^63 - 1."""
    if not 0 <= start <= (1 << 63) - words:
        raise ValueError(f"start is {start}, must be the index of the first of {words} words within 0 to 2^63 - 1")


def digest_words(words: Words, start: int = 0) -> int:
    """Digest of contiguous uint32 words [n], aligned or not, whose first has the global index `start`.

    0 <= result < 2^64. Other threads run beside it. Raises ValueError for a start that `check_start` refuses.
    """
    check_start(start, len(words))
    return int(_weighted_sum(words, start, weight_table()))


def _sum_words(words: Words, start: int, table: Unsigned) -> np.uint64:
    """The formula, block by block: uint32 [n] under uint64 [BLOCK_WORDS]."""
    total = np.uint64(0)
    done = 0
    while done < len(words):
        at = start + done
        block, offset = at // BLOCK_WORDS, at % BLOCK_WORDS
        if not offset and len(words) - done >= 4 * BLOCK_WORDS:
            part = words[done : done + 4 * BLOCK_WORDS]
            total += _sum_four_blocks(part, block, table)
        else:
            part = words[done : done + BLOCK_WORDS - offset]
            total += _sum_block(part, block, table[offset : offset + len(part)])
        done += len(part)
    return total


@register_jitable
def _sum_block(words: Words, block: int, weights: Unsigned) -> np.uint64:
    """What some words of one block add, uint32 [n] under uint64 [n]."""
    total = np.uint64(0)
    for i in range(len(words)):
        total += np.uint64(words[i]) * weights[i]
    return total * _multiplier(np.uint64(block))


@register_jitable
def _sum_four_blocks(words: Words, block: int, table: Unsigned) -> np.uint64:
    """What four whole blocks add, uint32 [4 * BLOCK_WORDS].

    Side by side: a processor fetches several streams ahead faster than one (13 GB/s became 22 on a Zen 4).
    """
    a, b, c, d = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    words_a, words_b = words[:BLOCK_WORDS], words[BLOCK_WORDS : 2 * BLOCK_WORDS]
    words_c, words_d = words[2 * BLOCK_WORDS : 3 * BLOCK_WORDS], words[3 * BLOCK_WORDS :]
    for i in range(BLOCK_WORDS):
        weight = table[i]
        a += np.uint64(words_a[i]) * weight
        b += np.uint64(words_b[i]) * weight
        c += np.uint64(words_c[i]) * weight
        d += np.uint64(words_d[i]) * weight
    first = np.uint64(block)
    both = a * _multiplier(first) + b * _multiplier(first + np.uint64(1))
    return both + c * _multiplier(first + np.uint64(2)) + d * _multiplier(first + np.uint64(3))


_weighted_sum: Callable[[Words, int, Unsigned], np.uint64] = numba.njit(
    types.uint64(
        types.Array(types.uint32, 1, "C", readonly=True, aligned=False),
        types.int64,
        types.Array(types.uint64, 1, "C", readonly=True),
    ),
    nogil=True,
)(_sum_words)


def digest_bytes(buf: Buffer, start: int = 0) -> int:
    """Digest of a contiguous buffer, equal to `digest` of a tensor with the same bytes.

    `start` is the global index, in 32-bit words, of the buffer's first word. A tail of 1-3 bytes is padded with
    zeros to a word, so a state may be split into segments at multiples of 4 bytes only.
    """
    view = memoryview(buf).cast("B")
    whole = len(view) // WORD_BYTES
    total = digest_words(np.frombuffer(view[: whole * WORD_BYTES], dtype="<u4"), start) if whole else 0
    tail = bytes(view[whole * WORD_BYTES :])
    if tail:
        total += digest_words(np.frombuffer(tail.ljust(WORD_BYTES, b"\0"), dtype="<u4"), start + whole)
    return total & MASK


def hexdigest(value: int) -> str:
    """A digest as 16 lower-case hexadecimal characters."""
    return f"{value & MASK:016x}"


def signed(value: int) -> int:
    """A digest as torch's int64 carries it; `& MASK` is the way back."""
    return value - (1 << 64) if value >= 1 << 63 else value


def chain(previous: int, *parts: int) -> int:
    """Mix digests into a chained one, 64 bits of blake2b: unlike the sum, order and every earlier link matter."""
    packed = struct.pack(f"<{len(parts) + 1}Q", previous & MASK, *(part & MASK for part in parts))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
