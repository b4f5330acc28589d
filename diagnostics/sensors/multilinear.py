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

The sum is made from two words at a time, since numpy multiplies 64-bit integers only: with p = x_0 + 2^32 x_1,
x_0 w_0 + x_1 w_1 = p w_0 + (p >> 32) (w_1 - 2^32 w_0).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

WORD_BYTES = 4
# 2^12 words: the weights of a block, 32 KiB, stay in a 48 KiB L1 while the data stream by. Measured on Zen 5: 8.9 GB/s,
# 7.0 with twice the words.
BLOCK_WORDS = 1 << 12
MASK = (1 << 64) - 1
TABLE_SEED = 0x41535341592F5631  # "ASSAY/V1": changing it changes every stored digest

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's step, 2^64 over the golden ratio
_HALF = np.uint64(32)
_PAIRS = BLOCK_WORDS // 2
# Blocks a pass over their upper halves takes at once: 256 KiB of data and as much of halves stay in a 1-2 MiB L2.
_BLOCKS = 16

Unsigned = npt.NDArray[np.uint64]


def splitmix64(x: int) -> int:
    """A bijective 64-bit mixer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x + _GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _splitmix64(x: Unsigned) -> Unsigned:
    """The same of many; arrays wrap modulo 2^64 by themselves."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1)
def weight_table() -> Unsigned:
    """The odd weights of one block, uint64 [BLOCK_WORDS]; read-only and the same on every machine."""
    index = np.arange(BLOCK_WORDS, dtype=np.uint64)
    return _frozen(_splitmix64(index * np.uint64(_GOLDEN) + np.uint64(TABLE_SEED)) | np.uint64(1))


def block_multiplier(block: int) -> int:
    """The odd 64-bit factor that sets one block's weights apart from every other block's: w(i) = table * multiplier."""
    return splitmix64(block ^ TABLE_SEED) | 1


def block_multipliers(first: int, count: int) -> Unsigned:
    """Those of the blocks first, first + 1, ...: uint64 [count]."""
    blocks = np.arange(first, first + count, dtype=np.uint64)
    return _splitmix64(blocks ^ np.uint64(TABLE_SEED)) | np.uint64(1)


@lru_cache(maxsize=1)
def _pair_weights() -> tuple[Unsigned, Unsigned]:
    """What a pair of words is multiplied by, and what its upper word is once more: uint64 [_PAIRS] each."""
    lower, upper = weight_table()[0::2].copy(), weight_table()[1::2]
    return _frozen(lower), _frozen(upper - (lower << _HALF))


def _frozen(array: Unsigned) -> Unsigned:
    array.flags.writeable = False
    return array


def digest_words(words: npt.NDArray[np.uint32], start: int = 0) -> int:
    """Digest of contiguous uint32 words [n] whose first has the global index `start`; 0 <= result < 2^64.

    Takes a third longer where start is odd or the memory is not aligned to 8 bytes: numpy then copies the pairs.
    """
    if start < 0:
        raise ValueError(f"start is {start}, must be a word index >= 0")
    head = min(start % 2, len(words))
    end = head + (len(words) - head) // 2 * 2
    total = _digest_pairs(words[head:end].view(np.uint64), (start + head) // 2)
    if head:
        total += _digest_word(int(words[0]), start)
    if end < len(words):
        total += _digest_word(int(words[end]), start + end)
    return total & MASK


def _digest_word(word: int, index: int) -> int:
    block, offset = divmod(index, BLOCK_WORDS)
    return word * int(weight_table()[offset]) * block_multiplier(block)


def _digest_pairs(pairs: Unsigned, start: int) -> int:
    """Digest of pairs of words [n] of which the first is the pair `start` of the whole."""
    if not len(pairs):
        return 0
    block, offset = divmod(start, _PAIRS)
    if offset + len(pairs) <= _PAIRS:  # much is small: numbers are quicker than arrays of one
        return int(_sums(pairs[None], offset)[0]) * block_multiplier(block)
    sums = np.concatenate(list(_block_sums(pairs, offset)))
    return int(np.dot(sums, block_multipliers(block, len(sums))))


def _block_sums(pairs: Unsigned, offset: int) -> Iterator[Unsigned]:
    """Each block's sum under the table alone, uint64 [blocks] in parts; `offset`: the first pair's in its block."""
    lead = min(-offset % _PAIRS, len(pairs))
    blocks, rest = divmod(len(pairs) - lead, _PAIRS)
    if lead:
        yield _sums(pairs[None, :lead], offset)
    if blocks:
        yield _sums(pairs[lead : lead + blocks * _PAIRS].reshape(blocks, _PAIRS))
    if rest:
        yield _sums(pairs[None, -rest:])


def _sums(pairs: Unsigned, offset: int = 0) -> Unsigned:
    """Each row's sum of pairs [rows, n] that start at `offset` in their blocks: uint64 [rows]."""
    rows, n = pairs.shape
    both, once_more = (weights[offset : offset + n] for weights in _pair_weights())
    sums, added = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
    upper = np.empty((min(rows, _BLOCKS), n), np.uint64)  # one for all passes: memory that is already in the cache
    for first in range(0, rows, _BLOCKS):
        part = pairs[first : first + _BLOCKS]
        np.dot(part, both, out=sums[first : first + _BLOCKS])
        np.right_shift(part, _HALF, out=upper[: len(part)])
        np.dot(upper[: len(part)], once_more, out=added[first : first + _BLOCKS])
    return sums + added


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
