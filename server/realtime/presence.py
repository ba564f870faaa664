"""Presence: the users online in each workspace, over all processes and connections.

Every process renews its own lease in each workspace in which it has members. Every script, except that of a leave,
first removes the connections of processes whose lease has expired. A user joins with the first connection and leaves
with the last; the script that counts connections also publishes the event, so that each join and leave is announced
exactly once.

A join is one script: it reads the missed events, counts the connection and publishes a marker, atomically in the
order of events. All messages that a process receives on the channel after the marker happened after that moment.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from redis.asyncio import Redis

from server import json
from server.realtime import history
from server.realtime.channels import MARKER, encode_message, event_body, event_frame, workspace_channel
from server.realtime.history import MAX_REPLAY_BYTES, Replay

RENEW_INTERVAL_SECONDS = 3.0
LEASE_TTL_SECONDS = 9  # other processes detect a killed one after this plus at most one renewal interval
KEYS_TTL_SECONDS = 3600
NO_LIMIT = 1_000_000  # events in a replay: its bytes are limited
Arguments = list[str | bytes | int]

# KEYS: stream, bytes, connections {process:connection → user}, counts {user → connections}, names {user → name},
# leases. ARGV: channel, head of the leave event up to the user's id, process, lease TTL, TTL of the keys (seconds).
_COMMON = (
    history.LUA_FUNCTIONS
    + """
local now = tonumber(redis.call('TIME')[1])
local mine = ARGV[3] .. ':'
local function remove_connection(field)
    local user = redis.call('HGET', KEYS[3], field)
    if not user then return end
    redis.call('HDEL', KEYS[3], field)
    if redis.call('HINCRBY', KEYS[4], user, -1) > 0 then return end
    local name = redis.call('HGET', KEYS[5], user) or '""'
    redis.call('HDEL', KEYS[4], user)
    redis.call('HDEL', KEYS[5], user)
    local event = ARGV[2] .. user .. '","userName":' .. name .. '}}'
    redis.call('PUBLISH', ARGV[1], string.match(field, ':(.*)') .. '\\n\\n' .. event)
end
local function add_connection(field, user, name)
    if redis.call('HSETNX', KEYS[3], field, user) == 0 then return false end
    redis.call('HSET', KEYS[5], user, name)
    return redis.call('HINCRBY', KEYS[4], user, 1) == 1
