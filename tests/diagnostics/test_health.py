"""The vocabulary: NaN is an alarm, and scores cannot be fed nonsense."""

from __future__ import annotations

import math

import pytest

from diagnostics.health import Finding, Reading, Severity


@pytest.mark.parametrize(
    ("value", "alarming"), [(0.0, False), (1.0, False), (1.0001, True), (math.inf, True), (math.nan, True)]
)
def test_reading(value: float, alarming: bool) -> None:
    assert Reading("gemm", "head", "linear", "fprop", value).alarming is alarming


@pytest.mark.parametrize("confidence", [-0.1, 1.1, math.nan])
def test_confidence_is_a_fraction(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        Finding("gpu.xid", "79", Severity.FATAL, confidence, "node-1", None, "xid", 0.0)
