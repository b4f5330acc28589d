"""The position-weighted multilinear hash on plain bytes, for readers of checkpoints that have no use for torch.

digest = sum over i of x_i * w(i) mod 2^64, x_i the signed 32-bit little-endian words, i their global index, w(i) an
odd pseudo-random 64-bit weight. The sum is order-independent, so shards and segments of one state add up to the
digest of the whole; w depends on the position, so permutations, swaps and the same bit flipped in many lanes show
(XOR folds and plain sums miss those). Not cryptographic: it guards against faults, not against people.

Words have 32 bits and weights 64 on purpose: with 64-bit words two flips of bit 63 would always cancel, since
2^63 * w is the same for every odd w. With 32-bit words the flip of bit b moves the digest by 2^b * w, and two such
moves cancel only when the low 64 - b >= 33 bits of their weights agree (up to sign): 2^-32 for odd weights.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

WORD_BYTES = 4
# 2^15 words: 128 KiB of data, 256 KiB of weights and 256 KiB of products stay in a 1-2 MiB L2; measured fastest of
# 2^12..2^16 (5.1 GB/s on one thread where memcpy copies 8.8).
BLOCK_WORDS = 1 << 15
MASK = (1 << 64) - 1
_TABLE_SEED = 0x41535341592F5631  # "ASSAY/V1": changing it changes every stored digest

Words = npt.NDArray[np.int32]
Weights = npt.NDArray[np.int64]


def splitmix64(x: int) -> int:
    """A bijective 64-bit mixer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=1)
def weight_table() -> Weights:
    """The odd weights of one block, int64 [BLOCK_WORDS]; read-only and the same on every machine."""
    index = np.arange(BLOCK_WORDS, dtype=np.uint64) + np.uint64(_TABLE_SEED)
    x = index * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    table = ((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64)
    table.flags.writeable = False
    return table


def block_multiplier(block: int) -> int:
    """The odd 64-bit factor that sets one block's weights apart from every other block's: w(i) = table * multiplier."""
    return splitmix64(block ^ _TABLE_SEED) | 1


def digest_words(words: Words, start: int = 0) -> int:
    """Digest of int32 words [n] whose first word has the global index `start`; 0 <= result < 2^64."""
    if start < 0:
        raise ValueError(f"start is {start}, must be a word index >= 0")
    table = weight_table()
    product = np.empty(min(BLOCK_WORDS, len(words)), dtype=np.int64)
    total, done = 0, 0
    while done < len(words):
        block, offset = divmod(start + done, BLOCK_WORDS)
        n = min(BLOCK_WORDS - offset, len(words) - done)
        np.multiply(words[done : done + n], table[offset : offset + n], out=product[:n])
        total += int(product[:n].sum()) * block_multiplier(block)
        done += n
    return total & MASK


def digest_bytes(buf: Buffer, start: int = 0) -> int:
    """Digest of a contiguous buffer, equal to `digest` of a tensor with the same bytes.

    `start` is the global index, in 32-bit words, of the buffer's first word. A tail of 1-3 bytes is padded with
    zeros to a word, so a state may be split into segments at multiples of 4 bytes only.
    """
    view = memoryview(buf).cast("B")
    whole = len(view) // WORD_BYTES
    total = digest_words(np.frombuffer(view[: whole * WORD_BYTES], dtype="<i4"), start) if whole else 0
    tail = bytes(view[whole * WORD_BYTES :])
    if tail:
        total += digest_words(np.frombuffer(tail.ljust(WORD_BYTES, b"\0"), dtype="<i4"), start + whole)
    return total & MASK


def hexdigest(value: int) -> str:
    """A digest as 16 lower-case hexadecimal characters."""
    return f"{value & MASK:016x}"


def chain(previous: int, *parts: int) -> int:
    """Mix digests into a chained one, 64 bits of blake2b: unlike the sum, order and every earlier link matter."""
    packed = struct.pack(f"<{len(parts) + 1}Q", previous & MASK, *(part & MASK for part in parts))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
