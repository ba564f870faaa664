"""Idempotency-Key (draft-ietf-httpapi-idempotency-key-header): a POST that is repeated has one effect and one answer.

The key is claimed, the effect made and the answer kept in one transaction, so that key and effect cannot diverge. A
repeated request waits in the key's index for the first one to commit, then gets its answer; where the first one
failed, it is the first itself. The route hands ``request[DB]`` to its stores, and defers to ``request[ON_COMMIT]``
what others are told of the effect. Without a key that is the pool, and costs nothing.
"""

import asyncio
import hashlib
import re
from datetime import timedelta

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from server import json, postgres
from server.budget import within
from server.errors import Conflict, ValidationFailed, invalid, store_slow
from server.postgres import Executor
from server.rest import idempotency_store as store
from server.rest.keys import BODY, DB, HEADERS, ON_COMMIT, RESOURCES, USER
from server.rest.marks import Idempotency, idempotency_of

HEADER, REPLAYED = "Idempotency-Key", "Idempotent-Replayed"
KEY = re.compile(r"^[!-~]{1,255}$")
KEPT = timedelta(hours=24)
ANSWER_SECONDS = 0.3  # of a request's time, to say that it has waited in vain
FORGOTTEN_AT_ONCE = 1000
_KEPT_HEADERS = (hdrs.LOCATION, hdrs.ETAG)
_NO_STORE = "no-store"


def idempotency_key(request: web.Request) -> str | None:
    """Return the key in the request's header, or None.

    Raises:
        ValidationFailed: it is none, or there are several.
    """
    given = request.headers.getall(HEADER, None)
    if given is None:
        return None
    if len(given) > 1 or not KEY.fullmatch(given[0]):
        raise invalid(HEADER, "Must have 1 to 255 visible ASCII characters.")
    return given[0]


@web.middleware
async def idempotent(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run the handlers that are marked so once for each key."""
    if idempotency_of(request.match_info.handler) is not Idempotency.BY_TRANSACTION:
        return await handler(request)
    request[DB], request[ON_COMMIT] = request.app[RESOURCES].db, []
    key = idempotency_key(request)
    answer = await (handler(request) if key is None else _once(request, handler, key))
    for tell in request[ON_COMMIT]:
        await tell()
    return answer


async def _once(request: web.Request, handler: Handler, key: str) -> web.StreamResponse:
    route, user, body_hash = _route(request), request[USER].id, _body_hash(request)

    async def answer_once(transaction: Executor) -> web.StreamResponse:
        seconds = within(postgres.STATEMENT_SECONDS) - ANSWER_SECONDS
        if seconds <= 0:
            raise store_slow("PostgreSQL")
        try:
            async with asyncio.timeout(seconds):
                claimed = await store.claim(transaction, user=user, route=route, key=key, body_hash=body_hash)
        except TimeoutError:
            raise _in_progress() from None
        if not claimed:
            return await _replayed(request, transaction, key, body_hash)
        request[DB], request[ON_COMMIT] = transaction, []  # anew: it runs once more where writes collided
        answer = await handler(request)
        assert isinstance(answer, web.Response)
        await store.keep_answer(
            transaction,
            user=user,
            route=route,
            key=key,
            status=answer.status,
            headers={str(name): answer.headers[name] for name in _KEPT_HEADERS if name in answer.headers},
            body=None if answer.headers.get(hdrs.CACHE_CONTROL) == _NO_STORE else _bytes(answer),
        )
        return answer

    return await request.app[RESOURCES].db.transact(answer_once)


async def _replayed(request: web.Request, db: Executor, key: str, body_hash: bytes) -> web.Response:
    """Return the answer that is kept.

    Raises:
        ValidationFailed: the key came with another body.
        Conflict: the answer held a secret, or the key has just been forgotten.
    """
    kept = await store.read_answer(db, user=request[USER].id, route=_route(request), key=key)
    if kept is None:
        raise _in_progress()
    if kept["body_hash"] != body_hash:
        raise ValidationFailed("That key came with another body", code="idempotency_key_reused")
    if kept["body"] is None:
        request[HEADERS].update(kept["headers"])
        raise Conflict("The answer held a secret, which is shown once", code="idempotency_secret")
    headers = {**kept["headers"], REPLAYED: "true"}
    return web.Response(status=kept["status"], body=kept["body"], content_type="application/json", headers=headers)


def _in_progress() -> Conflict:
    return Conflict("The first request with this key is under way", code="idempotency_in_progress")


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    assert resource is not None
    return f"{request.method} {resource.canonical}"


def _body_hash(request: web.Request) -> bytes:
    """Of what is asked for, in whatever order: also of what the path names."""
    asked = {"path": dict(request.match_info), "body": request[BODY]}
    return hashlib.sha256(json.canonical(asked)).digest()


def _bytes(answer: web.Response) -> bytes:
    assert isinstance(answer.body, bytes)
    return answer.body


async def forget_old(db: Executor) -> None:
    """Housekeeping: delete the keys of more than a day ago."""
    while await store.forget(db, older_than=KEPT, limit=FORGOTTEN_AT_ONCE) == FORGOTTEN_AT_ONCE:
        pass
