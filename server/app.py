"""The web process, assembled on one page."""

import asyncio
import functools
import os
import socket
import time
from collections.abc import AsyncIterator, Iterable
from itertools import chain
from typing import Any

import structlog
from aiohttp import hdrs, web

from server import json, loop, resources, tracing
from server.auth import guard, tickets, upkeep
from server.auth import handlers as auth
from server.auth.blacklist import Blacklist
from server.auth.passwords import Hasher
from server.auth.sessions import Issuer
from server.auth.tokens import Keys, Verifier
from server.auth.upkeep import Chore
from server.documents import handlers as documents
from server.documents.messages import messages as document_messages
from server.documents.rooms import ROOMS, Rooms
from server.documents.yjs import yjs
from server.ending import KEEPALIVE_SECONDS
from server.jobs import collections, dashboard
from server.jobs import handlers as jobs
from server.jobs.announcements import Announcements
from server.jobs.dispatch import Dispatcher
from server.jobs.types import JOB_TYPES
from server.jobs.workers import Roster
from server.ops import handlers as ops
from server.ops import operators, watch
from server.projects import access, cache, invitations
from server.projects import handlers as projects
from server.ratelimit import RateLimiter, limit
from server.realtime import asyncapi
from server.realtime.channels import Channels
from server.realtime.doorman import Doorman, Identified
from server.realtime.endpoint import websocket
from server.realtime.history import History
from server.realtime.hub import REALTIME, Realtime
from server.realtime.messages import messages as socket_messages
from server.realtime.table import Message, MessageTable, merge
from server.resources import Resources
from server.rest import cors, idempotency, openapi
from server.rest.keys import LIMITER, RESOURCES, User
from server.rest.marks import public
from server.rest.middlewares import Admission, dress, middlewares
from server.rest.runner import Runner
from server.settings import Settings, SettingsError, authority
from server.signals import stop_signal, tell_ready
from server.workspaces import handlers as workspaces
from server.workspaces.messages import messages as workspace_messages

log = structlog.get_logger()

BODY_BYTES = 1 << 20
BACKLOG = 1024
LINGER_SECONDS = 0.3  # for requests of connections that were just accepted: aiohttp would close these unread
API: tuple[Iterable[web.AbstractRouteDef], ...] = (
    auth.routes,
    projects.routes,
    workspaces.routes,
    documents.routes,
    jobs.routes,
    ops.routes,
)
OWN_DOORS = frozenset({"/yjs/{documentId}"})  # authorizes after the upgrade: its clients only understand close codes

MESSAGES: tuple[MessageTable, ...] = (socket_messages, workspace_messages, document_messages)


def create_app(settings: Settings, stores: Resources) -> web.Application:
    """Return the application over open stores. The caller owns the stores and closes them afterwards."""
    issuer, limiter = make_issuer(settings, stores), make_limiter(settings, stores)
    app = web.Application(
        middlewares=middlewares(
            admission(settings, stores, issuer, limiter), traced=bool(settings.otel_exporter_otlp_endpoint)
        ),
        client_max_size=BODY_BYTES,
    )
    app[RESOURCES] = stores
    app[LIMITER] = limiter
    app[auth.ISSUER] = issuer
    app[auth.HASHER] = Hasher(rounds=settings.bcrypt_rounds)
    app[auth.ACCEPT] = invitations.accept
    app[cache.LISTED] = cache.Listed()
    app[REALTIME] = Realtime(
        settings,
        merge(MESSAGES),
        db=stores.db,
        redis=stores.redis,
        blocking_redis=stores.blocking_redis,
        channels=issuer.channels,
        doorman=doorman(stores, issuer),
    )
    app[jobs.DISPATCHER] = Dispatcher(stores.mongo, stores.redis, types=JOB_TYPES, slots=settings.jobs_per_user)
    app[jobs.ANNOUNCEMENTS] = Announcements(issuer.channels)
    app[jobs.ROSTER] = Roster(stores.redis)
    app[ROOMS] = app[REALTIME].documents = make_rooms(stores, app[REALTIME])
    app[ops.STARTED] = time.monotonic()
    app[ops.DRAINING] = draining = ops.Draining()
    app.on_response_prepare.extend((dress, functools.partial(send_away, draining)))
    if settings.production:
        app.on_response_prepare.append(insist_on_tls)
    for routes in API:
        app.router.add_routes(routes)
    app.router.add_get("/ws", limit(None)(public(websocket)))
    app.router.add_get("/yjs/{documentId}", limit(None)(public(yjs)))
    if not operators.are_shut_out(settings):
        lanes = app[jobs.DISPATCHER].lanes
        app.add_subapp(dashboard.PREFIX, dashboard.make(lanes, operators.demand(settings)))
    openapi.add_swagger(app, swagger_document())
    described = asyncapi_document()
    openapi.add_page(app, asyncapi.DOCUMENT, json.dumps(described))
    openapi.add_page(app, asyncapi.PAGE, asyncapi.page(described).encode(), policy=asyncapi.PAGE_POLICY)
    access.assemble(app.router.routes(), but=OWN_DOORS)
    app.on_startup.extend((prepare_stores, start_realtime))
    app.on_shutdown.append(stop_realtime)  # before aiohttp closes the connections that are left
    app.cleanup_ctx.extend((close_hasher, keep_accounts, watch_itself))
    cors.allow_origins(app, settings.cors_origin)
    return app


