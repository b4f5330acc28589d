"""Traces that join the processes of one incident: spans go to a collector if one is configured, else to a file."""

import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Span, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

# Spans that wait for the background thread. An incident makes about ten; more than this is a fault of ours, and
# dropping spans is better than growing.
QUEUE_SPANS = 2048
# How often the background thread writes. Short, so that a process killed with -9 loses at most the last 0.2 s.
EXPORT_PERIOD_MS = 200
# A collector that does not answer may hold the background thread for so long, never the caller.
EXPORT_TIMEOUT_MS = 2000

_PROPAGATOR = TraceContextTextMapPropagator()


class FileSpanExporter(SpanExporter):
    """Appends finished spans to a file that several processes share, one JSON object a line.

    Each span is one `write` on a descriptor opened with O_APPEND, so lines of different processes never mix.
    """

    def __init__(self, path: Path, service: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._service = service
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write the spans; a full disk loses them and says so to the SDK, never to the traced code."""
        if self._file is None:
            return SpanExportResult.FAILURE
        try:
            for span in spans:
                os.write(self._file, (json.dumps(_document(span, self._service)) + "\n").encode())
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file; later spans are refused."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@dataclass(frozen=True, slots=True)
class Tracing:
    """A process's tracer, and the provider whose background thread exports what it records."""

    tracer: Tracer
    provider: TracerProvider | None

    def close(self) -> None:
        """Export what is left and stop. Waits for the exporter, so only for the end of a process."""
        if self.provider is not None:
            self.provider.shutdown()


def setup(service: str, path: Path | None, otlp_endpoint: str | None) -> Tracing:
    """Make the tracer of `service` ("assay-agent", ...).

    Spans go to the OTLP collector at `otlp_endpoint` (gRPC, e.g. "http://127.0.0.1:4317") when given, else to the JSON
    lines file `path`; with neither, spans are made (so that trace contexts still travel) and forgotten.
    Raises OSError when the file cannot be opened.
    """
    provider = TracerProvider(sampler=ALWAYS_ON, resource=Resource({"service.name": service}), shutdown_on_exit=False)
    exporter = _exporter(service, path, otlp_endpoint)
    if exporter is not None:
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUE_SPANS,
                max_export_batch_size=QUEUE_SPANS // 4,
                schedule_delay_millis=EXPORT_PERIOD_MS,
                export_timeout_millis=EXPORT_TIMEOUT_MS,
            )
        )
    return Tracing(provider.get_tracer("assay"), provider)


def traceparent(span: Span) -> str:
    """Give the W3C trace context of `span` as one header value, to travel in a report or an action."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context=set_span_in_context(span, Context()))
    return carrier.get("traceparent", "")


def context(parent: str) -> Context:
    """Read a traceparent back; an empty or malformed one gives an empty context: a new trace."""
    return _PROPAGATOR.extract({"traceparent": parent}, context=Context())


def _exporter(service: str, path: Path | None, otlp_endpoint: str | None) -> SpanExporter | None:
    if otlp_endpoint:
        # Loaded only here: it brings gRPC along, which workers and the gang otherwise do without.
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
        exporter: SpanExporter = otlp.OTLPSpanExporter(endpoint=otlp_endpoint, timeout=EXPORT_TIMEOUT_MS / 1000)
        return exporter
    return FileSpanExporter(path, service) if path is not None else None


def _document(span: ReadableSpan, service: str) -> dict[str, Any]:
    """One span as the object that a line holds: ids in hex, times in seconds since 1970."""
    own = span.get_span_context()
    parent = span.parent
    return {
        "schema": "assay.span/1",
        "trace_id": format(own.trace_id, "032x") if own else "",
        "span_id": format(own.span_id, "016x") if own else "",
        "parent_id": format(parent.span_id, "016x") if parent else "",
        "service": service,
        "pid": os.getpid(),
        "name": span.name,
        "start": (span.start_time or 0) / 1e9,
        "end": (span.end_time or 0) / 1e9,
        "attributes": dict(span.attributes or {}),
        "links": [format(link.context.span_id, "016x") for link in span.links],
    }
