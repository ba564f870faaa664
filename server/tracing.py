"""OpenTelemetry traces: one trace spans a request, its job and the sandbox of the job.

The API is always installed and does nothing by itself. With the extra ``otel`` and OTEL_EXPORTER_OTLP_ENDPOINT set,
spans are exported by OTLP over HTTP; the SDK reads its other variables itself (OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS, ...). Names follow OpenTelemetry's semantic conventions. A ``traceparent`` (W3C Trace
Context) carries a trace between processes.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server import __version__
from server.settings import Settings, SettingsError

log = structlog.get_logger()

EXPORT_TIMEOUT_SECONDS = 5.0
_TRACEPARENT = "traceparent"
_tracer = trace.get_tracer("server", __version__)
_propagator = TraceContextTextMapPropagator()


@asynccontextmanager
async def export_traces(settings: Settings, service: str) -> AsyncIterator[None]:
    """Export spans to the collector during the block, from a thread of the SDK, and the last ones at its end.

    Raises:
        SettingsError: the extra is not installed.
    """
    if not settings.otel_exporter_otlp_endpoint:
        yield
        return
    try:
        provider = _make_provider(settings.otel_exporter_otlp_endpoint, service)
    except ImportError as error:
        raise SettingsError(
            f'Environment variable "OTEL_EXPORTER_OTLP_ENDPOINT" invalid: Needs the extra otel: {error}'
        ) from error
    trace.set_tracer_provider(provider)
    log.info("trace export started", service=service)
    try:
        yield
    finally:
        await asyncio.to_thread(provider.shutdown)


def _make_provider(endpoint: str, service: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": service, "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


@contextmanager
def span(
    name: str, kind: SpanKind = SpanKind.INTERNAL, *, parent: str | None = None, **attributes: str | int
) -> Iterator[Span]:
    """Open a span around the block: a child of ``parent`` (a ``traceparent``), else of the current span.

    Attribute names have ``_`` in place of their dots.
    """
    context = _propagator.extract({_TRACEPARENT: parent}) if parent else None
    renamed = {key.replace("_", "."): value for key, value in attributes.items()}
    with _tracer.start_as_current_span(name, context=context, kind=kind, attributes=renamed) as started:
        yield started


def request_span(method: str, headers: Mapping[str, str]) -> Any:
    """Open the span of a request; its parent is the client's span, if it sent one."""
    return span(method, SpanKind.SERVER, parent=headers.get(_TRACEPARENT), http_request_method=method)


def record_response(span: Span, *, method: str, route: str, status: int) -> None:
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status})
    if status >= 500:
        span.set_status(trace.StatusCode.ERROR)


def current_traceparent() -> str | None:
    """Return the ``traceparent`` of the current span, to continue it elsewhere; None outside of a span."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get(_TRACEPARENT)
