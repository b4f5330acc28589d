"""Robust statistics and the log of readings: bounded, NaN-proof, and indifferent to a step redone."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.sensors.readings import CHUNK_ROWS, ReadingLog, Site
from diagnostics.sensors.statistics import FEWEST, WINDOW, Histories, Statistic

SITE = Site("gemm", "head", "linear", "fprop", (4, 8))


def told(histories: Histories, key: int, **scalars: float) -> dict[str, Statistic]:
    """Add one step's scalars; what they are beside the steps before, by name."""
    found = histories.add(key, tuple(scalars), np.array(list(scalars.values()), dtype=np.float64))
    return {statistic.name: statistic for statistic in found.all()}


STEPS = st.lists(st.tuples(st.integers(0, 100), st.dictionaries(st.sampled_from("abc"), st.floats())), max_size=200)


@given(STEPS)
def test_histories_are_bounded_and_finite_and_alike_to_plain_ones(steps: list[tuple[int, dict[str, float]]]) -> None:
    """Against dictionaries and the standard library's medians."""
    histories = Histories()
    plain: dict[int, dict[str, float]] = {}
    for key, scalars in steps:
        plain.pop(key, None)
        found = told(histories, key, **scalars)
        while len(plain) >= WINDOW:
            plain.pop(next(iter(plain)))
        for name in scalars:
            others = [step[name] for step in plain.values() if math.isfinite(step.get(name, math.nan))]
            if len(others) < FEWEST:
                assert math.isnan(found[name].z)
            elif abs(statistics.median(others)) < 1e300:
                assert found[name].median == pytest.approx(statistics.median(others))
        plain[key] = scalars
    assert histories._rows.shape == (len({name for _, scalars in steps for name in scalars}), WINDOW)
    assert len(histories._slots) == len(plain)
    assert not np.isinf(histories._rows).any()


def test_z_is_robust_to_outliers_and_ignores_the_steps_own_value() -> None:
    histories = Histories()
    for key in range(20):
        told(histories, key, loss=1e9 if key == 7 else 3.0 + 0.1 * (key % 3))
    assert abs(told(histories, 99, loss=3.1)["loss"].z) < 1
    assert told(histories, 99, loss=13.1)["loss"].z > 50
    assert told(histories, 99, loss=3.2)["loss"] == told(histories, 99, loss=3.2)["loss"]
    assert math.isnan(told(histories, 99, loss=math.nan)["loss"].z)
    assert math.isnan(told(Histories(), 0, loss=1.0)["loss"].z)


def test_where_most_values_are_the_same_a_rare_one_is_not_without_measure() -> None:
    """Shares that are mostly 0, as FP8's saturation is."""
    histories = Histories()
    for key in range(20):
        told(histories, key, share=0.25 if key == 3 else 0.0, always=1.0)
    found = told(histories, 99, share=0.5, always=1.0)
    assert 1 < found["share"].z < 100
    assert found["always"].z == 0.0
    assert told(histories, 99, share=0.0, always=1.5)["always"].z == math.inf
    with_least = histories.add(99, ("always", "share"), np.array([1.5, 0.5]), np.array([0.1, 0.0])).all()
    assert with_least[0].z == pytest.approx(5.0)
    assert with_least[1] == found["share"]


def test_the_most_unusual_come_first_and_what_has_no_history_not_at_all() -> None:
    histories = Histories()
    for key in range(20):
        told(histories, key, a=key % 5, b=key % 3, c=key % 4, d=7.0, e=8.0)
    scalars = {"a": 50.0, "b": -90.0, "c": 2.0, "d": 9.0, "e": math.nan, "new": 1e9}
    found = histories.add(99, tuple(scalars), np.array(list(scalars.values())))
    assert [statistic.name for statistic in found.largest(9)] == ["e", "d", "b", "a", "c"]
    assert [statistic.name for statistic in found.largest(2)] == ["e", "d"]
    assert Histories().add(0, (), np.zeros(0)).largest(5) == []


@given(st.lists(st.lists(st.floats(0, 3, width=32), min_size=1, max_size=6), min_size=1, max_size=8))
def test_log_finds_every_alarm(readings: list[list[float]]) -> None:
    log = ReadingLog(torch.device("cpu"))
    for rows in readings:
        log.append(SITE, torch.tensor(rows))
    assert log.worst() == max(max(rows) for rows in readings)
    assert [alarm.reading for alarm in log.alarms()] == [max(rows) for rows in readings if max(rows) > 1]
    log.clear()
    assert (len(log), log.worst(), log.alarms()) == (0, 0.0, [])


def test_log_spans_chunks_and_keeps_nan() -> None:
    log = ReadingLog(torch.device("cpu"))
    log.append(SITE, torch.zeros(CHUNK_ROWS - 1))
    log.append(SITE, torch.tensor([0.5, math.nan]))
    log.append(SITE, torch.zeros(CHUNK_ROWS + 5))
    log.append(SITE, torch.zeros(0))
    assert len(log) == 3
    assert math.isnan(log.worst())
    (alarm,) = log.alarms()
    assert math.isnan(alarm.reading)
    assert "first 1" in alarm.location
