"""The durable events of a workspace: a Redis stream, whose ids are the event ids.

One script appends and publishes, so that the order of the stream is the order in which everybody hears. An
entry is {origin, end, data}: ``data`` the event's JSON but for its opening brace and id, ``end`` the number of
bytes appended up to and with it, by which the stream knows how much it holds.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from server.errors import invalid

log = structlog.get_logger()

KEPT_SECONDS = 24 * 3600
REPLAY_BYTES = 1 << 20
DELETED_KEPT_SECONDS = 60
AT_ONCE = 64  # events in one round trip
_ID = re.compile(r"([0-9]{1,16})-([0-9]{1,16})")

# Functions for the scripts of this module and of presence. Fields of an entry: {'origin', o, 'end', n, 'data', d}.
LUA = (
    f"local KEPT = {KEPT_SECONDS}"
    + """
-- An empty stream, for everything in it is older than a day, is one that nobody could resume from.
local function last_id(stream)
    redis.call('XTRIM', stream, 'MINID', (tonumber(redis.call('TIME')[1]) - KEPT) * 1000)
    local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
    if last[1] then return last[1][1] end
    local total = redis.call('GET', stream .. ':bytes') or 0
    local id = redis.call('XADD', stream, '*', 'origin', '', 'end', total, 'data', '')
    redis.call('EXPIRE', stream, KEPT)
    return id
end
-- Entries after since, oldest first, at most so many and so many bytes (but one): {gap, more, entries}.
local function read_after(stream, since, most, bytes)
    if not redis.call('XRANGE', stream, since, since)[1] then return {1, 0, {}} end
    local found, position = {}, since
    while true do
        local entries = redis.call('XRANGE', stream, '(' .. position, '+', 'COUNT', 50)
        for _, entry in ipairs(entries) do
            local data = entry[2][6]
            if #found == most or (#found > 0 and bytes < #data) then return {0, 1, found} end
            bytes = bytes - #data
            if data ~= '' then found[#found + 1] = {entry[1], entry[2][2], data} end
            position = entry[1]
        end
        if #entries < 50 then return {0, 0, found} end
    end
end
"""
)

# KEYS: stream, bytes. ARGV: channel, origin, data, most, most bytes
_APPEND = (
    f"local KEPT = {KEPT_SECONDS}"
    + """
local size, most = #ARGV[3], tonumber(ARGV[5])
local total = redis.call('INCRBY', KEYS[2], size)
local id = redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[4], '*', 'origin', ARGV[2], 'end', total, 'data', ARGV[3])
redis.call('XTRIM', KEYS[1], 'MINID', (tonumber(redis.call('TIME')[1]) - KEPT) * 1000)
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
while total - tonumber(first[2][4]) + #first[2][6] > most and first[1] ~= id do
    redis.call('XDEL', KEYS[1], first[1])
    first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
end
redis.call('EXPIRE', KEYS[1], KEPT)
redis.call('EXPIRE', KEYS[2], KEPT)
redis.call('PUBLISH', ARGV[1], ARGV[2] .. '\\n' .. id .. '\\n'
    .. '{"event":"collaboration:event","data":{"eventId":"' .. id .. '",' .. ARGV[3] .. '}')
return id
"""
)

# KEYS: stream, bytes. ARGV: since or nothing, most, most bytes
_READ = (
    LUA
    + """
local last = last_id(KEYS[1])
local since = ARGV[1]
if since == '' then
    local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
    local shown = first[2][6] ~= '' and 1 or 0
    local found = read_after(KEYS[1], first[1], tonumber(ARGV[2]) - shown, tonumber(ARGV[3]))
    if shown == 1 then table.insert(found[3], 1, {first[1], first[2][2], first[2][6]}) end
    return {last, found}
