"""What counts prove."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.campaign.intervals import wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_number_of_faults_that_999_in_1000_takes() -> None:
    """As docs/campaign.md says: 3,838 without a miss."""
    assert wilson(3_838, 3_838)[0] > 0.999 > wilson(3_837, 3_837)[0]


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_share_lies_within(a: int, b: int) -> None:
    hits, n = min(a, b), max(a, b)
    low, high = wilson(hits, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= hits / n + 1e-12
        assert hits / n - 1e-12 <= high


def test_nothing_tried_proves_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
