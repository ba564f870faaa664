"""The OpenAPI document: every route with its parameters, responses and errors."""

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest
from aiohttp import web

from server.app import API, swagger_document
from server.errors import ERROR_CODES
from server.rest.marks import is_public
from tests.actors import Actor
from tests.test_roles import fill_path, resource_ids_of

DOCUMENT = swagger_document()
OPERATIONS = [
    (path, method, operation) for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()
]


def name(value: object) -> str:
    return str(value) if isinstance(value, str) else ""


def test_document_contains_exactly_the_routes() -> None:
    routes = {(route.path, route.method.lower()) for table in API for route in table if isinstance(route, web.RouteDef)}
    assert {(path, method) for path, method, _ in OPERATIONS} == routes


def test_second_document_equals_the_first() -> None:
    assert swagger_document.__wrapped__() == DOCUMENT


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS, ids=name)
def test_operation_documents_summary_parameters_and_responses(path: str, method: str, operation: dict) -> None:
    assert operation["summary"]
    assert operation["tags"]
    assert any(status.startswith("2") for status in operation["responses"])
    in_path = {part.strip("{}") for part in path.split("/") if part.startswith("{")}
    assert {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"} == in_path
    for status, response in operation["responses"].items():
        if status >= "4" and path.startswith("/api/"):
            assert response["schema"] == {"$ref": "#/definitions/Problem"}
            assert ERROR_CODES[response["examples"]["application/problem+json"]["code"]][0] == int(status)


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS, ids=name)
def test_operation_documents_examples_and_headers_of_responses(path: str, method: str, operation: dict) -> None:
    for status, response in operation["responses"].items():
        if "schema" in response:
            assert response["examples"], status
        assert "X-Request-Id" in response["headers"]
        assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
        assert ("RateLimit" in response["headers"]) == path.startswith("/api/")
    header_parameters = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "header"}
    changes = method in ("patch", "put", "delete") or operation["operationId"] == "restore_version"
    assert ("If-Match" in header_parameters) == changes
    assert ("If-None-Match" in header_parameters) == (changes or "304" in operation["responses"])


def test_every_property_has_an_example() -> None:
    for defined, schema in DOCUMENT["definitions"].items():
        for property_name, property_schema in schema["properties"].items():
            if property_schema.get("type") not in ("array", "object") and "$ref" not in property_schema:
                assert property_schema["example"] != property_name, (defined, property_name)


def test_parameters_never_document_null() -> None:
    for path, _, operation in OPERATIONS:
        for parameter in operation["parameters"]:
            assert None not in [*parameter.get("enum", ()), parameter.get("default", "")], (path, parameter)


async def test_etags_are_sent_exactly_if_documented(alice: Actor) -> None:
    ids = await resource_ids_of(alice)
    for path, method, operation in OPERATIONS:
        if method == "get" and path.startswith("/api/"):
            response = await alice.get(fill_path(path, ids))
            if response.status == 200:
                assert ("ETag" in response.headers) == ("ETag" in operation["responses"]["200"]["headers"]), path


def test_operation_documents_whether_it_requires_a_token() -> None:
    for table in API:
        for route in table:
            assert isinstance(route, web.RouteDef)
            operation = DOCUMENT["paths"][route.path][route.method.lower()]
            assert operation["security"] == ([] if is_public(route.handler) else [{"bearer": []}])


def references(value: object) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_no_reference_dangles() -> None:
    assert references(DOCUMENT) == {f"#/definitions/{defined}" for defined in DOCUMENT["definitions"]}


async def test_a_browser_shows_every_operation(alice: Actor, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-quic", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}"]
    command = [chromium, *flags, "--virtual-time-budget=10000", "--dump-dom", f"{alice.base}/api-docs"]
    page = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=True)
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    missing = [id for id in ids if f'-{id}"' not in page.stdout]
    assert missing == []