end
return {last, read_after(KEYS[1], since, tonumber(ARGV[2]), tonumber(ARGV[3]))}
"""
)


@dataclass(frozen=True)
class Entry:
    id: str
    origin: str
    event: bytes  # the event's JSON object, with its id


@dataclass(frozen=True)
class Replay:
    """What came after an event: ``gap`` where that one is not in the history, ``more`` where this is not all."""

    last: str
    entries: list[Entry]
    gap: bool = False
    more: bool = False


class History:
    def __init__(self, redis: Redis, *, most: int, most_bytes: int) -> None:
        self._redis: Any = redis
        self._limits = (most, most_bytes)
        self._append = redis.register_script(_APPEND)
        self._read = redis.register_script(_READ)
        self._waiting: list[tuple[list[Any], asyncio.Future[bytes]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def append(self, workspace: UUID, *, channel: str, origin: str, body: bytes) -> str:
        """Append and publish; ``body`` is the event's JSON object. Its id, once it is in the stream.

        What is appended while a round trip is under way goes together with the next.
        """
        appended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append(([*keys(workspace), channel, origin, body[1:], *self._limits], appended))
        if self._flushing is None or self._flushing.done():
            # In no request's context: it sends what many have said.
            self._flushing = asyncio.get_running_loop().create_task(self._flush(), context=Context())
        return (await appended).decode()

    async def append_all(self, bodies: Sequence[tuple[UUID, bytes]], *, channel: Callable[[UUID], str]) -> None:
        """The same for one event each in several workspaces, in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for workspace, body in bodies:
                arguments: list[str | bytes | int] = [channel(workspace), "", body[1:], *self._limits]
                await self._append(keys=keys(workspace), args=arguments, client=pipeline)
            await pipeline.execute()

    async def read(self, workspace: UUID, *, after: str | None, most: int) -> Replay:
        """At most so many events (and 1 MiB), oldest first, after that one or from the beginning."""
        last, found = await self._read(keys=keys(workspace), args=[after or "", most, REPLAY_BYTES])
        return replay(last, found)

    async def _flush(self) -> None:
        """Ends by itself: whoever appends waits for it, and at last ``close``."""
        while self._waiting:
            batch, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
            try:
                answers = await self._run([arguments for arguments, _ in batch])
            except (RedisError, OSError) as error:
                answers = [error] * len(batch)
            except Exception as error:  # else they would wait for ever
                log.exception("events not appended")
                answers = [error] * len(batch)
            for (_, appended), answer in zip(batch, answers, strict=True):
                if appended.done():  # nobody waits for it any more
                    continue
                if isinstance(answer, BaseException):
                    appended.set_exception(answer)
                else:
                    appended.set_result(answer)

    async def close(self) -> None:
        """Returns when what was appended has been sent, or could not be."""
        if self._flushing is not None:
            await asyncio.wait({self._flushing})

    async def _run(self, batch: list[Any]) -> list[Any]:
        """The script once for each; what redis-py would look up before every pipeline is loaded when it is missed."""
        answers = await self._pipeline(batch)
        missed = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missed:
            await self._redis.script_load(_APPEND)
            again = await self._pipeline([batch[index] for index in missed])
            for index, answer in zip(missed, again, strict=True):
                answers[index] = answer
        return answers

    async def _pipeline(self, batch: list[Any]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for arguments in batch:
                pipeline.evalsha(self._append.sha, 2, *arguments)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    async def let_go(self, workspaces: Sequence[UUID]) -> None:
        """The workspaces are deleted: nobody can resume there, and what was said there is not kept."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for workspace in workspaces:
                for key in keys(workspace):
                    pipeline.expire(key, DELETED_KEPT_SECONDS)
            await pipeline.execute()


def keys(workspace: UUID) -> list[str]:
    stream = f"ws:{{{workspace}}}:events"
    return [stream, f"{stream}:bytes"]


def replay(last: bytes, found: Any) -> Replay:
    gap, more, entries = found
    return Replay(
        last=last.decode(),
        entries=[Entry(id.decode(), origin.decode(), with_id(id, data)) for id, origin, data in entries],
        gap=bool(gap),
        more=bool(more),
    )


def with_id(id: bytes, data: bytes) -> bytes:
    return b'{"eventId":"' + id + b'",' + data


def position(id: str) -> tuple[int, int]:
    """An event id as what it is compared by."""
    milliseconds, _, count = id.partition("-")
    return int(milliseconds), int(count)


def parse_event_id(text: str, *, field: str) -> str:
    """The id, as Redis writes it.

    Raises:
        ValidationFailed: it is none.
    """
    match = _ID.fullmatch(text)
    if match is None:
        raise invalid(field, "Not an event id: <milliseconds>-<number>.")
    return "-".join(str(int(part)) for part in match.groups())