end
local function remove_expired()
    for _, process in ipairs(redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', '(' .. now)) do
        for _, field in ipairs(redis.call('HKEYS', KEYS[3])) do
            if string.sub(field, 1, #process + 1) == process .. ':' then remove_connection(field) end
        end
        redis.call('ZREM', KEYS[6], process)
    end
end
local function renew()
    redis.call('ZADD', KEYS[6], now + tonumber(ARGV[4]), ARGV[3])
    for i = 3, 6 do redis.call('EXPIRE', KEYS[i], ARGV[5]) end
end
-- A process whose own lease has expired was disconnected, perhaps because Redis was down: then extend all leases.
local function extend_all_if_own_expired()
    local own = redis.call('ZSCORE', KEYS[6], ARGV[3])
    if own and tonumber(own) < now then
        for _, process in ipairs(redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', '(' .. now)) do
            redis.call('ZADD', KEYS[6], now + tonumber(ARGV[4]), process)
        end
    end
    return own
end
local function online()
    return {redis.call('HGETALL', KEYS[4]), redis.call('HGETALL', KEYS[5])}
end
"""
)

# ARGV: … since or empty, most, most bytes, marker, field, user, name as JSON, join message
_JOIN = (
    _COMMON
    + """
remove_expired()
local last, found = last_id(KEYS[1]), {0, 0, {}}
if ARGV[6] ~= '' then found = read_after(KEYS[1], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])) end
local held = redis.call('ZSCORE', KEYS[6], ARGV[3]) and 1 or 0
if found[2] == 1 then return {last, found, online(), held} end
local first = add_connection(ARGV[10], ARGV[11], ARGV[12])
renew()
redis.call('PUBLISH', ARGV[1], first and ARGV[13] or ARGV[9])
return {last, found, online(), held}
"""
)
# ARGV: … connection
_LEAVE = _COMMON + "remove_connection(mine .. ARGV[6])"
_RENEW = (
    _COMMON
    + """
local own = extend_all_if_own_expired()
remove_expired()
if own then renew() end
return own and 1 or 0
"""
)
# ARGV: … since or empty, most, most bytes, marker, then per member: connection, user, name, join message
_RESTORE = (
    _COMMON
    + """
extend_all_if_own_expired()
local here = {}
for i = 10, #ARGV, 4 do here[mine .. ARGV[i]] = true end
for _, field in ipairs(redis.call('HKEYS', KEYS[3])) do
    if string.sub(field, 1, #mine) == mine and not here[field] then remove_connection(field) end
end
remove_expired()
if next(here) then
    for i = 10, #ARGV, 4 do
        if add_connection(mine .. ARGV[i], ARGV[i + 1], ARGV[i + 2]) then
            redis.call('PUBLISH', ARGV[1], ARGV[i + 3])
        end
    end
    renew()
else
    redis.call('ZREM', KEYS[6], ARGV[3])
end
local last, found = last_id(KEYS[1]), {0, 0, {}}
if ARGV[6] ~= '' then found = read_after(KEYS[1], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])) end
if found[2] == 0 then redis.call('PUBLISH', ARGV[1], ARGV[9]) end
return {last, found, online()}
"""
)
_LIST = _COMMON + "remove_expired()\nreturn online()"


@dataclass(frozen=True)
class OnlineUser:
    user_id: UUID
    user_name: str
    connections: int

    def to_json(self) -> dict[str, Any]:
        return {"userId": self.user_id, "userName": self.user_name, "connections": self.connections}


@dataclass(frozen=True)
class Member:
    connection: str
    user: UUID
    name: str


class PresenceRegistry:
    """The presence leases and connections of one process; ``process`` is its id, without a colon."""

    def __init__(self, redis: Redis, *, process: str) -> None:
        self._redis: Any = redis
        self._process = process
        self._join, self._leave, self._renew, self._restore, self._list = map(
            redis.register_script, (_JOIN, _LEAVE, _RENEW, _RESTORE, _LIST)
        )

    async def join(
        self, workspace: UUID, member: Member, *, since: str | None
    ) -> tuple[Replay, list[OnlineUser], bool]:
        """Register a connection; return its missed events, the users online, and whether the process held its lease.

        The connection is not registered if the replay has ``more``. If the lease had expired, none of the process's
        other connections is registered any more.
        """
        marker = encode_message(b"", origin=member.connection, kind=MARKER)
        arguments: Arguments = [*self._common(workspace), since or "", NO_LIMIT, MAX_REPLAY_BYTES, marker]
        arguments += [f"{self._process}:{member.connection}", str(member.user), json.dumps(member.name)]
        arguments.append(_join_message(workspace, member, kind=MARKER))
        last, raw_replay, online, held = await self._join(keys=_presence_keys(workspace), args=arguments)
        return history.parse_replay(last, raw_replay), _online(online), bool(held)

    async def leave(self, workspace: UUID, *, connection: str) -> None:
        """Unregister a connection, and publish the leave event if it was the user's last."""
        await self._leave(keys=_presence_keys(workspace), args=[*self._common(workspace), connection])

    async def renew(self, workspaces: Sequence[UUID]) -> list[UUID]:
        """Renew this process's leases; return the workspaces in which its lease had expired."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for workspace in workspaces:
                await self._renew(keys=_presence_keys(workspace), args=self._common(workspace), client=pipeline)
            results = await pipeline.execute()
        return [workspace for workspace, held in zip(workspaces, results, strict=True) if not held]

    async def restore(
        self, workspace: UUID, members: Iterable[Member], *, since: str | None, marker: str
    ) -> tuple[Replay, list[OnlineUser]]:
        """Register exactly these members as the process's connections; return the missed events and users online.

        ``marker`` is the origin of the marker, which is published unless the replay has ``more``.
        """
        arguments: Arguments = [*self._common(workspace), since or "", NO_LIMIT, MAX_REPLAY_BYTES]
        arguments.append(encode_message(b"", origin=marker, kind=MARKER))
        for member in members:
            arguments += [member.connection, str(member.user), json.dumps(member.name)]
            arguments.append(_join_message(workspace, member))
        last, raw_replay, online = await self._restore(keys=_presence_keys(workspace), args=arguments)
        return history.parse_replay(last, raw_replay), _online(online)

    async def online(self, workspace: UUID) -> list[OnlineUser]:
        return _online(await self._list(keys=_presence_keys(workspace), args=self._common(workspace)))

    def _common(self, workspace: UUID) -> Arguments:
        head = json.dumps({"type": "USER_LEAVE", "workspaceId": workspace, "timestamp": datetime.now(UTC)})
        leave = b'{"event":"collaboration:event","data":' + head[:-1] + b',"userId":"'
        return [workspace_channel(workspace), leave, self._process, LEASE_TTL_SECONDS, KEYS_TTL_SECONDS]


def _join_message(workspace: UUID, member: Member, *, kind: str = "") -> bytes:
    body = event_body("USER_JOIN", workspace=workspace, user=member.user, name=member.name)
    return encode_message(event_frame(body), origin=member.connection, kind=kind)


def _presence_keys(workspace: UUID) -> list[str]:
    return history.stream_keys(workspace) + [
        f"ws:{{{workspace}}}:{part}" for part in ("connections", "counts", "names", "leases")
    ]


def _online(reply: Any) -> list[OnlineUser]:
    """Parse the result {counts, names} of the Lua function ``online``; both are flat lists of pairs."""
    counts, names = ({pairs[i]: pairs[i + 1] for i in range(0, len(pairs), 2)} for pairs in reply)
    return [
        OnlineUser(user_id=UUID(user.decode()), user_name=json.loads(names[user]), connections=int(count))
        for user, count in sorted(counts.items())
    ]
