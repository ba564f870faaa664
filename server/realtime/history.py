"""The durable events of a workspace: a Redis stream whose ids are the event ids.

One script appends and publishes, so that all members receive events in the order of the stream. A stream entry is
{origin, end, data}: ``data`` is the event's JSON without its opening brace and id; ``end`` is the number of bytes
appended up to and including it, from which the script computes the size of the stream.
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

from server.errors import invalid_field

log = structlog.get_logger()

RETENTION_SECONDS = 24 * 3600
MAX_REPLAY_BYTES = 1 << 20
DELETED_RETENTION_SECONDS = 60
MAX_BATCH = 64  # events per batch, which is one round trip
_ID = re.compile(r"([0-9]{1,16})-([0-9]{1,16})")

# Functions for the scripts of this module and of presence. Fields of an entry: {'origin', o, 'end', n, 'data', d}.
LUA_FUNCTIONS = (
    f"local KEPT = {RETENTION_SECONDS}"
    + """
-- If all entries are older than a day, the stream is empty and has no id to resume from: add an entry without data.
local function last_id(stream)
    redis.call('XTRIM', stream, 'MINID', (tonumber(redis.call('TIME')[1]) - KEPT) * 1000)
    local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
    if last[1] then return last[1][1] end
    local total = redis.call('GET', stream .. ':bytes') or 0
    local id = redis.call('XADD', stream, '*', 'origin', '', 'end', total, 'data', '')
    redis.call('EXPIRE', stream, KEPT)
    return id
end
-- Return {gap, more, entries}: the entries after since, oldest first, up to most entries and bytes, at least one.
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
    f"local KEPT = {RETENTION_SECONDS}"
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

# KEYS: stream, bytes. ARGV: since or empty, most, most bytes
_READ = (
    LUA_FUNCTIONS
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
class StoredEvent:
    id: str
    origin: str
    event: bytes  # the event's JSON object, with its id


@dataclass(frozen=True)
class Replay:
    """The events after an event: ``gap`` if that event is no longer in the history, ``more`` if there are more."""

    last_event_id: str
    events: list[StoredEvent]
    gap: bool = False
    more: bool = False


class History:
    def __init__(self, redis: Redis, *, max_events: int, max_bytes: int) -> None:
        self._redis: Any = redis
        self._limits = (max_events, max_bytes)
        self._append = redis.register_script(_APPEND)
        self._read = redis.register_script(_READ)
        self._pending: list[tuple[list[Any], asyncio.Future[bytes]]] = []
        self._flush_task: asyncio.Task[None] | None = None

    async def append(self, workspace: UUID, *, channel: str, origin: str, body: bytes) -> str:
        """Append an event, publish it, and return its id; ``body`` is the event's JSON object.

        Events that are appended during a round trip form the next batch.
        """
        appended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pending.append(([*stream_keys(workspace), channel, origin, body[1:], *self._limits], appended))
        if self._flush_task is None or self._flush_task.done():
            # In an empty context, not that of a request: the batch holds events of many requests.
            self._flush_task = asyncio.get_running_loop().create_task(self._flush(), context=Context())
        return (await appended).decode()

    async def append_all(self, bodies: Sequence[tuple[UUID, bytes]], *, channel: Callable[[UUID], str]) -> None:
        """Append and publish one event in each of several workspaces, in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for workspace, body in bodies:
                arguments: list[str | bytes | int] = [channel(workspace), "", body[1:], *self._limits]
                await self._append(keys=stream_keys(workspace), args=arguments, client=pipeline)
            await pipeline.execute()

    async def read(self, workspace: UUID, *, after: str | None, limit: int) -> Replay:
        """Return up to ``limit`` events (and 1 MiB), oldest first, after an event or from the beginning."""
        last, raw_replay = await self._read(keys=stream_keys(workspace), args=[after or "", limit, MAX_REPLAY_BYTES])
        return parse_replay(last, raw_replay)

    async def _flush(self) -> None:
        """Append batches until no event is pending."""
        while self._pending:
            batch, self._pending = self._pending[:MAX_BATCH], self._pending[MAX_BATCH:]
            try:
                results = await self._append_batch([arguments for arguments, _ in batch])
            except (RedisError, OSError) as error:
                results = [error] * len(batch)
            except Exception as error:  # else the callers of append would wait forever
                log.exception("events not appended")
                results = [error] * len(batch)
            for (_, appended), result in zip(batch, results, strict=True):
                if appended.done():  # its caller was cancelled
                    continue
                if isinstance(result, BaseException):
                    appended.set_exception(result)
                else:
                    appended.set_result(result)

    async def close(self) -> None:
        """Wait until every pending event is sent or has failed."""
        if self._flush_task is not None:
            await asyncio.wait({self._flush_task})

    async def _append_batch(self, batch: list[Any]) -> list[Any]:
        """Run the script for each event of a batch; load it first if Redis does not have it.

        redis-py's own way costs one more round trip for every pipeline: it asks whether the script exists.
        """
        results = await self._pipeline(batch)
        missed = [index for index, result in enumerate(results) if isinstance(result, NoScriptError)]
        if missed:
            await self._redis.script_load(_APPEND)
            retried = await self._pipeline([batch[index] for index in missed])
            for index, result in zip(missed, retried, strict=True):
                results[index] = result
        return results

    async def _pipeline(self, batch: list[Any]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for arguments in batch:
                pipeline.evalsha(self._append.sha, 2, *arguments)
            results: list[Any] = await pipeline.execute(raise_on_error=False)
        return results

    async def expire(self, workspaces: Sequence[UUID]) -> None:
        """Let the histories of deleted workspaces expire soon: no client can resume there."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for workspace in workspaces:
                for key in stream_keys(workspace):
                    pipeline.expire(key, DELETED_RETENTION_SECONDS)
            await pipeline.execute()


def stream_keys(workspace: UUID) -> list[str]:
    stream = f"ws:{{{workspace}}}:events"
    return [stream, f"{stream}:bytes"]


def parse_replay(last: bytes, raw_replay: Any) -> Replay:
    """Parse the id of the last event and the result {gap, more, entries} of the Lua function ``read_after``."""
    gap, more, entries = raw_replay
    return Replay(
        last_event_id=last.decode(),
        events=[StoredEvent(id.decode(), origin.decode(), insert_event_id(id, data)) for id, origin, data in entries],
        gap=bool(gap),
        more=bool(more),
    )


def insert_event_id(id: bytes, data: bytes) -> bytes:
    return b'{"eventId":"' + id + b'",' + data


def event_id_key(id: str) -> tuple[int, int]:
    """Return the two integers by which event ids are compared."""
    milliseconds, _, count = id.partition("-")
    return int(milliseconds), int(count)


def parse_event_id(text: str, *, field: str) -> str:
    """Return the event id as Redis writes it.

    Raises:
        ValidationFailed: the text is not an event id.
    """
    match = _ID.fullmatch(text)
    if match is None:
        raise invalid_field(field, "Not a valid event id: must be <milliseconds>-<number>.")
    return "-".join(str(int(part)) for part in match.groups())
