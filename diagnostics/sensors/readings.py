"""Where a step's readings wait on the device until somebody asks: one growing buffer, no host sync while it fills."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.health import Alarm

# Rows a chunk holds: one step of a small model (some 300 checks of 1,024 rows) fits in one, 1 MiB.
CHUNK_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class Site:
    """Which check a run of rows belongs to."""

    sensor: str
    module: str
    operation: str
    pass_: str
    shape: tuple[int, ...]
    exact: bool = False  # see `operation.Checked`


@dataclass(frozen=True, slots=True)
class _Segment:
    site: Site
    chunk: int
    start: int
    rows: int


class ReadingLog:
    """Readings by site. `append` never reads the device; `worst` and `alarms` do.

    Invariant: segments of one chunk are adjacent and fill rows 0..used-1 of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunks: list[Tensor] = []
        self._used: list[int] = []
        self._segments: list[_Segment] = []

    def __len__(self) -> int:
        return len(self._segments)

    def clear(self) -> None:
        """Forget all readings and keep the memory."""
        self._segments.clear()
        self._used = [0] * len(self._used)
        self._used = self._used[:1]
        self._chunks = self._chunks[:1]

    def append(self, site: Site, readings: Tensor) -> None:
        """Keep fp32 readings [rows] of one check. No rows, no check: nothing was computed."""
        rows = readings.numel()
        if rows == 0:
            return
        if not self._chunks or self._used[-1] + rows > self._chunks[-1].numel():
            self._chunks.append(torch.empty(max(CHUNK_ROWS, rows), dtype=torch.float32, device=self._device))
            self._used.append(0)
        start = self._used[-1]
        self._chunks[-1][start : start + rows].copy_(readings)
        self._used[-1] = start + rows
        self._segments.append(_Segment(site, len(self._chunks) - 1, start, rows))

    def worst(self) -> float:
        """The largest reading, NaN if any is NaN, 0.0 if there is none. Waits for the device."""
        worsts = [float(chunk[:used].amax()) for chunk, used in zip(self._chunks, self._used, strict=True) if used]
        if any(math.isnan(value) for value in worsts):
            return math.nan
        return max(worsts, default=0.0)

    def alarms(self) -> list[Alarm]:
        """Every check with a reading that is `not (reading <= 1)`, in the order the checks were made."""
        chunks = self._on_host()
        return [alarm for segment in self._segments if (alarm := _alarm(segment, chunks)) is not None]

    def by_site(self) -> list[tuple[Site, float]]:
        """The largest reading of every check, in the order the checks were made. Waits for the device."""
        chunks = self._on_host()
        return [(segment.site, float(_rows(segment, chunks).amax())) for segment in self._segments]

    def first_alarm(self) -> int | None:
        """The number, from 0, of the first check that alarms."""
        chunks = self._on_host()
        return next((i for i, segment in enumerate(self._segments) if _alarm(segment, chunks) is not None), None)

    def _on_host(self) -> list[Tensor]:
        """All chunks at once: asking a GPU for each segment would wait for it a thousand times."""
        return [chunk[:used].cpu() for chunk, used in zip(self._chunks, self._used, strict=True)]


def _rows(segment: _Segment, chunks: list[Tensor]) -> Tensor:
    return chunks[segment.chunk][segment.start : segment.start + segment.rows]


def _alarm(segment: _Segment, chunks: list[Tensor]) -> Alarm | None:
    rows = _rows(segment, chunks)
    reading = float(rows.amax())
    if reading <= 1.0:
        return None
    bad = torch.logical_not(rows <= 1.0).nonzero().flatten()
    site = segment.site
    where = f"{len(bad)} of {segment.rows} rows of {list(site.shape)}, first {int(bad[0])}"
    where = where if site.shape else "value"
    return Alarm(site.sensor, site.module, site.operation, site.pass_, reading, where, site.exact)
