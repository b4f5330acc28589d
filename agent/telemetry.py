"""The node's spans: orders that the agent carries out and what workers do about an alarm, joined to their incident."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from opentelemetry.trace import Span

from assay import telemetry


class Telemetry:
    """Records spans of an agent or a worker to a collector or a file, in the background.

    A span costs its caller tens of microseconds; none is made for a step that nothing disturbs.
    """

    def __init__(self, role: Literal["agent", "worker"], trace: Path | None, otlp_endpoint: str | None) -> None:
        self._role = role
        self._tracing = telemetry.setup(f"assay-{role}", trace, otlp_endpoint)

    @contextmanager
    def span(self, name: str, parent: str, **attributes: str | int | float) -> Iterator[Span]:
        """Record `assay.{role}.{name}` under the traceparent `parent` (empty: a trace of its own)."""
        named = {f"assay.{key}": value for key, value in attributes.items()}
        with self._tracing.tracer.start_as_current_span(
            f"assay.{self._role}.{name}", context=telemetry.context(parent), attributes=named
        ) as span:
            yield span

    def close(self) -> None:
        """Export what is left."""
        self._tracing.close()


def traceparent(span: Span) -> str:
    """The context to hand on, so that what follows joins the span's trace."""
    return telemetry.traceparent(span)
