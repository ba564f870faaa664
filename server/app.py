"""The server process, assembled on one page: routes, messages, stores, start and graceful shutdown."""

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
from server.auth import guard, housekeeping, tickets
from server.auth import handlers as auth
from server.auth.blacklist import Blacklist
from server.auth.housekeeping import PeriodicTask
from server.auth.passwords import Hasher
from server.auth.sessions import AuthContext
from server.auth.tokens import KeyRing, Verifier
from server.documents import handlers as documents
from server.documents.messages import messages as document_messages
from server.documents.rooms import ROOMS, Rooms
from server.documents.yjs import yjs
from server.jobs import dashboard, indexes
from server.jobs import handlers as jobs
from server.jobs.announcements import Announcements
from server.jobs.dispatch import Dispatcher
from server.jobs.types import JOB_TYPES
from server.jobs.worker_registry import WorkerRegistry
from server.ops import handlers as ops
from server.ops import operators, sampling
from server.projects import access, cache, invitations
from server.projects import handlers as projects
from server.ratelimit import RateLimiter, limit
from server.realtime import asyncapi
from server.realtime.channels import Channels
from server.realtime.endpoint import websocket
from server.realtime.history import History
from server.realtime.hub import REALTIME, Realtime
from server.realtime.messages import messages as socket_messages
from server.realtime.socket_auth import AuthenticatedUser, SocketAuth
from server.realtime.table import MessageDef, MessageTable, merge
from server.resources import Resources
from server.rest import cors, idempotency, openapi
from server.rest.keys import LIMITER, RESOURCES, User
from server.rest.marks import public
from server.rest.middlewares import Admission, add_default_headers, middlewares
from server.rest.runner import HttpRunner
from server.settings import Settings, SettingsError, authority
from server.shutdown import KEEPALIVE_TIMEOUT_SECONDS
from server.signals import notify_ready, watch_stop_signals
from server.workspaces import handlers as workspaces
from server.workspaces.messages import messages as workspace_messages

log = structlog.get_logger()

MAX_BODY_BYTES = 1 << 20
LISTEN_BACKLOG = 1024
IDLE_POLL_INTERVAL_SECONDS = 0.3
LAST_REQUEST_GRACE_SECONDS = 0.3  # aiohttp closes a connection that was just accepted without reading its request
API: tuple[Iterable[web.AbstractRouteDef], ...] = (
    auth.routes,
    projects.routes,
    workspaces.routes,
    documents.routes,
    jobs.routes,
    ops.routes,
)
# Authorizes after the upgrade, because its clients understand close codes only.
SELF_AUTHORIZED = frozenset({"/yjs/{documentId}"})
MESSAGES: tuple[MessageTable, ...] = (socket_messages, workspace_messages, document_messages)


def create_app(settings: Settings, stores: Resources) -> web.Application:
    """Return the application. The caller opens the stores before and closes them afterwards."""
    auth_context, limiter = make_auth_context(settings, stores), make_limiter(settings, stores)
    app = web.Application(
        middlewares=middlewares(
            make_admission(settings, stores, auth_context, limiter), traced=bool(settings.otel_exporter_otlp_endpoint)
        ),
        client_max_size=MAX_BODY_BYTES,
    )
    app[RESOURCES] = stores
    app[LIMITER] = limiter
    app[auth.AUTH_CONTEXT] = auth_context
    app[auth.HASHER] = Hasher(rounds=settings.bcrypt_rounds)
    app[auth.ACCEPT_INVITATION] = invitations.accept
    app[cache.PROJECT_LIST_CACHE] = cache.ProjectListCache()
    app[REALTIME] = Realtime(
        settings,
        merge(MESSAGES),
        db=stores.db,
        redis=stores.redis,
        blocking_redis=stores.blocking_redis,
        channels=auth_context.channels,
        socket_auth=make_socket_auth(stores, auth_context),
    )
    app[jobs.DISPATCHER] = Dispatcher(stores.mongo, stores.redis, types=JOB_TYPES, slots=settings.jobs_per_user)
    app[jobs.ANNOUNCEMENTS] = Announcements(auth_context.channels)
    app[jobs.WORKER_REGISTRY] = WorkerRegistry(stores.redis)
    app[ROOMS] = app[REALTIME].documents = make_rooms(stores, app[REALTIME])
    app[ops.STARTED_AT] = time.monotonic()
    app[ops.DRAINING] = draining = ops.DrainState()
    app.on_response_prepare.extend((add_default_headers, functools.partial(close_connection_while_draining, draining)))
    if settings.production:
        app.on_response_prepare.append(add_hsts_header)
    for routes in API:
        app.router.add_routes(routes)
    app.router.add_get("/ws", limit(None)(public(websocket)))
    app.router.add_get("/yjs/{documentId}", limit(None)(public(yjs)))
    if not operators.disabled(settings):
        priority_queues = app[jobs.DISPATCHER].queues
        app.add_subapp(dashboard.PREFIX, dashboard.make_app(priority_queues, operators.basic_auth(settings)))
    openapi.add_swagger(app, swagger_document())
    asyncapi_content = asyncapi_document()
    openapi.add_page(app, asyncapi.DOCUMENT_PATH, json.dumps(asyncapi_content))
    openapi.add_page(app, asyncapi.PAGE_PATH, asyncapi.page(asyncapi_content).encode(), policy=asyncapi.PAGE_POLICY)
    access.verify_routes(app.router.routes(), exempt=SELF_AUTHORIZED)
    app.on_startup.extend((prepare_stores, start_realtime))
    app.on_shutdown.append(stop_realtime)  # before aiohttp closes the connections that are left
    app.cleanup_ctx.extend((close_hasher, run_housekeeping, run_sampling))
    cors.allow_origins(app, settings.cors_origin)
    return app


