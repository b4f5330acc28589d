"""Robust statistics and the log of readings: bounded, NaN-proof, and indifferent to a step redone."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.sensors.readings import CHUNK_ROWS, ReadingLog, Site
from diagnostics.sensors.statistics import WINDOW, History

SITE = Site("gemm", "head", "linear", "fprop", (4, 8))


@given(st.lists(st.tuples(st.integers(0, 100), st.floats()), max_size=200))
def test_history_is_bounded_and_finite(values: list[tuple[int, float]]) -> None:
    history = History()
    for key, value in values:
        history.z(key, value)
        history.add(key, value)
    assert len(history._values) <= WINDOW
    assert all(math.isfinite(v) for v in history._values.values())


def test_z_is_robust_to_outliers_and_ignores_the_steps_own_value() -> None:
    history = History()
    for key in range(20):
        history.add(key, 1e9 if key == 7 else 3.0 + 0.1 * (key % 3))
    assert abs(history.z(99, 3.1)) < 1
    assert history.z(99, 13.1) > 50
    assert history.z(5, 3.1) == history.z(5, 3.1)
    assert math.isnan(history.z(99, math.nan))
    assert math.isnan(History().z(0, 1.0))


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
