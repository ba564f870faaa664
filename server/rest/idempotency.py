"""Idempotency keys (draft-ietf-httpapi-idempotency-key-header): a repeated POST has one effect and one response.

One transaction claims the key, makes the change and stores the response, so that key and effect cannot diverge. A
repeated request waits on the key's unique index until the first one commits, then gets its response; if the first one
failed, the repeated request becomes the first. The handler passes ``request[DB]`` to its stores, and appends to
``request[ON_COMMIT]`` the announcements to send after the commit. Without a key, ``request[DB]`` is the pool, and no
transaction is opened here.
"""

import asyncio
import hashlib
import re
from datetime import timedelta

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from server import json, postgres
from server.deadline import remaining
from server.errors import Conflict, ValidationFailed, invalid_field, store_timed_out
from server.postgres import Executor
from server.rest import idempotency_store as store
from server.rest.keys import BODY, DB, ON_COMMIT, RESOURCES, RESPONSE_HEADERS, USER
from server.rest.marks import Idempotency, idempotency_of

KEY_HEADER, REPLAYED_HEADER = "Idempotency-Key", "Idempotent-Replayed"
KEY_PATTERN = re.compile(r"^[!-~]{1,255}$")
KEY_RETENTION = timedelta(hours=24)
RESPONSE_RESERVE_SECONDS = 0.3  # waiting for the key ends this long before the deadline, to respond in time
MAX_DELETED_AT_ONCE = 1000
_STORED_HEADERS = (hdrs.LOCATION, hdrs.ETAG)
_NO_STORE = "no-store"


def idempotency_key(request: web.Request) -> str | None:
    """Return the idempotency key in the request's header, or None.

    Raises:
        ValidationFailed: the key is malformed, or there are several.
    """
    lines = request.headers.getall(KEY_HEADER, None)
    if lines is None:
        return None
    if len(lines) > 1 or not KEY_PATTERN.fullmatch(lines[0]):
        raise invalid_field(KEY_HEADER, "Must have 1 to 255 visible ASCII characters.")
    return lines[0]


@web.middleware
async def apply_idempotency(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run a handler that is marked ``BY_TRANSACTION`` once for each idempotency key."""
    if idempotency_of(request.match_info.handler) is not Idempotency.BY_TRANSACTION:
        return await handler(request)
    request[DB], request[ON_COMMIT] = request.app[RESOURCES].db, []
    key = idempotency_key(request)
    response = await (handler(request) if key is None else _run_once(request, handler, key))
    for hook in request[ON_COMMIT]:
        await hook()
    return response


async def _run_once(request: web.Request, handler: Handler, key: str) -> web.StreamResponse:
    route, user, body_hash = _route(request), request[USER].id, _body_hash(request)

    async def claim_and_run(transaction: Executor) -> web.StreamResponse:
        seconds = remaining(postgres.STATEMENT_TIMEOUT_SECONDS) - RESPONSE_RESERVE_SECONDS
        if seconds <= 0:
            raise store_timed_out("PostgreSQL")
        try:
            async with asyncio.timeout(seconds):
                claimed = await store.claim(transaction, user=user, route=route, key=key, body_hash=body_hash)
        except TimeoutError:
            raise _in_progress() from None
        if not claimed:
            return await _replay(request, transaction, key, body_hash)
        request[DB], request[ON_COMMIT] = transaction, []  # reset: the transaction is retried after a write conflict
        response = await handler(request)
        assert isinstance(response, web.Response)
        await store.save_response(
            transaction,
            user=user,
            route=route,
            key=key,
            status=response.status,
            headers={str(name): response.headers[name] for name in _STORED_HEADERS if name in response.headers},
            body=None if response.headers.get(hdrs.CACHE_CONTROL) == _NO_STORE else _body_bytes(response),
        )
        return response

    return await request.app[RESOURCES].db.transact(claim_and_run)


async def _replay(request: web.Request, db: Executor, key: str, body_hash: bytes) -> web.Response:
    """Return the stored response.

    Raises:
        ValidationFailed: the key was used with another body.
        Conflict: the response contained a secret, or the key has just been deleted.
    """
    stored = await store.read_response(db, user=request[USER].id, route=_route(request), key=key)
    if stored is None:
        raise _in_progress()
    if stored["body_hash"] != body_hash:
        raise ValidationFailed("Idempotency key was used with another request body", code="idempotency_key_reused")
    if stored["body"] is None:
        request[RESPONSE_HEADERS].update(stored["headers"])
        raise Conflict("The response contained a secret, which is returned only once", code="idempotency_secret")
    headers = {**stored["headers"], REPLAYED_HEADER: "true"}
    return web.Response(status=stored["status"], body=stored["body"], content_type="application/json", headers=headers)


def _in_progress() -> Conflict:
    return Conflict("The first request with this idempotency key is in progress", code="idempotency_in_progress")


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    assert resource is not None
    return f"{request.method} {resource.canonical}"


def _body_hash(request: web.Request) -> bytes:
    """Return the hash of the body, in any order of its keys, and of the values in the path."""
    request_values = {"path": dict(request.match_info), "body": request[BODY]}
    return hashlib.sha256(json.canonical(request_values)).digest()


def _body_bytes(response: web.Response) -> bytes:
    assert isinstance(response.body, bytes)
    return response.body


async def delete_expired_keys(db: Executor) -> None:
    """Delete idempotency keys after their retention of 24 hours, in batches."""
    while (
        await store.delete_expired_keys(db, older_than=KEY_RETENTION, limit=MAX_DELETED_AT_ONCE) == MAX_DELETED_AT_ONCE
    ):
        pass
