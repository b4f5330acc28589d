"""Which samples a micro-batch holds: a keyed hash of its coordinates, so that anybody can name them without history."""

from __future__ import annotations

_MASK = 0xFFFFFFFF
# Philox4x32 (Salmon et al., SC'11, table 2 and section 3.3): multipliers, Weyl key increments, and the ten rounds its
# authors recommend.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Rounds after which a Feistel network with good round functions cannot be told from a random permutation (Luby and
# Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions").
_FEISTEL_ROUNDS = 4


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words that are a bijection of ``counter`` for each ``key`` (32-bit words)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (right >> 32) ^ b ^ low, right & _MASK, (left >> 32) ^ d ^ high, left & _MASK
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return a, b, c, d


def sample_ids(seed: int, step: int, rank: int, microbatch: int, count: int, total: int) -> list[int]:
    """Ids in [0, total) of one micro-batch, uniform and independent, with replacement.

    A pure function: no cursor, no generator. Coordinates are the counter and the seed is the key, so two different
    coordinates of one seed never share a random word. The multiply-shift reduction favours no id by more than
    total / 2^64.

    Args:
        seed: of the job, 0 .. 2^64 - 1.
        step: 1 for the first step; rank, microbatch: from 0. Each below 2^32.
        count: ids wanted.
        total: samples in the corpus.

    Raises:
        ValueError: an argument outside its range; it names the argument.
    """
    for name, value in (("step", step), ("rank", rank), ("microbatch", microbatch), ("count", count)):
        if not 0 <= value <= _MASK:
            raise ValueError(f"{name}: 0 .. 2^32 - 1, not {value}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: 0 .. 2^64 - 1, not {seed}")
    if not 1 <= total < 1 << 64:
        raise ValueError(f"total: at least one sample, not {total}")
    key = (seed & _MASK, seed >> 32)
    return [_reduced(philox((step, rank, microbatch, index), key), total) for index in range(count)]


def _reduced(words: tuple[int, int, int, int], total: int) -> int:
    return ((words[0] << 32 | words[1]) * total) >> 64


def window_ids(seed: int, step: int, rank: int, count: int, world: int, windows: int) -> list[int]:
    """Numbers in [0, windows) of one micro-batch; each epoch has every window exactly once, in an order of its own.

    A pure function as :func:`sample_ids`: the samples before this one follow from the coordinates, the epoch and the
    place in it follow from their number, and the order of an epoch is a keyed permutation that need not be stored.

    Args:
        seed: of the job, 0 .. 2^64 - 1.
        step: 1 for the first step; 0, which only warms up, reads what step 1 will read.
        rank: of ``world`` ranks.
        count: windows that each rank takes in each step.
        world: ranks.
        windows: in the corpus.
    """
    before = (max(step - 1, 0) * world + rank) * count
    places = (divmod(before + index, windows) for index in range(count))
    return [shuffled(seed, epoch, place, windows) for epoch, place in places]


def shuffled(seed: int, epoch: int, index: int, total: int) -> int:
    """What comes at place ``index`` in the epoch's order of range(total): a permutation for each seed and epoch.

    A Feistel network over the next power of four, walked until it falls into the range (Black and Rogaway, CT-RSA 2002,
    "Ciphers with arbitrary finite domains", section 4): fewer than four walks on average.

    Raises:
        ValueError: an argument outside its range; it names the argument.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: 0 .. 2^64 - 1, not {seed}")
    if not 0 <= epoch < 1 << 64:
        raise ValueError(f"epoch: 0 .. 2^64 - 1, not {epoch}")
    if not 1 <= total < 1 << 64:
        raise ValueError(f"total: at least one window, not {total}")
    if not 0 <= index < total:
        raise ValueError(f"index: 0 .. {total - 1}, not {index}")
    half = max((total - 1).bit_length() + 1, 2) // 2
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for number in range(_FEISTEL_ROUNDS):
            word = philox((right, number, epoch & _MASK, epoch >> 32), (seed & _MASK, seed >> 32))[0]
            left, right = right, left ^ word & (1 << half) - 1
        index = left << half | right
        if index < total:
            return index
