"""Traces, as an OpenTelemetry collector receives them."""

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server import tracing
from server.settings import Settings, SettingsError
from tests.actors import Actor
from tests.conftest import environment_of
from tests.processes import Processes

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Collector:
    """An OTLP receiver; it stores every span with the name of the service that sent it."""

    address: str = ""
    spans: list[tuple[str, Span]] = field(default_factory=list)

    async def receive(self, request: web.Request) -> web.Response:
        exported = ExportTraceServiceRequest.FromString(await request.read())
        for resource in exported.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return web.Response(content_type="application/x-protobuf")

    def of_trace(self, trace: str) -> dict[str, tuple[str, Span]]:
        """Return the spans of a trace by name, in the order of their start."""
        spans = sorted(self.spans, key=lambda entry: entry[1].start_time_unix_nano)
        return {span.name: (service, span) for service, span in spans if span.trace_id.hex() == trace}


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.receive)
    async with TestServer(app) as server:
        collector.address = str(server.make_url("")).rstrip("/")
        yield collector


async def test_one_trace_spans_the_request_the_job_and_the_sandbox(
    collector: Collector, processes: Processes, http: aiohttp.ClientSession, isolated_stores: dict[str, str]
) -> None:
    options = environment_of(isolated_stores) | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.address,
        "JOB_FAULT_RATE": "0",
    }
    server, worker = processes.server(**options), processes.worker(**options).ready()
    ada = await Actor(http, server.base, "Ada").register()
    body = {"type": "CODE_EXECUTION", "payload": {"language": "python", "code": "print(6 * 7)"}}
    created = await ada.post("/jobs", body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert "trace" not in created["job"]
    assert (await ada.finished_job(created["job"]["id"]))["result"]["stdout"] == "42\n"
    missing = await ada.get("/jobs/nobody", headers={"traceparent": "not one"})
    assert missing.status == 404
    # Processes export their last spans when they stop.
    await asyncio.gather(asyncio.to_thread(server.terminate), asyncio.to_thread(worker.terminate))

    spans = collector.of_trace(TRACE)
    assert {name: service for name, (service, _) in spans.items()} == {
        "POST /api/v1/jobs": "server",
        "attempt CODE_EXECUTION": "worker",
        "sandbox": "worker",
    }
    request, attempt, sandbox = (span for _, span in spans.values())
    assert request.parent_span_id.hex() == PARENT
    assert attempt.parent_span_id == request.span_id
    assert sandbox.parent_span_id == attempt.span_id
    assert (request.kind, attempt.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CONSUMER)
    other_names = {span.name for _, span in collector.spans} - spans.keys()
    assert "GET /api/v1/jobs/{jobId}" in other_names


async def test_failed_attempt_is_an_error_in_its_trace(
    collector: Collector, processes: Processes, http: aiohttp.ClientSession, isolated_stores: dict[str, str]
) -> None:
    options = environment_of(isolated_stores) | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.address,
        "JOB_FAULT_RATE": "1",
    }
    server, worker = processes.server(**environment_of(isolated_stores)), processes.worker(**options).ready()
    ada = await Actor(http, server.base, "Ada").register()
    created = await ada.post("/jobs", {"type": "DATA_ANALYSIS", "payload": {"format": "csv", "content": "a\n1\n"}})
    assert (await ada.finished_job(created["job"]["id"]))["status"] == "failed"
    await asyncio.to_thread(worker.terminate)
    codes = [span.status.code for _, span in collector.spans if span.name == "attempt DATA_ANALYSIS"]
    assert codes == [Status.STATUS_CODE_ERROR] * 3


async def test_missing_extra_is_reported_at_start(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with_endpoint = dataclasses.replace(settings, otel_exporter_otlp_endpoint="http://127.0.0.1:9")
    with pytest.raises(SettingsError, match=r'"OTEL_EXPORTER_OTLP_ENDPOINT" invalid: Needs the extra otel'):
        async with tracing.export_traces(with_endpoint, "server"):
            pass