@functools.cache
def swagger_document() -> dict[str, Any]:
    """Return the OpenAPI 2.0 (Swagger) document. Callers must not change it: all applications share it."""
    return openapi.build_document(
        chain.from_iterable(API), needs_role=lambda handler: access.requirement_of(handler) is not None
    )


@functools.cache
def asyncapi_document() -> dict[str, Any]:
    """Return the AsyncAPI document. Callers must not change it: all applications share it."""

    def role_of(message: MessageDef) -> str | None:
        requirement = access.requirement_of(message.handler)
        return requirement.role.name if requirement else None

    return asyncapi.document(merge(MESSAGES), role_of=role_of)


def make_auth_context(settings: Settings, stores: Resources) -> AuthContext:
    access_keys = KeyRing.from_secrets(settings.jwt_secret, settings.jwt_secret_previous)
    return AuthContext(
        access_keys=access_keys,
        verifier=Verifier(access_keys, ttl=settings.access_token_ttl),
        refresh_keys=KeyRing.from_secrets(settings.jwt_refresh_secret, settings.jwt_refresh_secret_previous),
        access_ttl=settings.access_token_ttl,
        refresh_ttl=settings.refresh_token_ttl,
        blacklist=Blacklist(stores.redis, stores.pipelines, token_ttl=settings.access_token_ttl),
        channels=make_channels(settings, stores),
    )


def make_channels(settings: Settings, stores: Resources) -> Channels:
    history = History(stores.redis, max_events=settings.history_events, max_bytes=settings.history_bytes)
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


def make_admission(settings: Settings, stores: Resources, auth_context: AuthContext, limiter: RateLimiter) -> Admission:
    def authenticate(request: web.Request) -> User | None:
        token = guard.parse_bearer(request.headers.get("Authorization"))
        return guard.authenticate_token(auth_context, token) if token else None

    async def check_session(user: User) -> None:
        await guard.check_session(stores.db, auth_context, user)

    return Admission(
        authenticate=authenticate,
        check_session=check_session,
        authorize_path=access.authorize_path,
        authorize_payload=access.authorize_payload,
        limiter=limiter,
        trusted_proxies=settings.trusted_proxies,
    )


def make_socket_auth(stores: Resources, auth_context: AuthContext) -> SocketAuth:
    async def authenticate_token(token: str) -> AuthenticatedUser:
        user = guard.authenticate_token(auth_context, token)
        return user, await guard.check_session_and_read_name(stores.db, user)

    async def authenticate_ticket(ticket: str) -> AuthenticatedUser:
        user = await tickets.redeem(stores.redis, ticket=ticket)
        return user, await guard.check_session_and_read_name(stores.db, user)

    return SocketAuth(
        bearer_token=guard.parse_bearer,
        authenticate_token=authenticate_token,
        authenticate_ticket=authenticate_ticket,
        authorize=access.authorize_message,
        recheck=functools.partial(access.recheck, stores.db),
    )


async def prepare_stores(app: web.Application) -> None:
    await indexes.create_all(app[RESOURCES].mongo)


async def start_realtime(app: web.Application) -> None:
    app[REALTIME].start()
    app[ROOMS].start()


async def stop_realtime(app: web.Application) -> None:
    await app[REALTIME].stop()
    await app[ROOMS].stop()


async def close_hasher(app: web.Application) -> AsyncIterator[None]:
    yield
    app[auth.HASHER].close()


