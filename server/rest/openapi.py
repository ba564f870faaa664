"""The OpenAPI document and Swagger UI.

aiohttp-apispec builds the document from its own decorators, and from our marks: the responses that all routes of a kind
have in common are derived, never written twice. aiohttp-apispec consumes its decorators' data, so it gets copies.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp_apispec
from aiohttp import hdrs, web
from aiohttp_apispec import AiohttpApiSpec
from marshmallow import fields

from server import __version__, errors, json
from server.errors import ERROR_CODES
from server.fields import Schema
from server.ratelimit import limit_of
from server.rest import assets, examples
from server.rest.assets import Asset
from server.rest.idempotency import KEY_PATTERN, REPLAYED_HEADER
from server.rest.marks import Idempotency, error_codes_of, idempotency_of, is_public, produces_json

STATIC_DIR = Path(aiohttp_apispec.__file__).parent / "static"
DOCUMENT_PATH = "/api-docs/swagger.json"
_METHODS = {hdrs.METH_GET, hdrs.METH_POST, hdrs.METH_PUT, hdrs.METH_PATCH, hdrs.METH_DELETE}


class FieldProblem(Schema):
    field = fields.String(metadata={"example": "email"})
    message = fields.String(metadata={"example": "Not a valid email address."})


class Problem(Schema):
    """RFC 9457 problem details."""

    type = fields.String(metadata={"example": "about:blank"})
    title = fields.String(metadata={"example": "Conflict"})
    status = fields.Integer(metadata={"example": 409})
    detail = fields.String(metadata={"example": "Email already registered"})
    code = fields.String(metadata={"enum": sorted(code for code, (status, _) in ERROR_CODES.items() if status)})
    error = fields.String(metadata={"description": "the same as detail, for older clients"})
    details = fields.List(fields.Nested(FieldProblem), metadata={"description": "validation errors only"})
    request_id = fields.String()


PROBLEM = Problem()
_EXAMPLE_ID = "5f2b8c1e9a7d4c3b8e6f0a1b2c3d4e5f"
_HEADERS = {
    "X-Request-Id": {"type": "string", "description": "the client's own id, if well-formed, else a new one"},
    "RateLimit-Policy": {"type": "string", "description": 'the quota and its seconds: `"default";q=100;w=900`'},
    "RateLimit": {"type": "string", "description": 'the rest of the quota, and for how long: `"default";r=99;t=512`'},
    "Retry-After": {"type": "integer", "description": "seconds"},
    "Location": {"type": "string", "description": "the path of the created resource"},
    REPLAYED_HEADER: {"type": "string", "description": "true if this is the response to an earlier request"},
    "ETag": {"type": "string", "description": "of this revision, for `If-Match` and `If-None-Match`"},
}
_PRECONDITION_HEADERS = (
    ("304", "If-None-Match", "an `ETag`: 304 if it is current"),
    ("412", "If-Match", "an `ETag`: change only that revision, else 412"),
    ("412", "If-None-Match", "an `ETag`: change any other revision, else 412; `*` always fails"),
)
_IDEMPOTENCY_KEY = {
    "in": "header",
    "name": "Idempotency-Key",
    "type": "string",
    "pattern": KEY_PATTERN.pattern,
    "description": "a unique key of the client: a repeated request with it has one effect and one response, for 24 h",
}
NeedsRole = Callable[[Callable[..., Any]], bool]


def build_document(routes: Iterable[web.AbstractRouteDef], *, needs_role: NeedsRole) -> dict[str, Any]:
    """Return the OpenAPI 2 document of these routes, in their order."""
    spec = AiohttpApiSpec(
        url=None,
        app=None,
        title="Collaborative Workspace Backend",
        version=__version__,
        info={"description": _DESCRIPTION},
        securityDefinitions={
            "bearer": {
                "type": "apiKey",
                "in": "header",
                "name": "Authorization",
                "description": "Bearer <accessToken>, from register or login",
            }
        },
        consumes=["application/json"],
        produces=["application/json", "application/problem+json"],
    )
    for route in routes:
        if isinstance(route, web.RouteDef) and route.method in _METHODS:
            operation_data = _describe_operation(route, needs_role=needs_role)
            if operation_data is not None:
                spec._update_paths(operation_data, route.method.lower(), route.path)
    swagger: dict[str, Any] = spec.swagger_dict()
    for operation in (operation for methods in swagger["paths"].values() for operation in methods.values()):
        for parameter in operation["parameters"]:
            _remove_null(parameter)
    for definition in swagger["definitions"].values():
        for field in definition.get("properties", {}).values():
            _remove_null_default(field)
    examples.add_examples(swagger)
    return swagger


def _describe_operation(route: web.RouteDef, *, needs_role: NeedsRole) -> dict[str, Any] | None:
    handler: Any = route.handler
    data: dict[str, Any] | None = copy.deepcopy(getattr(handler, "__apispec__", None))
    if data is None:
        return None
    data["operationId"] = handler.__name__
    data["security"] = [] if is_public(handler) else [{"bearer": []}]
    for declared in data["schemas"]:
        if declared["location"] == "json":
            declared["options"]["required"] = any(f.required for f in declared["schema"].fields.values())
    responses = data["responses"] = {str(status): response for status, response in data["responses"].items()}
    if not any(status.startswith("2") for status in responses):
        responses["204"] = {"description": "done"}
    if route.method == hdrs.METH_GET and _is_entity(responses.get("200", {})):
        responses["304"] = {"description": "`If-None-Match` names the current `ETag`"}
    for status, codes in _error_codes_by_status(route, needs_role=needs_role):
        responses.setdefault(status, _error_response(int(status), codes))
    for status, response in responses.items():
        response["headers"] = {name: _HEADERS[name] for name in _header_names(route, status, responses)}
    _add_precondition_headers(data["parameters"], responses)
    if idempotency_of(handler):
        data["parameters"].append(_IDEMPOTENCY_KEY)
    return data


def _is_entity(response: dict[str, Any]) -> bool:
    """Return whether a response is a single entity, which has an ETag; not a list or a count."""
    schema = response.get("schema")
    return schema is not None and "created_at" in schema.fields


def _header_names(route: web.RouteDef, status: str, responses: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the documented headers of the response with this status."""
    yield "X-Request-Id"
    if limit_of(route.handler):
        yield from ("RateLimit-Policy", "RateLimit")
    if status in ("429", "503"):
        yield "Retry-After"
    if status in ("200", "201") and idempotency_of(route.handler):
        yield REPLAYED_HEADER
    if status == "201" and _has_id(responses[status]):
        yield "Location"
    shows_entity = _is_entity(responses[status]) and (status == "201" or route.method != hdrs.METH_POST)
    if shows_entity or (status in ("200", "304") and "304" in responses):
        yield "ETag"


