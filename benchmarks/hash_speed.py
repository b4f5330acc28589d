"""Whether the hash keeps up with memory, and what it misses: speed beside a copy and a read, faults with a structure.

Speeds are those of the bytes hashed, copied or read, 64 MiB outside the caches, in turns so that all meet the same
machine, each by its best round, as memory bandwidth is measured elsewhere (STREAM): other work on the machine only ever
adds time. Two threads take a half each: digests of parts add up.
"""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks._figures import Figure, document
from benchmarks._runs import options
from diagnostics.sensors.multilinear import BLOCK_WORDS, MASK, Words, digest_words

#: Twice the L3 of the machines measured so far (32 MiB).
WORDS = 1 << 24
#: The hash is to take at most twice as long as a copy.
TARGET = 0.5
LANES = 32
#: Where faults are put: four blocks of the hash's weights.
FAULTY_WORDS = 4 * BLOCK_WORDS
SEED = 20261126


@dataclass(frozen=True)
class Work:
    """What is timed, on one part of the words."""

    source: Words
    target: Words

    def hash(self, part: slice) -> None:
        digest_words(self.source[part], part.start)

    def copy(self, part: slice) -> None:
        np.copyto(self.target[part], self.source[part])

    def read(self, part: slice) -> None:
        self.source[part].view(np.int64).sum()


def timed(pool: ThreadPoolExecutor, work: Callable[[slice], None], parts: list[slice]) -> float:
    """Seconds for all parts, each on a thread of its own."""
    begin = time.perf_counter()
    list(pool.map(work, parts))
    return time.perf_counter() - begin


def speeds(threads: int, rounds: int) -> Iterator[Figure]:
    """The hash on so many threads, with a copy and a read on as many beside it."""
    rng = np.random.default_rng(SEED)
    source = rng.integers(0, 1 << 32, WORDS, dtype=np.uint32)
    work = Work(source, np.zeros_like(source))
    share = WORDS // threads
    parts = [slice(i * share, (i + 1) * share) for i in range(threads)]
    kinds = {"hash": work.hash, "copy": work.copy, "read": work.read}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            for kind, run in kinds.items():
                seconds[kind].append(timed(pool, run, parts))
    rates = {kind: source.nbytes / min(took) / 1e9 for kind, took in seconds.items()}
    on = f"{threads} thread{'s' if threads > 1 else ''}"
    yield Figure(f"hash, {on}", rates["hash"], "GB/s", "higher", peer="read", peer_value=rates["read"], samples=rounds)
    ratio, peer = rates["hash"] / rates["copy"], "copy, GB/s"
    yield Figure(f"hash over copy, {on}", ratio, "", "higher", TARGET, None, peer, rates["copy"], None, rounds)


def _one_bit(bad: Words, at: int, rng: np.random.Generator) -> None:
    bad[at : at + LANES] ^= np.uint32(1 << int(rng.integers(32)))


def _periodic_bit(bad: Words, at: int, rng: np.random.Generator) -> None:
    bad[at : at + 64 * LANES : LANES] ^= np.uint32(1 << int(rng.integers(32)))


def _period_of_a_block(bad: Words, at: int, rng: np.random.Generator) -> None:
    """The hash's own period: the same entries of its table under other factors."""
    bad[at % BLOCK_WORDS :: BLOCK_WORDS] ^= np.uint32(1 << int(rng.integers(32)))


def _stuck_bit(bad: Words, at: int, rng: np.random.Generator) -> None:
    bad[at : at + 64 * LANES : LANES] |= np.uint32(1 << int(rng.integers(32)))


def _stuck_lane(bad: Words, at: int, rng: np.random.Generator) -> None:
    bad[at : at + 64 * LANES : LANES] = bad[at]


def _permuted(bad: Words, at: int, rng: np.random.Generator) -> None:
    bad[at : at + LANES] = rng.permutation(bad[at : at + LANES])


def _swapped(bad: Words, at: int, rng: np.random.Generator) -> None:
    other = int(rng.integers(len(bad)))
    bad[[at, other]] = bad[[other, at]]


def _runs_of_four(bad: Words, at: int, rng: np.random.Generator) -> None:
    """Four wrong words in a row at a period, as in sensors that watched real devices: the top bit of each flips."""
    for first in range(at, at + 64 * LANES, 2 * LANES):
        bad[first : first + 4] ^= np.uint32(1 << 31)


FAULTS: dict[str, Callable[[Words, int, np.random.Generator], None]] = {
    "one bit in 32 lanes": _one_bit,
    "one bit, periodic": _periodic_bit,
    "one bit at the hash's own period": _period_of_a_block,
    "stuck bit of a lane": _stuck_bit,
    "stuck lane": _stuck_lane,
    "permutation": _permuted,
    "swap": _swapped,
    "runs of four": _runs_of_four,
}


def _sums(words: Words) -> tuple[int, int, int]:
    """The hash, the XOR fold and the plain sum."""
    return digest_words(words), int(np.bitwise_xor.reduce(words)), int(words.sum(dtype=np.uint64)) & MASK


def misses(kind: str, trials: int) -> Iterator[Figure]:
    """How many of the faults leave each sum as it was."""
    rng = np.random.default_rng(SEED)
    missed, made = np.zeros(3, dtype=np.int64), 0
    while made < trials:
        words = rng.standard_normal(FAULTY_WORDS, dtype=np.float32).view(np.uint32)
        clean = _sums(words)
        for _ in range(min(100, trials - made)):
            bad = words.copy()
            FAULTS[kind](bad, int(rng.integers(FAULTY_WORDS - 64 * LANES)), rng)
            if not np.array_equal(bad, words):
                missed += [now == before for now, before in zip(_sums(bad), clean, strict=True)]
                made += 1
    for peer, count in (("XOR fold", int(missed[1])), ("plain sum", int(missed[2]))):
        yield Figure(f"misses, {kind}", int(missed[0]), "misses", "lower", 0, peer=peer, peer_value=count, samples=made)


def main() -> None:
    """Run and print one JSON document."""
    rounds, trials = (3, 100) if options(__doc__).quick else (801, 5000)
    figures: list[Figure] = []
    with Progress(console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("hash", total=2 + len(FAULTS))
        for threads in (1, 2):
            figures.extend(speeds(threads, rounds))
            progress.advance(bar)
        for kind in FAULTS:
            figures.extend(misses(kind, trials))
            progress.advance(bar)
    print(document("hash_speed", figures, threads=2))


if __name__ == "__main__":
    main()
