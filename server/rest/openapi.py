"""The OpenAPI document and Swagger UI.

Built by aiohttp-apispec from its own decorators, and from our marks: what every route of a kind can answer
is derived, never written twice. aiohttp-apispec consumes its decorators' data, so it is given copies.
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
from server.errors import CODES
from server.fields import Schema
from server.ratelimit import limit_of
from server.rest import assets, examples
from server.rest.assets import Asset
from server.rest.idempotency import KEY, REPLAYED
from server.rest.marks import Idempotency, answers_json, idempotency_of, is_public, refusals_of

STATIC = Path(aiohttp_apispec.__file__).parent / "static"
DOCUMENT = "/api-docs/swagger.json"
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
    code = fields.String(metadata={"enum": sorted(code for code, (status, _) in CODES.items() if status)})
    error = fields.String(metadata={"description": "repeats detail, for older clients"})
    details = fields.List(fields.Nested(FieldProblem), metadata={"description": "validation errors only"})
    request_id = fields.String()


PROBLEM = Problem()
_EXAMPLE_ID = "5f2b8c1e9a7d4c3b8e6f0a1b2c3d4e5f"
_HEADERS = {
    "X-Request-Id": {"type": "string", "description": "the client's own, if sane, else new"},
    "RateLimit-Policy": {"type": "string", "description": 'the budget: `"default";q=100;w=900`'},
    "RateLimit": {"type": "string", "description": 'what is left of it, and for how long: `"default";r=99;t=512`'},
    "Retry-After": {"type": "integer", "description": "seconds"},
    "Location": {"type": "string", "description": "the path of what was created"},
    REPLAYED: {"type": "string", "description": "true where this is the answer to an earlier request"},
    "ETag": {"type": "string", "description": "of this revision, for `If-Match` and `If-None-Match`"},
}
_CONDITIONS = (
    ("304", "If-None-Match", "an `ETag`: 304 where it is current"),
    ("412", "If-Match", "an `ETag`: only that revision, else 412"),
    ("412", "If-None-Match", "an `ETag`: not that revision, else 412; `*` always fails"),
)
_IDEMPOTENCY_KEY = {
    "in": "header",
    "name": "Idempotency-Key",
    "type": "string",
    "pattern": KEY.pattern,
    "description": "any key of yours: the same request with the same key has one effect and one answer, for 24 h",
}
NeedsRole = Callable[[Callable[..., Any]], bool]


def document(routes: Iterable[web.AbstractRouteDef], *, needs_role: NeedsRole) -> dict[str, Any]:
    """The OpenAPI 2 document of these routes, in their order."""
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
            described = _described(route, needs_role=needs_role)
            if described is not None:
                spec._update_paths(described, route.method.lower(), route.path)
    made: dict[str, Any] = spec.swagger_dict()
    for operation in (it for methods in made["paths"].values() for it in methods.values()):
        for parameter in operation["parameters"]:
            _without_null(parameter)
    for definition in made["definitions"].values():
        for field in definition.get("properties", {}).values():
            _without_null_default(field)
    examples.fill(made)
    return made


def _described(route: web.RouteDef, *, needs_role: NeedsRole) -> dict[str, Any] | None:
    handler: Any = route.handler
    data: dict[str, Any] | None = copy.deepcopy(getattr(handler, "__apispec__", None))
    if data is None:
        return None
    data["operationId"] = handler.__name__
    data["security"] = [] if is_public(handler) else [{"bearer": []}]
    for declared in data["schemas"]:
        if declared["location"] == "json":
            declared["options"]["required"] = any(f.required for f in declared["schema"].fields.values())
    answers = data["responses"] = {str(status): answer for status, answer in data["responses"].items()}
    if not any(status.startswith("2") for status in answers):
        answers["204"] = {"description": "done"}
    if route.method == hdrs.METH_GET and _is_entity(answers.get("200", {})):
        answers["304"] = {"description": "`If-None-Match` names its `ETag`"}
    for status, codes in _refusals(route, needs_role=needs_role):
        answers.setdefault(status, _refusal(int(status), codes))
    for status, answer in answers.items():
        answer["headers"] = {name: _HEADERS[name] for name in _headers(route, status, answers)}
    _add_conditions(data["parameters"], answers)
    if idempotency_of(handler):
        data["parameters"].append(_IDEMPOTENCY_KEY)
    return data


def _is_entity(answer: dict[str, Any]) -> bool:
    """One thing, which has an ETag; neither a list nor a count."""
    schema = answer.get("schema")
    return schema is not None and "created_at" in schema.fields


def _headers(route: web.RouteDef, status: str, answers: dict[str, Any]) -> Iterator[str]:
    """Those of the answer with this status, beside those that say what kind it is."""
    yield "X-Request-Id"
    if limit_of(route.handler):
        yield from ("RateLimit-Policy", "RateLimit")
    if status in ("429", "503"):
        yield "Retry-After"
    if status in ("200", "201") and idempotency_of(route.handler):
        yield REPLAYED
    if status == "201" and _has_id(answers[status]):
        yield "Location"
    shows_entity = _is_entity(answers[status]) and (status == "201" or route.method != hdrs.METH_POST)
    if shows_entity or (status in ("200", "304") and "304" in answers):
        yield "ETag"


def _has_id(answer: dict[str, Any]) -> bool:
    """What is created, bare or wrapped; a ticket has none."""
    inner = [f.schema for f in answer["schema"].fields.values() if isinstance(f, fields.Nested)]
    return any("id" in schema.fields for schema in (answer["schema"], *inner))


def _add_conditions(parameters: list[dict[str, Any]], answers: dict[str, Any]) -> None:
    known = {each["name"] for each in parameters}
    for status, name, description in _CONDITIONS:
        if status in answers and name not in known:
            parameters.append({"in": "header", "name": name, "type": "string", "description": description})


def _without_null(parameter: dict[str, Any]) -> None:
    """What is left out is null inside; nobody can send it."""
    parameter.pop("x-nullable", None)
    _without_null_default(parameter)
    if None in parameter.get("enum", ()):
        parameter["enum"] = [value for value in parameter["enum"] if value is not None]


def _without_null_default(described: dict[str, Any]) -> None:
    """Clients that are generated in Go and Java would send the word null."""
    if described.get("default", "") is None:
        del described["default"]


def _refusal(status: int, codes: list[str]) -> dict[str, Any]:
    shown = next(kind for kind in errors.KINDS if kind.status == status)(CODES[codes[0]][1], code=codes[0])
    return {
        "schema": PROBLEM,
        "description": "; ".join(f"`{code}`: {CODES[code][1]}" for code in codes),
        "examples": {"application/problem+json": errors.problem(shown, request_id=_EXAMPLE_ID)},
    }


def _refusals(route: web.RouteDef, *, needs_role: NeedsRole) -> Iterator[tuple[str, list[str]]]:
    """What this route can refuse by status, from its marks."""
    handler: Any = route.handler
    codes = list(refusals_of(handler))
    if how := idempotency_of(handler):
        codes.append("idempotency_key_reused")
        codes += ["idempotency_in_progress"] if how is Idempotency.BY_TRANSACTION else []
    if not is_public(handler):
        codes.append("unauthenticated")
    if needs_role(handler):
        codes += ["forbidden", "not_found"]
    locations = {each["location"] for each in getattr(handler, "__schemas__", ())}
    if route.method in (hdrs.METH_PATCH, hdrs.METH_PUT, hdrs.METH_DELETE):
        codes.append("precondition_failed")
    if "json" in locations:
        codes += ["too_large", "unsupported_media_type"]
    if limit_of(handler):  # the others are for operators, and ask no store to let somebody in
        codes += ["bad_request", "rate_limited", "unavailable"]
        codes += ["validation_failed"] if answers_json(handler) else []
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys(codes):
        status = CODES[code][0]
        assert status is not None
        by_status.setdefault(status, []).append(code)
    for status, of_status in sorted(by_status.items()):
        yield str(status), of_status


def add_swagger(app: web.Application, swagger: dict[str, Any]) -> None:
    """Serve the document and the page that shows it."""
    add_page(app, DOCUMENT, json.dumps(swagger))
    files = {name: Asset.of_file(STATIC / name, cache=f"public, {assets.IMMUTABLE}") for name in _ASSETS}
    for name, asset in files.items():
        app.router.add_get(f"{_STATIC_PATH}/{name}", asset.answer)
    page = Asset(lambda: _page(files), "text/html", cache=assets.MINUTE, headers=_PAGE_POLICY)
    app.router.add_get("/api-docs", page.answer)
    app.router.add_get("/api-docs/", page.answer)


def add_page(app: web.Application, path: str, body: bytes, *, policy: str | None = None) -> None:
    """Serve a document (JSON) or, with the content security policy that it needs, a page (HTML)."""
    kind = "application/json" if policy is None else "text/html"
    headers = {} if policy is None else {"Content-Security-Policy": policy}
    app.router.add_get(path, Asset(lambda: body, kind, cache=assets.MINUTE, headers=headers).answer)


def _page(files: Mapping[str, Asset]) -> bytes:
    """aiohttp-apispec's page, whose requests get the word Bearer where one pasted the bare token."""
    page = (STATIC / "index.html").read_text()
    for old, new in (
        ("{{ path }}", DOCUMENT),
        ("<title>Swagger UI</title>", "<title>Collaborative Workspace Backend: API</title>"),
        ("dom_id: '#swagger-ui',", "dom_id: '#swagger-ui',\n" + _BEARER),
        # By its version, since browsers keep for ever what is immutable.
        *((f"{{{{ static }}}}/{name}", f"{_STATIC_PATH}/{name}?v={asset.tag}") for name, asset in files.items()),
    ):
        assert old in page, old  # aiohttp-apispec is pinned; a new page must be looked at
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
_BEARER = """        persistAuthorization: true,
        requestInterceptor: request => {
          const token = request.headers.Authorization;
          if (token && !/^bearer /i.test(token)) request.headers.Authorization = "Bearer " + token.trim();
          return request;
        },"""
_DESCRIPTION = """The server behind collaborative coding platforms.

Sign in with **POST /api/v1/auth/login**, press *Authorize* and paste the `accessToken`.
Errors are problem details (RFC 9457); their `code` is stable. Lists are `{items, nextCursor}`.
Unknown fields and query parameters are refused, and integers beyond 64 bits. A POST that creates honours
`Idempotency-Key`; PATCH, PUT, DELETE and restore honour `If-Match` and `If-None-Match`.
Live collaboration runs over WebSockets at `/ws`."""
