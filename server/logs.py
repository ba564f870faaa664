"""Structured logs on stdout: facts with fields, as text in development and JSON elsewhere."""

import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog
from redis.exceptions import RedisError

from server.settings import Settings


def configure(settings: Settings) -> None:
    """Configure logging, once at the start of a process. Libraries log through it, too, from level warning up."""
    level = getattr(logging, settings.log_level.upper())
    structlog.configure(
        processors=[_add_context, *_renderers(settings.log_format)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_logger_factory(settings.log_format),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_add_context],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(settings.log_format),
                _decode,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    for library in ("saq", "asyncpg.pool"):
        logging.getLogger(library).addFilter(_flatten_traceback)
    # It logs unknown subprotocols as warnings, and one of them may contain an access token.
    logging.getLogger("aiohttp.websocket").setLevel(logging.CRITICAL)


def _flatten_traceback(record: logging.LogRecord) -> bool:
    """Replace the traceback by one line: while a store is down, the libraries would log one every second."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (RedisError, OSError)):
        record.msg, record.exc_info = f"{record.getMessage()}: {error}", None
        record.args = ()
    return True


def _renderers(style: str) -> list[Any]:
    if style == "text":
        # Else structlog uses rich if it is installed, and rich prints the values of all variables.
        formatter = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), exception_formatter=formatter)]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(serializer=lambda value, **_: orjson.dumps(value, default=str)),
    ]


def _logger_factory(style: str) -> Any:
    if style == "text":
        return structlog.WriteLoggerFactory(file=sys.stdout)
    return structlog.BytesLoggerFactory(file=sys.stdout.buffer)


def _decode(_: Any, __: str, line: Any) -> str:
    return line.decode() if isinstance(line, bytes) else str(line)


def _add_context(_: Any, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add context, level and timestamp; drop fields that are None.

    It is one processor, because four separate ones doubled the cost of a log line.
    """
    line: MutableMapping[str, Any] = structlog.contextvars.get_contextvars()
    line.update({key: value for key, value in event.items() if value is not None})
    line["level"], line["timestamp"] = level, f"{datetime.now(UTC).isoformat(timespec='microseconds')[:-6]}Z"
    return line
