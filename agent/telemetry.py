"""The agent's spans: each order from the controller becomes one, joined to the trace of the incident it belongs to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opentelemetry.trace import Span

from assay import telemetry


class Telemetry:
    """Records spans to a collector or a file, in the background. Costs the daemon tens of microseconds a span."""

    def __init__(self, trace: Path | None, otlp_endpoint: str | None) -> None:
        self._tracing = telemetry.setup("assay-agent", trace, otlp_endpoint)

    @contextmanager
    def span(self, name: str, parent: str, **attributes: str | int) -> Iterator[Span]:
        """Record `assay.agent.{name}` under the traceparent `parent` (empty: a trace of its own)."""
        named = {f"assay.{key}": value for key, value in attributes.items()}
        with self._tracing.tracer.start_as_current_span(
            f"assay.agent.{name}", context=telemetry.context(parent), attributes=named
        ) as span:
            yield span

    def close(self) -> None:
        """Export what is left."""
        self._tracing.close()


def traceparent(span: Span) -> str:
    """The context to hand on, so that what follows joins the span's trace."""
    return telemetry.traceparent(span)