def _has_id(response: dict[str, Any]) -> bool:
    """Return whether a created resource, bare or wrapped, has an id; a ticket has none."""
    inner = [f.schema for f in response["schema"].fields.values() if isinstance(f, fields.Nested)]
    return any("id" in schema.fields for schema in (response["schema"], *inner))


def _add_precondition_headers(parameters: list[dict[str, Any]], responses: dict[str, Any]) -> None:
    names = {parameter["name"] for parameter in parameters}
    for status, name, description in _PRECONDITION_HEADERS:
        if status in responses and name not in names:
            parameters.append({"in": "header", "name": name, "type": "string", "description": description})


def _remove_null(parameter: dict[str, Any]) -> None:
    """Remove null from a parameter: it stands for a missing one inside, and no client can send it."""
    parameter.pop("x-nullable", None)
    _remove_null_default(parameter)
    if None in parameter.get("enum", ()):
        parameter["enum"] = [value for value in parameter["enum"] if value is not None]


def _remove_null_default(described: dict[str, Any]) -> None:
    """Remove a default of null: clients that are generated in Go and Java would send the word null."""
    if described.get("default", "") is None:
        del described["default"]


def _error_response(status: int, codes: list[str]) -> dict[str, Any]:
    error = next(kind for kind in errors.ERROR_CLASSES if kind.status == status)(
        ERROR_CODES[codes[0]][1], code=codes[0]
    )
    return {
        "schema": PROBLEM,
        "description": "; ".join(f"`{code}`: {ERROR_CODES[code][1]}" for code in codes),
        "examples": {"application/problem+json": errors.problem(error, request_id=_EXAMPLE_ID)},
    }


