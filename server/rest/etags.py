"""Strong ETags (RFC 9110): an entity's revision, and the caller's role where the answer depends on it."""

from aiohttp import hdrs, web
from aiohttp.helpers import ETag

from server.errors import NotFound, PreconditionFailed, ServiceError


def etag(revision: int, role: str = "") -> str:
    return f"{revision}-{role.lower()}" if role else str(revision)


def unchanged(request: web.Request, tag: str) -> bool:
    """Whether ``If-None-Match`` names this tag (weak comparison, as RFC 9110 has it)."""
    return _is_any(request, hdrs.IF_NONE_MATCH) or any(each.value == tag for each in request.if_none_match or ())


def expected_revisions(request: web.Request, role: str = "") -> list[int] | None:
    """The revisions that ``If-Match`` accepts; None where any will do.

    Raises:
        PreconditionFailed: no tag in the header could be this caller's.
    """
    if hdrs.IF_MATCH not in request.headers or _is_any(request, hdrs.IF_MATCH):
        return None
    # What cannot be read is a condition all the same, which nothing meets.
    accepted = [revision for each in request.if_match or () if (revision := _revision(each, role)) is not None]
    if not accepted:
        raise changed()
    return accepted


def untagged(request: web.Request) -> None:
    """For a thing that has no ETag: no tag in ``If-Match`` can be its own.

    Raises:
        PreconditionFailed: the header names one.
    """
    if expected_revisions(request) is not None:
        raise changed()


def changed() -> PreconditionFailed:
    return PreconditionFailed("It has changed since you read it")


def lost(revisions: list[int] | None) -> ServiceError:
    """Why a conditional write found no row: another revision, or it is gone."""
    return NotFound("It is gone") if revisions is None else changed()


def _is_any(request: web.Request, header: str) -> bool:
    return request.headers.get(header, "").strip() == "*"


def _revision(tag: ETag, role: str) -> int | None:
    revision, _, of = tag.value.partition("-")
    if tag.is_weak or of != role.lower() or not revision.isdecimal() or len(revision) > 18:
        return None
    return int(revision)
