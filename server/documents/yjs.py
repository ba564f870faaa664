"""GET /yjs/{documentId}: unmodified y-websocket clients, over the same live documents as everybody else."""

import asyncio
import dataclasses
from collections import deque
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

import structlog
from aiohttp import WSMessage, WSMsgType, web

from server import metrics
from server.documents import store, wire
from server.documents.commits import Edit
from server.documents.news import Sight, Update, binary_frame
from server.documents.rooms import ROOMS, Rooms
from server.errors import Forbidden, NotFound, ServiceError, TooLarge, Unauthenticated, Unavailable, ValidationFailed
from server.fields import parse_id
from server.projects.access import Access, ResourceKind, Role, check
from server.realtime import protocol
from server.realtime.connection import Connection
from server.realtime.endpoint import authenticate_upgrade, check_upgrade
from server.realtime.grants import ResourceRef, Revocation
from server.realtime.hub import CLOSE_RESTARTING, REALTIME, Realtime
from server.realtime.outbox import Delivery
from server.rest.keys import User

log = structlog.get_logger()

MOST_FRAME_BYTES = 10 << 20
KEEPALIVE_SECONDS = 20.0  # this client hangs up after 30 s without a data message; pings do not count
IN_FLIGHT_EDITS = 64  # of one socket; then it is read no further
IN_FLIGHT_BYTES = 1 << 20  # beside one edit
CLOSE_SECONDS = 2.0
SLOW_DOWN_SECONDS = 0.02
PERMISSION_DENIED = wire.refusal("Your role can read this document, but not edit it")
_GONE = {WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR}
# 4400 to 4499 end this client for good, all others let it come back.
_CLOSE_CODES: dict[type[ServiceError], int] = {
    Unauthenticated: 4401,
    Forbidden: 4403,
    NotFound: 4404,
    ValidationFailed: 4400,
    TooLarge: 4400,
    Unavailable: 1013,
}


async def yjs(request: web.Request) -> web.StreamResponse:
    realtime = request.app[REALTIME]
    check_upgrade(request, realtime)
    notices = realtime.access_monitor.epoch
    visitor: _Visitor | ServiceError
    try:
        visitor = await _admitted(request, realtime)
    except ServiceError as refusal:
        visitor = refusal
    socket = web.WebSocketResponse(
        protocols=[protocol.SUBPROTOCOL], autoping=False, autoclose=False, compress=False, max_msg_size=MOST_FRAME_BYTES
    )
    await socket.prepare(request)
    if request.transport is None:
        return socket
    if isinstance(visitor, ServiceError):
        await _turn_away(request, socket, visitor)
        return socket
    editor = YjsEditor(request, realtime, visitor)
    editor.access_epoch = notices
    try:
        realtime.register(editor, access_epoch=notices)
        if realtime.draining:
            editor.close(*CLOSE_RESTARTING)
        await _serve(editor, socket, request.app[ROOMS])
    finally:
        editor.on_closed()
    return socket


class _Visitor(NamedTuple):
    user: User
    name: str
    document: UUID
    access: Access


async def _admitted(request: web.Request, realtime: Realtime) -> _Visitor:
    """Who this is, and what they may do.

    Raises:
        Unauthenticated, NotFound, Forbidden, Unavailable: this client only understands close codes.
    """
    identified = await authenticate_upgrade(request, realtime.socket_auth)
    if identified is None:
        raise Unauthenticated('Authentication required: protocols: ["collab.v1", "bearer." + accessToken]')
    user, name = identified
    document = parse_id(request.match_info["documentId"])
    if document is None:
        raise NotFound("Document not found")
    try:
        access = await check(realtime.db, user=user.id, kind=ResourceKind.DOCUMENT, id=document, role=Role.VIEWER)
    except NotFound:
        if await store.read_document(realtime.db, document=document) is None:
            raise
        raise Forbidden("No access to this document") from None
    return _Visitor(user, name, document, access)


class YjsEditor(Connection):
    """A y-websocket client: a ``Connection`` to all that ends sockets, and the ``Listener`` of its one document."""

    __slots__ = ("document", "in_flight", "spoken_at")

    def __init__(self, request: web.Request, realtime: Realtime, visitor: _Visitor) -> None:
        now = asyncio.get_running_loop().time()
        # This client cannot renew its token: the socket lives as long as the session.
        lasting = dataclasses.replace(visitor.user, expires_at=datetime.max.replace(tzinfo=UTC))
        super().__init__(request, realtime, user=lasting, name=visitor.name, now=now)
        self.document = visitor.document
        self.access = visitor.access
        self.in_flight: deque[Edit] = deque()
        self.spoken_at = now

    @property
    def has_much_in_flight(self) -> bool:
        bytes = sum(len(edit.update) for edit in self.in_flight) - len(self.in_flight[-1].update)
        return len(self.in_flight) > IN_FLIGHT_EDITS or bytes > IN_FLIGHT_BYTES

    def say(self, message: bytes, delivery: Delivery = Delivery.DURABLE) -> None:
        self.spoken_at = asyncio.get_running_loop().time()
        self.write(binary_frame(message), delivery)

    def hear(self, update: Update) -> None:
        self.spoken_at = asyncio.get_running_loop().time()
        self.write(update.yjs_frame)

    def see(self, sight: Sight) -> None:
        self.write(sight.yjs_frame, Delivery.COALESCED, sight.entry.client)

    def restart(self) -> None:
        self.close(1013, "resynchronize")

    def lost(self) -> None:
        self.close(4404, "document was deleted")

    def revoke(self, _: ResourceRef, revocation: Revocation) -> None:
        deleted = revocation.reason == "deleted"
        self.close(4404 if deleted else 4403, "document was deleted" if deleted else "access revoked")

    def send_drain_notice(self, frame: bytes) -> None:
        """This client knows no such frame; it comes back when it is closed."""


