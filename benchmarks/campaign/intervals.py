"""What counts prove: the interval of a share."""

import math

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
