"""Takes the time of work where it is done: on the host, or on the device that it is only launched on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up spans of time. On CUDA a span is the stream's, from where the device begins it until it is through.

    Nothing here waits for a device: a span counts from when it is through.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._begun: float | _Span | None = None
        self._launched: list[_Span] = []

    def begin(self, device: torch.device) -> None:
        """A span begins; one that was not ended is forgotten."""
        self._begun = _Span(device) if device.type == "cuda" else time.perf_counter()

    def end(self) -> None:
        """It ends; without a span under way nothing happens."""
        begun, self._begun = self._begun, None
        if isinstance(begun, float):
            self._seconds += time.perf_counter() - begun
        elif begun is not None:
            begun.end()
            self._launched.append(begun)

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """A span, whether the work succeeds or not."""
        self.begin(device)
        try:
            yield
        finally:
            self.end()

    @property
    def launched(self) -> bool:
        """Whether a device has been given work whose time is not counted yet."""
        return bool(self._launched)

    @property
    def through(self) -> bool:
        """Whether the device is through with every span."""
        return all(span.through for span in self._launched)

    def taken(self) -> float:
        """Seconds of the spans that are through, and were not counted before."""
        counted = [span for span in self._launched if span.through]
        taken = self._seconds + sum(span.seconds for span in counted)
        self._seconds, self._launched = 0.0, [span for span in self._launched if span not in counted]
        return taken


class _Span:
    """Of a device's stream, from where this is made to where it is ended."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._begin.record(self._stream)

    def end(self) -> None:
        self._end.record(self._stream)

    @property
    def through(self) -> bool:
        return bool(self._end.query())  # type: ignore[no-untyped-call]

    @property
    def seconds(self) -> float:
        return float(self._begin.elapsed_time(self._end)) / 1e3