def _error_codes_by_status(route: web.RouteDef, *, needs_role: NeedsRole) -> Iterator[tuple[str, list[str]]]:
    """Yield the error codes of a route by status, derived from its marks."""
    handler: Any = route.handler
    codes = list(error_codes_of(handler))
    if idempotency := idempotency_of(handler):
        codes.append("idempotency_key_reused")
        codes += ["idempotency_in_progress"] if idempotency is Idempotency.BY_TRANSACTION else []
    if not is_public(handler):
        codes.append("unauthenticated")
    if needs_role(handler):
        codes += ["forbidden", "not_found"]
    locations = {declared["location"] for declared in getattr(handler, "__schemas__", ())}
    if route.method in (hdrs.METH_PATCH, hdrs.METH_PUT, hdrs.METH_DELETE):
        codes.append("precondition_failed")
    if "json" in locations:
        codes += ["too_large", "unsupported_media_type"]
    if limit_of(handler):  # routes without a limit are for operators, and need no store to admit a request
        codes += ["bad_request", "rate_limited", "unavailable"]
        codes += ["validation_failed"] if produces_json(handler) else []
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys(codes):
        status = ERROR_CODES[code][0]
        assert status is not None
        by_status.setdefault(status, []).append(code)
    for status, of_status in sorted(by_status.items()):
        yield str(status), of_status


def add_swagger(app: web.Application, swagger: dict[str, Any]) -> None:
    """Serve the document and the page that shows it."""
    add_page(app, DOCUMENT_PATH, json.dumps(swagger))
    files = {name: Asset.of_file(STATIC_DIR / name, cache=f"public, {assets.CACHE_IMMUTABLE}") for name in _ASSETS}
    for name, asset in files.items():
        app.router.add_get(f"{_STATIC_PATH}/{name}", asset.respond)
    page = Asset(lambda: _page(files), "text/html", cache=assets.CACHE_ONE_MINUTE, headers=_PAGE_POLICY)
    app.router.add_get("/api-docs", page.respond)
    app.router.add_get("/api-docs/", page.respond)


def add_page(app: web.Application, path: str, body: bytes, *, policy: str | None = None) -> None:
    """Serve a document (JSON) or, with the content security policy that it needs, a page (HTML)."""
    kind = "application/json" if policy is None else "text/html"
    headers = {} if policy is None else {"Content-Security-Policy": policy}
    app.router.add_get(path, Asset(lambda: body, kind, cache=assets.CACHE_ONE_MINUTE, headers=headers).respond)


def _page(files: Mapping[str, Asset]) -> bytes:
    """Return aiohttp-apispec's page, changed to add the word Bearer to a token that was pasted without it."""
    page = (STATIC_DIR / "index.html").read_text()
    for old, new in (
        ("{{ path }}", DOCUMENT_PATH),
        ("<title>Swagger UI</title>", "<title>Collaborative Workspace Backend: API</title>"),
        ("dom_id: '#swagger-ui',", "dom_id: '#swagger-ui',\n" + _BEARER_INTERCEPTOR),
        # The URL contains the version, because browsers never reload an immutable file.
        *((f"{{{{ static }}}}/{name}", f"{_STATIC_PATH}/{name}?v={asset.tag}") for name, asset in files.items()),
    ):
        assert old in page, old  # aiohttp-apispec is pinned; a new version of its page needs a review
        page = page.replace(old, new)
    return page.encode()


_STATIC_PATH = "/api-docs/static"
_ASSETS = (
    "favicon-16x16.png",
    "favicon-32x32.png",
    "swagger-ui.css",
    "swagger-ui-bundle.js",
    "swagger-ui-standalone-preset.js",
)
_PAGE_POLICY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
}
_BEARER_INTERCEPTOR = """        persistAuthorization: true,
        requestInterceptor: request => {
          const token = request.headers.Authorization;
          if (token && !/^bearer /i.test(token)) request.headers.Authorization = "Bearer " + token.trim();
          return request;
        },"""
_DESCRIPTION = """The server behind collaborative coding platforms.

Sign in with **POST /api/v1/auth/login**, press *Authorize* and paste the `accessToken`.
Errors are problem details (RFC 9457); their `code` is stable. Lists are `{items, nextCursor}`.
Unknown fields, unknown query parameters and integers beyond 64 bits are rejected. A POST that creates honours
`Idempotency-Key`; PATCH, PUT, DELETE and restore honour `If-Match` and `If-None-Match`.
Live collaboration runs over WebSockets at `/ws`."""
