"""Parsing and encoding of the JSON text frames ``{event, data, id?}``; pure, without I/O."""

from dataclasses import dataclass
from typing import Any

from server import json
from server.errors import BadRequest, FieldError, ServiceError

SUBPROTOCOL = "collab.v1"
MAX_EVENT_LENGTH = 64
MAX_ID_LENGTH = 128


@dataclass(frozen=True)
class Frame:
    event: str
    data: dict[str, Any]
    id: str | int | float | None = None


def parse(raw: bytes | str) -> Frame:
    """Parse a client's frame.

    Raises:
        MalformedFrame: ``malformed``, or ``validation_failed`` for an integer beyond 64 bits; with the frame's id if
            it is readable.
    """
    try:
        value = json.loads(raw)
    except json.IntegerOutOfRangeError as error:
        raise _beyond_64_bits(error) from None
    except ServiceError as error:
        raise malformed(error.detail) from None
    if not isinstance(value, dict):
        raise malformed("Frame must be a JSON object")
    event, data, id = value.get("event"), value.get("data", {}), value.get("id")
    if id is not None and (isinstance(id, bool) or not isinstance(id, str | int | float)):
        raise malformed("id must be a string or a number")
    if isinstance(id, str) and len(id) > MAX_ID_LENGTH:
        raise malformed(f"id must have at most {MAX_ID_LENGTH} characters")
    if not isinstance(event, str) or len(event) > MAX_EVENT_LENGTH:
        raise malformed(f"event must be a string of at most {MAX_EVENT_LENGTH} characters", id=id)
    if data is None:
        data = {}
    if not isinstance(data, dict) or value.keys() - {"event", "data", "id"}:
        raise malformed("Frame must be {event, data, id?}, with an object as data", id=id)
    return Frame(event, data, id)


class MalformedFrame(BadRequest):
    """A frame that cannot be parsed; ``id`` is the frame's id if it was readable."""

    id: str | int | float | None = None


def malformed(detail: str, *, id: str | int | float | None = None) -> MalformedFrame:
    error = MalformedFrame(detail, code="malformed")
    error.id = id
    return error


def _beyond_64_bits(error: json.IntegerOutOfRangeError) -> MalformedFrame:
    details = [
        FieldError(field=detail["field"].removeprefix("data."), message=detail["message"]) for detail in error.details
    ]
    rejected = MalformedFrame(error.detail, code=error.code, details=details)
    id = error.value.get("id") if isinstance(error.value, dict) and details[0]["field"] != "id" else None
    if isinstance(id, str | int | float) and not isinstance(id, bool) and len(str(id)) <= MAX_ID_LENGTH:
        rejected.id = id
    return rejected


def encode(event: str, data: Any, *, id: str | int | float | None = None) -> bytes:
    """Encode one frame of the server as JSON text."""
    value = {"event": event, "data": data}
    return json.dumps(value if id is None else {**value, "id": id})


def ack(id: str | int | float, data: Any) -> bytes:
    return encode("ack", data, id=id)


def error_reply(error: ServiceError, *, id: str | int | float | None = None) -> bytes:
    data: dict[str, Any] = {"code": error.code, "message": error.detail}
    if error.details:
        data["details"] = error.details
    if error.retry_after is not None:
        data["retryAfter"] = error.retry_after
    return encode("error", data, id=id)


def websocket_frame(payload: bytes) -> bytes:
    """Encode an unmasked, final text frame (RFC 6455, section 5.2); fan-out writes it to many transports."""
    size = len(payload)
    if size < 126:
        return b"\x81" + size.to_bytes(1, "big") + payload
    if size < 1 << 16:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


def close_frame(code: int, reason: str = "") -> bytes:
    body = code.to_bytes(2, "big") + reason.encode()[:123]
    return b"\x88" + len(body).to_bytes(1, "big") + body


def close_reply(code: int) -> int:
    """Return the close code that answers the peer's code: the same, if it may be sent (RFC 6455, section 7.4).

    The peer's code is 0 if its close frame had none.
    """
    if code == 0:
        return 1000
    return code if code in _SENDABLE else 1002


_SENDABLE = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}


def pong_frame(body: bytes) -> bytes:
    return b"\x8a" + len(body).to_bytes(1, "big") + body


PING_FRAME = b"\x89\x00"
