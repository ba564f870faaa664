"""What this process tells all processes, through Redis pub/sub.

A message is ``origin \\n kind \\n payload``. ``origin`` is the connection that caused it, which does not hear its
own echo. ``kind`` is the id of a durable event, one of the marks below, or empty for what is neither.

Everything others must hear goes through here (but who comes and goes, see ``presence``): ``announce`` (durable, in
order) and ``publish`` with its siblings where the caller's own answer depends on it; ``report``, ``tell_user``,
``revoke_sessions``, ``access_changed`` and ``gone`` after a change that is committed elsewhere: these never raise.
While Redis is away they only log, and every process finds lost access by itself within RECHECK_SECONDS of
``standing``.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server import json
from server.realtime.history import History
from server.realtime.peers import Revocation
from server.realtime.protocol import encode

log = structlog.get_logger()

CONTROL = "realtime:control"
MARK = "+"  # not for members: the place in a channel's order at which somebody entered
NEWEST = "~"  # only the newest of its origin matters: an older one that still waits is replaced
DROPPABLE = "?"  # may be dropped when a client is slow
AT_ONCE = 100


def room_channel(workspace: UUID) -> str:
    return f"ws:{workspace}"


def user_channel(user: UUID) -> str:
    return f"user:{user}"


def document_channel(document: UUID) -> str:
    return f"doc:{document}"


def message(payload: bytes, *, origin: str = "", kind: str = "") -> bytes:
    return f"{origin}\n{kind}\n".encode() + payload


def event_body(type: str, *, workspace: UUID | None, user: UUID | None, name: str, **more: Any) -> bytes:
    """The JSON object of an event, but for its id. What a client sent stands behind our own fields."""
    body = {
        **more,
        "type": type,
        "workspaceId": workspace,
        "userId": user,
        "userName": name,
        "timestamp": datetime.now(UTC),
    }
    return json.dumps(body)


def event_frame(body: bytes) -> bytes:
    return b'{"event":"collaboration:event","data":' + body + b"}"


class Channels:
    """Needs no sockets: the worker process has one too."""

    def __init__(self, redis: Redis, history: History) -> None:
        self.history = history
        self._redis = redis

    async def announce(
        self, type: str, *, workspace: UUID, user: UUID, name: str, origin: str = "", **more: Any
    ) -> str:
        """Tell everybody in the workspace, for good: the event's id, once it is in the history.

        Raises:
            RedisError: Redis is away, and it is not known whether the event is in the history.
        """
        body = event_body(type, workspace=workspace, user=user, name=name, **more)
        return await self.history.append(workspace, channel=room_channel(workspace), origin=origin, body=body)

    async def report(self, type: str, *, workspaces: Sequence[UUID], user: UUID, name: str, **more: Any) -> None:
        """Announce what is committed elsewhere (a change made over REST) in each of these workspaces.

        ``user`` and ``name`` are who did it; ``more`` are further fields of the event, in camelCase.
        """
        bodies = [(each, event_body(type, workspace=each, user=user, name=name, **more)) for each in workspaces]
        try:
            for start in range(0, len(bodies), AT_ONCE):
                await self.history.append_all(bodies[start : start + AT_ONCE], channel=room_channel)
        except (RedisError, OSError) as error:
            log.warning("event not announced", type=type, error=str(error))

    async def publish(self, channel: str, payload: bytes, *, origin: str = "", kind: str = "") -> None:
        """Tell the listeners of any channel, see ``Subscriber.subscribe``.

        Raises:
            RedisError: Redis is away.
        """
        await self._redis.publish(channel, message(payload, origin=origin, kind=kind))

    async def publish_all(self, messages: Sequence[tuple[str, str, bytes]], *, origin: str) -> None:
        """Many at once: channel, kind and payload of each.

        Raises:
            RedisError: Redis is away.
        """
        await self.pass_on((channel, message(payload, origin=origin, kind=kind)) for channel, kind, payload in messages)

    async def pass_on(self, messages: Iterable[tuple[str, bytes]]) -> None:
        """Many at once, of different origins: channel and ``message`` of each.

        Raises:
            RedisError: Redis is away.
        """
        async with self._redis.pipeline(transaction=False) as pipeline:
            for channel, made in messages:
                pipeline.publish(channel, made)
            await pipeline.execute()

    async def tell_user(self, user: UUID, event: str, data: Any, *, droppable: bool = False) -> None:
        """Push a frame to all connections of a user, on whichever process: live only, nothing is kept.

        ``droppable`` for what a slow client need not hear, such as ``job:output``.
        """
        kind = DROPPABLE if droppable else ""
        await self._attempt(user_channel(user), encode(event, data), kind=kind)

    async def revoke_sessions(self, sessions: Iterable[UUID]) -> None:
        """These sessions have ended (logout, revocation, password change, deletion): their sockets close with 4401.

        To be called after their rows say so; every process acts within a second.
        """
        if ended := list(sessions):
            await self._control({"sessions": ended})

    async def access_changed(self, *, project: UUID, users: Sequence[UUID], why: Revocation | None = None) -> None:
        """These users' roles in a project have changed, or ended: every process asks PostgreSQL anew for them.

        Those who are no members any more leave its rooms and documents and hear ACCESS_REVOKED, and ``why``. To be
        called after the commit, before all that may fail. (Tell the rooms of ROLE_CHANGED by ``report``.)
        """
        await self._control({"project": project, "users": list(users)} | (why._asdict() if why else {}))

    async def gone(self, kind: str, ids: Sequence[UUID], *, actor: UUID, name: str) -> None:
        """Workspaces (``kind`` "workspace") or documents ("document") are deleted: whoever is in them leaves.

        To be called after the commit, and after the rooms were told of WORKSPACE_DELETED or DOCUMENT_DELETED.
        """
        if not ids:
            return
        if kind == "workspace":
            await self._let_history_go(ids)
        why = Revocation("deleted", actor, name)
        await self._control({"kind": kind, "ids": list(ids)} | why._asdict())

    async def _let_history_go(self, workspaces: Sequence[UUID]) -> None:
        try:
            await self.history.let_go(workspaces)
        except (RedisError, OSError) as error:
            log.warning("history of a deleted workspace kept until it expires", error=str(error))

    async def _control(self, notice: dict[str, Any]) -> None:
        await self._attempt(CONTROL, json.dumps(notice))

    async def _attempt(self, channel: str, payload: bytes, *, kind: str = "") -> None:
        try:
            await self.publish(channel, payload, kind=kind)
        except (RedisError, OSError) as error:
            log.warning("message not published", channel=channel.partition(":")[0], error=str(error))
