"""Marks: decorators that only set an attribute of a handler; middlewares and the OpenAPI document act on it."""

import enum
from collections.abc import Callable
from typing import Any, TypeVar

H = TypeVar("H", bound=Callable[..., Any])


def public(handler: H) -> H:
    """Mark a handler as public. Without this mark a route requires a signed-in user."""
    handler.__public__ = True  # type: ignore[attr-defined]
    return handler


def is_public(handler: Callable[..., Any]) -> bool:
    return getattr(handler, "__public__", False)


def error_codes(*codes: str) -> Callable[[H], H]:
    """Mark a handler with its specific error codes, for the OpenAPI document; other marks imply the general ones."""

    def mark(handler: H) -> H:
        handler.__error_codes__ = codes  # type: ignore[attr-defined]
        return handler

    return mark


def error_codes_of(handler: Callable[..., Any]) -> tuple[str, ...]:
    return getattr(handler, "__error_codes__", ())


class Idempotency(enum.Enum):
    """The way in which a handler honours the idempotency key."""

    BY_TRANSACTION = enum.auto()  # see server/rest/idempotency.py
    BY_HANDLER = enum.auto()


def idempotent(how: Idempotency) -> Callable[[H], H]:
    """Mark a handler: a request that is repeated with its idempotency key has one effect."""

    def mark(handler: H) -> H:
        handler.__idempotency__ = how  # type: ignore[attr-defined]
        return handler

    return mark


def idempotency_of(handler: Callable[..., Any]) -> Idempotency | None:
    return getattr(handler, "__idempotency__", None)


def produces_json(handler: Callable[..., Any]) -> bool:
    """Return whether aiohttp-apispec's decorator says that the handler produces JSON."""
    return "application/json" in getattr(handler, "__apispec__", {}).get("produces", ())