async def _serve(editor: YjsEditor, socket: web.WebSocketResponse, rooms: Rooms) -> None:
    try:
        await rooms.enter(editor.document, editor)
        editor.realtime.grant(editor, ResourceRef("document", editor.document))
        if editor.close_code is not None:  # meanwhile, and nobody knew that it is in there
            rooms.leave(editor.document, editor.id)
            await _until_closed(socket)
            return
        vector = await rooms.vector(editor.document)
        editor.say(wire.sync(wire.STEP_1, vector))
        _show_all(editor, rooms)
        await _read(editor, socket, rooms)
    except ServiceError as refusal:
        editor.close(_close_code(refusal), refusal.detail)
        await _until_closed(socket)
    except Exception:
        log.exception("yjs socket failed", connection=editor.id, document=str(editor.document))
        editor.close(1011, "internal server error")
        await _until_closed(socket)


async def _read(editor: YjsEditor, socket: web.WebSocketResponse, rooms: Rooms) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            message = await socket.receive(timeout=max(0.1, editor.spoken_at + KEEPALIVE_SECONDS - loop.time()))
        except TimeoutError:
            message = None
        now = loop.time()
        if now - editor.spoken_at >= KEEPALIVE_SECONDS:
            editor.say(wire.KEEPALIVE)
        if message is None:
            continue
        if message.type in _GONE:
            editor.on_peer_close(message.data if message.type is WSMsgType.CLOSE else None)
            return
        editor.last_received_at = now
        if editor.close_code is None:
            await _hear(editor, message, rooms)


async def _hear(editor: YjsEditor, message: WSMessage, rooms: Rooms) -> None:
    metrics.FRAMES_IN.inc()
    if not editor.throttle.allow(asyncio.get_running_loop().time()):
        await asyncio.sleep(SLOW_DOWN_SECONDS)  # it cannot be told; it is read no faster
    if message.type is WSMsgType.PING:
        editor.write(protocol.pong_frame(message.data), Delivery.DROPPABLE)
    elif message.type is WSMsgType.BINARY:
        try:
            await _handle(editor, wire.parse(message.data), rooms)
        except wire.Malformed as error:
            raise ValidationFailed(str(error)) from None
    elif message.type is WSMsgType.TEXT:
        raise ValidationFailed("Frame must be a binary frame")


async def _handle(editor: YjsEditor, message: wire.Message, rooms: Rooms) -> None:
    match message:
        case wire.Sync(wire.STEP_1, vector):
            update, _, _ = await rooms.difference(editor.document, vector)
            editor.say(wire.sync(wire.STEP_2, update))
        case wire.Sync(step, update):
            await _edit(editor, update, rooms, compared=step == wire.STEP_2)
        case wire.Awareness(entries):
            rooms.say(editor.document, editor.id, editor.user.id, entries)
        case wire.QueryAwareness():
            _show_all(editor, rooms)


async def _edit(editor: YjsEditor, update: bytes, rooms: Rooms, *, compared: bool) -> None:
    """Apply and commit; others hear of it when it is durable. The client is not told, but if it fails, closed.

    ``compared``: the update is an answer, which tells of every deletion anew.
    """
    if update == wire.NOTHING:
        return
    access = editor.grants.get(ResourceRef("document", editor.document))
    if access is None:  # in doubt
        access = await check(
            editor.realtime.db, user=editor.user.id, kind=ResourceKind.DOCUMENT, id=editor.document, role=Role.VIEWER
        )
    if not access.allows(Role.COLLABORATOR):
        if not (compared and wire.adds_nothing(update)):
            editor.say(PERMISSION_DENIED)
        return
    edit = await rooms.begin(editor.document, author=editor.user.id, update=update, origin=editor.id)
    if edit is not None:
        editor.in_flight.append(edit)
    while editor.in_flight and (editor.in_flight[0].done.done() or editor.has_much_in_flight):
        await asyncio.wait({editor.in_flight.popleft().done})


def _show_all(editor: YjsEditor, rooms: Rooms) -> None:
    entries = [sight.entry for sight in rooms.sights(editor.document)]
    editor.say(wire.awareness(wire.awareness_content(entries)))


async def _turn_away(request: web.Request, socket: web.WebSocketResponse, refusal: ServiceError) -> None:
    code = _close_code(refusal)
    metrics.SOCKETS_CLOSED.labels(str(code)).inc()
    assert request.transport is not None
    request.transport.write(protocol.close_frame(code, refusal.detail))
    await _until_closed(socket)
    if request.transport is not None:
        request.transport.abort()


async def _until_closed(socket: web.WebSocketResponse) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            while (await socket.receive()).type not in _GONE:
                continue
    except TimeoutError:
        return


def _close_code(refusal: ServiceError) -> int:
    return _CLOSE_CODES.get(type(refusal), 1011)