@functools.cache
def swagger_document() -> dict[str, Any]:
    """Return the OpenAPI document. Callers must not change it: all applications share it."""
    return openapi.document(
        chain.from_iterable(API), needs_role=lambda handler: access.requirement_of(handler) is not None
    )


@functools.cache
def asyncapi_document() -> dict[str, Any]:
    """Return the AsyncAPI document. Callers must not change it: all applications share it."""

    def role_of(message: Message) -> str | None:
        requirement = access.requirement_of(message.handler)
        return requirement.role.name if requirement else None

    return asyncapi.document(merge(MESSAGES), role_of=role_of)


def make_issuer(settings: Settings, stores: Resources) -> Issuer:
    access_keys = Keys.of(settings.jwt_secret, settings.jwt_secret_previous)
    return Issuer(
        access_keys=access_keys,
        verifier=Verifier(access_keys, ttl=settings.access_token_ttl),
        refresh_keys=Keys.of(settings.jwt_refresh_secret, settings.jwt_refresh_secret_previous),
        access_ttl=settings.access_token_ttl,
        refresh_ttl=settings.refresh_token_ttl,
        blacklist=Blacklist(stores.redis, stores.pipelines, token_ttl=settings.access_token_ttl),
        channels=make_channels(settings, stores),
    )


def make_channels(settings: Settings, stores: Resources) -> Channels:
    history = History(stores.redis, most=settings.history_events, most_bytes=settings.history_bytes)
    return Channels(stores.redis, history)


def make_rooms(stores: Resources, realtime: Realtime) -> Rooms:
    rooms = Rooms(stores.db, realtime.channels, realtime.subscriber)
    realtime.on_evict("document", lambda connection, document: rooms.leave(document, connection.id))
    return rooms


def make_limiter(settings: Settings, stores: Resources) -> RateLimiter:
    rates = {
        "auth": settings.rate_limit_auth,
        "refresh": settings.rate_limit_refresh,
        "account": settings.rate_limit_account,
        "default": settings.rate_limit_default,
    }
    return RateLimiter(stores.pipelines, rates=rates)


def admission(settings: Settings, stores: Resources, issuer: Issuer, limiter: RateLimiter) -> Admission:
    def identify(request: web.Request) -> User | None:
        token = guard.bearer(request.headers.get("Authorization"))
        return guard.identify(issuer, token) if token else None

    async def confirm(user: User) -> None:
        await guard.confirm(stores.db, issuer, user)

    return Admission(
        identify=identify,
        confirm=confirm,
        authorize=access.authorize,
        authorize_named=access.authorize_named,
        limiter=limiter,
        trusted=settings.trusted_proxies,
    )


def doorman(stores: Resources, issuer: Issuer) -> Doorman:
    async def by_token(token: str) -> Identified:
        user = guard.identify(issuer, token)
        return user, await guard.confirm_with_name(stores.db, user)

    async def by_ticket(ticket: str) -> Identified:
        user = await tickets.redeem(stores.redis, ticket=ticket)
        return user, await guard.confirm_with_name(stores.db, user)

    return Doorman(
        bearer=guard.bearer,
        by_token=by_token,
        by_ticket=by_ticket,
        authorize=access.authorize_message,
        recheck=functools.partial(access.recheck, stores.db),
    )


async def prepare_stores(app: web.Application) -> None:
    await collections.prepare(app[RESOURCES].mongo)


