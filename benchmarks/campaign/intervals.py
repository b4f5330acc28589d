"""What counts prove: the intervals of a share, and of a median."""

import math
from collections.abc import Sequence

#: Two-sided 95 % of the normal distribution.
Z95 = 1.96


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `hits` of `n` were seen (Wilson 1927); all of 0..1 if nothing was.

    It stays within 0..1, and after n of n it does not claim 1.
    """
    if n == 0:
        return 0.0, 1.0
    share, square = hits / n, Z95 * Z95
    spread = Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    low, high = (share + square / (2 * n) + sign * spread for sign in (-1, 1))
    return max(0.0, low / (1 + square / n)), min(1.0, high / (1 + square / n))


def of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """An interval that holds the median with 95 % or more, whatever the distribution; None of fewer than 6 values.

    Each value lies below the median with one half, so that ranks follow from a binomial distribution.
    """
    n, rank, below = len(values), 0, 0.5 ** len(values)  # below: the chance that at most `rank` values lie below it
    while below <= 0.025 and rank < n // 2:
        rank += 1
        below += math.comb(n, rank) * 0.5**n
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[n - rank]
