"""What counts prove."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.campaign.intervals import of_median, wilson


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


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (8, 1), (9, 2), (17, 5), (25, 8), (100, 40)])
def test_a_medians_interval_is_of_the_published_ranks(n: int, rank: int) -> None:
    """Conover, Practical Nonparametric Statistics, table A3: the sign test's at 95 %."""
    values = [float(value) for value in range(1, n + 1)]
    assert of_median(values[::-1]) == (rank, n + 1 - rank)


def test_few_values_have_no_such_interval() -> None:
    assert of_median([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert of_median([]) is None