async def start_realtime(app: web.Application) -> None:
    app[REALTIME].start()
    app[ROOMS].start()


async def stop_realtime(app: web.Application) -> None:
    await app[REALTIME].stop()
    await app[ROOMS].stop()


async def close_hasher(app: web.Application) -> AsyncIterator[None]:
    yield
    app[auth.HASHER].close()


async def keep_accounts(app: web.Application) -> AsyncIterator[None]:
    db = app[RESOURCES].db
    forget_invitations = Chore("forget expired invitations", functools.partial(invitations.forget_expired, db))
    forget_keys = Chore("forget old idempotency keys", functools.partial(idempotency.forget_old, db))
    task = asyncio.ensure_future(upkeep.run(db, app[auth.ISSUER], forget_invitations, forget_keys))
    yield
    task.cancel()
    await asyncio.wait({task})


async def watch_itself(app: web.Application) -> AsyncIterator[None]:
    realtime = app[REALTIME]
    sampling = watch.look(app[RESOURCES].db, functools.partial(watch.show_sockets, realtime))
    coroutines = (sampling, watch.probe(realtime), watch.ask_stores(app[RESOURCES]))
    tasks = {asyncio.ensure_future(coroutine) for coroutine in coroutines}
    yield
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def insist_on_tls(_: web.Request, response: web.StreamResponse) -> None:
    """Tell browsers to use TLS only (HSTS); a response signal. Browsers ignore the header over plain HTTP."""
    response.headers["Strict-Transport-Security"] = "max-age=31536000"


def run(settings: Settings, *, listener: int | None = None, ready: int | None = None) -> None:
    """Run one server process until SIGTERM or SIGINT.

    A supervisor passes ``listener``, an open socket, and ``ready``, a pipe to report readiness to.
    """
    loop.run(serve(settings, listener=listener, ready=ready))


async def serve(settings: Settings, *, listener: int | None = None, ready: int | None = None) -> None:
    """Open the stores, listen, and shut down gracefully on a signal.

    Raises:
        StoreDownError: a store cannot be used.
        SettingsError: the address cannot be listened on.
    """
    stop = stop_signal(replaceable=listener is not None)
    async with tracing.exported(settings, "server"), resources.connect(settings) as stores:
        app = create_app(settings, stores)
        runner = Runner(
            app, access_log=None, keepalive_timeout=KEEPALIVE_SECONDS, shutdown_timeout=settings.drain_seconds
        )
        await runner.setup()
        try:
            loop.settle()
            site = await listen(runner, settings, listener)
            tell_ready(ready)
            await stop.wait()
            log.info("server stopping")
            app[ops.DRAINING].begun = True
            if stop.replaced:
                await site.stop()
            await asyncio.gather(app[REALTIME].drain(), linger(runner, replaced=stop.replaced))
            await asyncio.sleep(LINGER_SECONDS)
        finally:
            await runner.cleanup()
    log.info("server stopped")


async def listen(runner: web.AppRunner, settings: Settings, listener: int | None) -> web.BaseSite:
    site: web.BaseSite
    if listener is None:
        site = web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG)
    else:
        site = web.SockSite(runner, socket.socket(fileno=listener), backlog=BACKLOG)
    try:
        await site.start()
    except OSError as error:
        # asyncio's own text for a taken port is long. An unknown host name has an errno that the system does not know.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise SettingsError(f"Cannot listen on {authority(settings.host, settings.port)}: {reason}") from error
    host, port = runner.addresses[0][:2]
    log.info("server ready", address=f"http://{authority(host, port)}")
    return site


async def linger(runner: web.AppRunner, *, replaced: bool) -> None:
    """Wait until the idle keep-alive connections are closed, at most for the keep-alive timeout.

    A client that reuses its connection gets ``Connection: close`` and then reaches the successor; an unused connection
    reaches its timeout as usual. Without a successor the server does not wait.
    """
    if not replaced or runner.server is None:
        return
    for _ in range(round(KEEPALIVE_SECONDS / LINGER_SECONDS)):
        if not runner.server.connections:
            return
        await asyncio.sleep(LINGER_SECONDS)


async def send_away(draining: ops.Draining, _: web.Request, response: web.StreamResponse) -> None:
    """Close each connection after its response while the process drains; a response signal."""
    if draining.begun:
        response.headers[hdrs.CONNECTION] = "close"
        response.force_close()
