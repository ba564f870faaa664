"""Who is here, over all processes: people, not sockets.

Every process renews its own lease in each room that it has members in; whoever looks at a room first removes
the connections of processes whose lease ran out. A user joins with their first connection and leaves with the
last, and the script that counts also publishes, so that each is announced exactly once.
"""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from redis.asyncio import Redis

from server import json

RENEW_SECONDS = 3.0
LEASE_SECONDS = 9  # a killed process is noticed after this and at most one renewal more
KEPT_SECONDS = 3600
Arguments = list[str | bytes | int]

# KEYS: connections {process:connection → user}, counts {user → connections}, names {user → name}, leases.
# ARGV: channel, head of the leave event up to the user's id.
_COMMON = """
local now = tonumber(redis.call('TIME')[1])
local function gone(field)
    local user = redis.call('HGET', KEYS[1], field)
    if not user then return end
    redis.call('HDEL', KEYS[1], field)
    if redis.call('HINCRBY', KEYS[2], user, -1) > 0 then return end
    local name = redis.call('HGET', KEYS[3], user) or '""'
    redis.call('HDEL', KEYS[2], user)
    redis.call('HDEL', KEYS[3], user)
    local event = ARGV[2] .. user .. '","userName":' .. name .. '}}'
    redis.call('PUBLISH', ARGV[1], string.match(field, ':(.*)') .. '\\n\\n' .. event)
end
local function sweep()
    local dead = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', '(' .. now)
    for _, process in ipairs(dead) do
        for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
            if string.sub(field, 1, #process + 1) == process .. ':' then gone(field) end
        end
        redis.call('ZREM', KEYS[4], process)
    end
end
"""

# ARGV: … process, lease, kept, field, user, name as JSON, join event
_JOIN = (
    _COMMON
    + """
sweep()
redis.call('ZADD', KEYS[4], now + tonumber(ARGV[4]), ARGV[3])
if redis.call('HSETNX', KEYS[1], ARGV[6], ARGV[7]) == 1 then
    redis.call('HSET', KEYS[3], ARGV[7], ARGV[8])
    if redis.call('HINCRBY', KEYS[2], ARGV[7], 1) == 1 then
        redis.call('PUBLISH', ARGV[1], string.match(ARGV[6], ':(.*)') .. '\\n\\n' .. ARGV[9])
    end
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[5]) end
return {redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3])}
"""
)
_LEAVE = _COMMON + "gone(ARGV[3])"
_RENEW = (
    _COMMON
    + """
redis.call('ZADD', KEYS[4], now + tonumber(ARGV[4]), ARGV[3])
sweep()
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[5]) end
"""
)
_LIST = _COMMON + "sweep()\nreturn {redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3])}"


@dataclass(frozen=True)
class Online:
    user: UUID
    name: str
    connections: int

    def shown(self) -> dict[str, Any]:
        return {"userId": str(self.user), "userName": self.name, "connections": self.connections}


class Presence:
    """Of one process; ``process`` names it and holds no colon."""

    def __init__(self, redis: Redis, *, process: str) -> None:
        self._process = process
        self._join, self._leave, self._renew, self._list = map(redis.register_script, (_JOIN, _LEAVE, _RENEW, _LIST))

    async def join(
        self, workspace: UUID, *, connection: str, user: UUID, name: str, channel: str, event: bytes, leave_head: bytes
    ) -> list[Online]:
        """Count a connection; who is here now. ``event`` is published where it is the user's first."""
        field = f"{self._process}:{connection}"
        arguments: Arguments = [channel, leave_head, self._process, LEASE_SECONDS, KEPT_SECONDS]
        arguments += [field, str(user), json.dumps(name), event]
        return _online(await self._join(keys=_keys(workspace), args=arguments))

    async def leave(self, workspace: UUID, *, connection: str, channel: str, leave_head: bytes) -> None:
        """Uncount a connection; the leave event is published where it was the user's last."""
        arguments: Arguments = [channel, leave_head, f"{self._process}:{connection}"]
        await self._leave(keys=_keys(workspace), args=arguments)

    async def renew(self, workspace: UUID, *, channel: str, leave_head: bytes) -> None:
        arguments: Arguments = [channel, leave_head, self._process, LEASE_SECONDS, KEPT_SECONDS]
        await self._renew(keys=_keys(workspace), args=arguments)

    async def online(self, workspace: UUID, *, channel: str, leave_head: bytes) -> list[Online]:
        return _online(await self._list(keys=_keys(workspace), args=[channel, leave_head]))


def _keys(workspace: UUID) -> list[str]:
    return [f"ws:{{{workspace}}}:{part}" for part in ("connections", "counts", "names", "leases")]


def _online(answer: Any) -> list[Online]:
    counts, names = ({pairs[i]: pairs[i + 1] for i in range(0, len(pairs), 2)} for pairs in answer)
    return [
        Online(user=UUID(user.decode()), name=json.loads(names[user]), connections=int(count))
        for user, count in sorted(counts.items())
    ]
