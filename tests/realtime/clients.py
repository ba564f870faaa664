"""Clients that follow the contract: they remember the last event id and rejoin with it after a disconnect."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import aiohttp

from server.realtime.history import event_id_key
from tests.actors import Actor
from tests.sockets import Closed, ErrorReply, SocketClient
from tests.timeouts import WAIT_TIMEOUT_SECONDS

DISCONNECTED = (Closed, aiohttp.ClientError, OSError, TimeoutError)
PAUSE_SECONDS = 0.05


class ReconnectingClient:
    """A member of a workspace that reconnects, to any of these servers, after each disconnect."""

    def __init__(self, actor: Actor, workspace: str, bases: Sequence[str]) -> None:
        self.actor, self.workspace, self.bases = actor, workspace, bases
        self.events: list[dict[str, Any]] = []  # durable events, in the order of arrival
        self.since: str | None = None
        self._changes_received: set[str] = set()
        self.events_received: set[str] = set()  # the events of all frames that the server pushed
        self.gaps = 0
        self.reconnects = -1
        self.socket: SocketClient | None = None
        self._task: asyncio.Task[None] | None = None
        self.connected = asyncio.Event()

    async def __aenter__(self) -> "ReconnectingClient":
        self._task = asyncio.create_task(self._run())
        await self.connected.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.socket is not None:
            self.socket.abort()

    @property
    def ids(self) -> list[str]:
        return [event["eventId"] for event in self.events]

    @property
    def changes(self) -> list[Any]:
        return [event["change"] for event in self.events if event["type"] == "FILE_CHANGE"]

    def abort(self) -> None:
        if self.socket is not None:
            self.socket.abort()

    async def wait_for_change(self, change: Any, *, seconds: float = WAIT_TIMEOUT_SECONDS) -> None:
        async with asyncio.timeout(seconds):
            while repr(change) not in self._changes_received:
                await asyncio.sleep(0.01)

    async def _run(self) -> None:
        while True:
            try:
                await self._join()
                while True:
                    frame = await self._connected().next(seconds=60)
                    self.events_received.add(frame["event"])
                    self._record(frame["data"])
            except DISCONNECTED:
                self.connected.clear()
                if self.socket is not None:
                    self.socket.abort()
                await asyncio.sleep(PAUSE_SECONDS)

    def _connected(self) -> SocketClient:
        assert self.socket is not None
        return self.socket

    async def _join(self) -> None:
        self.socket = await self.actor.at(random.choice(self.bases)).connect()
        while True:
            try:
                joined = await self.socket.push("join:workspace", workspaceId=self.workspace, since=self.since)
            except ErrorReply as error:
                if error.code != "unavailable":
                    raise
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            self.gaps += joined["gap"]
            for event in joined["events"]:
                self._record(event)
            if not joined["more"]:
                break
        self.since = self.since or joined["lastEventId"]
        self.reconnects += 1
        self.connected.set()

    def _record(self, event: dict[str, Any]) -> None:
        if "eventId" in event:
            self.events.append(event)
            self._changes_received.add(repr(event.get("change")))
            self.since = event["eventId"]


class ReconnectingWriter:
    """A writer that reconnects, and retries each change of a file until it is acknowledged."""

    def __init__(self, actor: Actor, workspace: str, bases: Sequence[str]) -> None:
        self.actor, self.workspace, self.bases = actor, workspace, bases
        self.acknowledged: dict[str, Any] = {}  # event id → change
        self._socket: SocketClient | None = None

    async def write(self, changes: Sequence[Any], *, pause: float = 0.0) -> None:
        for change in changes:
            await self.write_one(change)
            await asyncio.sleep(pause)
        await self.stop()

    async def stop(self) -> None:
        if self._socket is not None:
            await self._socket.close()

    async def write_one(self, change: Any) -> None:
        """Retry one change until its ack; if an ack is lost, ``change`` is in the history twice."""
        while True:
            try:
                if self._socket is None:
                    self._socket = await self.actor.at(random.choice(self.bases)).connect(self.workspace)
                ack = await self._socket.push("file:change", workspaceId=self.workspace, change=change)
            except ErrorReply as error:
                if error.code != "unavailable":
                    raise
            except DISCONNECTED:
                if self._socket is not None:
                    self._socket.abort()
                self._socket = None
            else:
                self.acknowledged[ack["eventId"]] = change
                return
            await asyncio.sleep(PAUSE_SECONDS)


def assert_ordered_and_once(member: ReconnectingClient) -> None:
    ids = member.ids
    assert ids == sorted({*ids}, key=event_id_key), "in order, and none twice"