async def run_housekeeping(app: web.Application) -> AsyncIterator[None]:
    db = app[RESOURCES].db
    delete_invitations = PeriodicTask(
        "delete expired invitations", functools.partial(invitations.delete_expired_invitations, db)
    )
    delete_keys = PeriodicTask(
        "delete expired idempotency keys", functools.partial(idempotency.delete_expired_keys, db)
    )
    task = asyncio.ensure_future(
        housekeeping.run_account_housekeeping(db, app[auth.AUTH_CONTEXT], delete_invitations, delete_keys)
    )
    yield
    task.cancel()
    await asyncio.wait({task})


async def run_sampling(app: web.Application) -> AsyncIterator[None]:
    realtime = app[REALTIME]
    sampler = sampling.sample(app[RESOURCES].db, functools.partial(sampling.record_socket_metrics, realtime))
    coroutines = (sampler, sampling.probe_publish_lag(realtime), sampling.sample_stores(app[RESOURCES]))
    tasks = {asyncio.ensure_future(coroutine) for coroutine in coroutines}
    yield
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def add_hsts_header(_: web.Request, response: web.StreamResponse) -> None:
    """Tell browsers to use TLS only (HSTS); a response signal. Browsers ignore the header over plain HTTP."""
    response.headers["Strict-Transport-Security"] = "max-age=31536000"


def run(settings: Settings, *, listener: int | None = None, ready: int | None = None) -> None:
    """Run one server process until SIGTERM or SIGINT.

    A supervisor passes two file descriptors: ``listener``, an open socket, and ``ready``, a pipe to report readiness.
    """
    loop.run(serve(settings, listener=listener, ready=ready))


async def serve(settings: Settings, *, listener: int | None = None, ready: int | None = None) -> None:
    """Open the stores, listen, and shut down gracefully on a signal.

    Raises:
        StoreDownError: a store cannot be used.
        SettingsError: the address cannot be listened on.
    """
    stop = watch_stop_signals(replaceable=listener is not None)
    async with tracing.export_traces(settings, "server"), resources.connect(settings) as stores:
        app = create_app(settings, stores)
        runner = HttpRunner(
            app, access_log=None, keepalive_timeout=KEEPALIVE_TIMEOUT_SECONDS, shutdown_timeout=settings.drain_seconds
        )
        await runner.setup()
        try:
            loop.tune_gc()
            site = await listen(runner, settings, listener)
            notify_ready(ready)
            await stop.wait()
            log.info("server stopping")
            app[ops.DRAINING].is_draining = True
            if stop.has_successor:  # else accept connections until the end: a load balancer may still send some
                await site.stop()
            await asyncio.gather(
                app[REALTIME].drain(), wait_until_disconnected(runner, has_successor=stop.has_successor)
            )
            await asyncio.sleep(LAST_REQUEST_GRACE_SECONDS)
        finally:
            await runner.cleanup()
    log.info("server stopped")


async def listen(runner: web.AppRunner, settings: Settings, listener: int | None) -> web.BaseSite:
    site: web.BaseSite
    if listener is None:
        site = web.TCPSite(runner, settings.host, settings.port, backlog=LISTEN_BACKLOG)
    else:
        site = web.SockSite(runner, socket.socket(fileno=listener), backlog=LISTEN_BACKLOG)
    try:
        await site.start()
    except OSError as error:
        # asyncio's own text for a taken port is long. An unknown host name has an errno that the system does not know.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise SettingsError(f"Cannot listen on {authority(settings.host, settings.port)}: {reason}") from error
    host, port = runner.addresses[0][:2]
    log.info("server ready", address=f"http://{authority(host, port)}")
    return site


async def wait_until_disconnected(runner: web.AppRunner, *, has_successor: bool) -> None:
    """Wait until the idle keep-alive connections are closed, at most for the keep-alive timeout.

    A client that reuses its connection gets ``Connection: close`` and then reaches the successor; an unused connection
    reaches its timeout as usual. Without a successor the server does not wait.
    """
    if not has_successor or runner.server is None:
        return
    for _ in range(round(KEEPALIVE_TIMEOUT_SECONDS / IDLE_POLL_INTERVAL_SECONDS)):
        if not runner.server.connections:
            return
        await asyncio.sleep(IDLE_POLL_INTERVAL_SECONDS)


async def close_connection_while_draining(
    draining: ops.DrainState, _: web.Request, response: web.StreamResponse
) -> None:
    """Close each connection after its response while the process drains; a response signal."""
    if draining.is_draining:
        response.headers[hdrs.CONNECTION] = "close"
        response.force_close()
