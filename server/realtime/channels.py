"""Broadcast: publishing from this process to all processes, over Redis pub/sub.

A message is ``origin \\n kind \\n payload``. ``origin`` is the connection that caused it; that connection does not
receive its own echo. ``kind`` is the id of a durable event, one of the constants below, or empty for all others.

All fan-out between processes passes through here, except joins and leaves (see ``presence``). ``announce`` (durable,
in order), ``publish``, ``publish_many`` and ``publish_encoded`` raise, because the caller's own reply depends on them.
``announce_committed``, ``push_to_user``, ``revoke_sessions``, ``access_changed`` and ``deleted`` follow a change that
is already committed and never raise: during a Redis outage they only log, and every process finds lost access by
itself within ``RECHECK_INTERVAL_SECONDS`` of ``access_monitor``.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from server import json
from server.realtime.grants import Revocation
from server.realtime.history import History
from server.realtime.protocol import encode

log = structlog.get_logger()

CONTROL_CHANNEL = "realtime:control"
MARKER = "+"  # not for members: marks the position in a channel's order at which a connection joined
COALESCED = "~"  # coalesced: only the newest of its origin matters, so it replaces an older one in the outbox
DROPPABLE = "?"  # may be dropped under backpressure
MAX_BATCH = 100


def workspace_channel(workspace: UUID) -> str:
    return f"ws:{workspace}"


def user_channel(user: UUID) -> str:
    return f"user:{user}"


def document_channel(document: UUID) -> str:
    return f"doc:{document}"


def encode_message(payload: bytes, *, origin: str = "", kind: str = "") -> bytes:
    return f"{origin}\n{kind}\n".encode() + payload


def event_body(type: str, *, workspace: UUID | None, user: UUID | None, name: str, **fields: Any) -> bytes:
    """Return the JSON object of an event without its id; ``fields`` never override those of the server."""
    body = {
        **fields,
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
    """Publisher of events and notices; needs no sockets, because the worker process has one too."""

    def __init__(self, redis: Redis, history: History) -> None:
        self.history = history
        self._redis = redis

    async def announce(
        self, type: str, *, workspace: UUID, user: UUID, name: str, origin: str = "", **fields: Any
    ) -> str:
        """Append a durable event to the workspace's history, broadcast it, and return its id.

        Raises:
            RedisError: Redis is unavailable; the event may or may not be in the history.
        """
        body = event_body(type, workspace=workspace, user=user, name=name, **fields)
        return await self.history.append(workspace, channel=workspace_channel(workspace), origin=origin, body=body)

    async def announce_committed(
        self, type: str, *, workspaces: Sequence[UUID], user: UUID, name: str, **fields: Any
    ) -> None:
        """Announce a change that is already committed (made over REST) in each of these workspaces.

        ``user`` and ``name`` are the author of the change; ``fields`` are those of the event's type, in camelCase.
        """
        bodies = [
            (workspace, event_body(type, workspace=workspace, user=user, name=name, **fields))
            for workspace in workspaces
        ]
        try:
            for start in range(0, len(bodies), MAX_BATCH):
                await self.history.append_all(bodies[start : start + MAX_BATCH], channel=workspace_channel)
        except (RedisError, OSError) as error:
            log.warning("event not announced", type=type, error=str(error))

    async def publish(self, channel: str, payload: bytes, *, origin: str = "", kind: str = "") -> None:
        """Publish one message to the subscribers of any channel, see ``Subscriber.subscribe``.

        Raises:
            RedisError: Redis is unavailable.
        """
        await self._redis.publish(channel, encode_message(payload, origin=origin, kind=kind))

    async def publish_many(self, messages: Sequence[tuple[str, str, bytes]], *, origin: str) -> None:
        """Publish many messages of one origin in one round trip: channel, kind and payload of each.

        Raises:
            RedisError: Redis is unavailable.
        """
        await self.publish_encoded(
            (channel, encode_message(payload, origin=origin, kind=kind)) for channel, kind, payload in messages
        )

    async def publish_encoded(self, messages: Iterable[tuple[str, bytes]]) -> None:
        """Publish many messages of different origins in one round trip: channel and ``encode_message`` of each.

        Raises:
            RedisError: Redis is unavailable.
        """
        async with self._redis.pipeline(transaction=False) as pipeline:
            for channel, encoded in messages:
                pipeline.publish(channel, encoded)
            await pipeline.execute()

    async def push_to_user(self, user: UUID, event: str, data: Any, *, droppable: bool = False) -> None:
        """Push a frame to all connections of a user, on every process; nothing is stored.

        ``droppable`` frames, such as ``job:output``, may be dropped when a client is slow.
        """
        kind = DROPPABLE if droppable else ""
        await self._try_publish(user_channel(user), encode(event, data), kind=kind)

    async def revoke_sessions(self, sessions: Iterable[UUID]) -> None:
        """Close the sockets of ended sessions (logout, revocation, password change, deletion) with 4401.

        Call this after the rows are committed; every process acts within a second.
        """
        if session_ids := list(sessions):
            await self._publish_control({"sessions": session_ids})

    async def access_changed(
        self, *, project: UUID, users: Sequence[UUID], revocation: Revocation | None = None
    ) -> None:
        """Make every process recheck these users' access to a project in PostgreSQL: their roles changed or ended.

        Users who are no longer members leave its rooms and documents and receive ACCESS_REVOKED with ``revocation``.
        Call this after the commit, before any step that may fail. (Use ``announce_committed`` for ROLE_CHANGED.)
        """
        await self._publish_control(
            {"project": project, "users": list(users)} | (revocation._asdict() if revocation else {})
        )

    async def deleted(self, kind: str, ids: Sequence[UUID], *, actor: UUID, name: str) -> None:
        """Remove all connections from deleted workspaces (``kind`` "workspace") or documents ("document").

        Call this after the commit, and after WORKSPACE_DELETED or DOCUMENT_DELETED is announced.
        """
        if not ids:
            return
        if kind == "workspace":
            await self._expire_history(ids)
        revocation = Revocation("deleted", actor, name)
        await self._publish_control({"kind": kind, "ids": list(ids)} | revocation._asdict())

    async def _expire_history(self, workspaces: Sequence[UUID]) -> None:
        try:
            await self.history.expire(workspaces)
        except (RedisError, OSError) as error:
            log.warning("history of deleted workspace not expired early", error=str(error))

    async def _publish_control(self, notice: dict[str, Any]) -> None:
        await self._try_publish(CONTROL_CHANNEL, json.dumps(notice))

    async def _try_publish(self, channel: str, payload: bytes, *, kind: str = "") -> None:
        try:
            await self.publish(channel, payload, kind=kind)
        except (RedisError, OSError) as error:
            log.warning("message not published", channel=channel.partition(":")[0], error=str(error))
