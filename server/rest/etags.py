"""Strong ETags and the preconditions that name them (RFC 9110, section 13): optimistic concurrency control."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from aiohttp import hdrs, web
from aiohttp.helpers import LIST_QUOTED_ETAG_RE
from asyncpg import Range

from server.errors import NotFound, PreconditionFailed, ServiceError
from server.postgres import Revisions

_MAX_DIGITS = 18  # of a revision in a tag: a bigint holds it


def etag(revision: int, role: str = "") -> str:
    """Return the opaque tag of an entity: its revision, and the caller's role if the response depends on it."""
    return f"{revision}-{role.lower()}" if role else str(revision)


def is_not_modified(request: web.Request, tag: str) -> bool:
    """Return whether ``If-None-Match`` names this tag, by weak comparison."""
    header = _header(request, hdrs.IF_NONE_MATCH)
    return header == "*" or tag in (value for value, _ in _tags(header or ""))


@dataclass(frozen=True)
class Preconditions:
    """The conditions of a write on the current tag of the resource."""

    match: frozenset[str] | None
    """The tag must be one of these; None for any tag."""
    none_match: frozenset[str]
    """The tag must be none of these."""

    def hold_for(self, *tags: str) -> bool:
        """Return whether a resource with these tags, one for each kind of tag it has, meets the conditions."""
        return (self.match is None or not self.match.isdisjoint(tags)) and self.none_match.isdisjoint(tags)

    def revisions(self, role: str) -> Revisions | None:
        """Return the revisions that meet the conditions, for the WHERE clause of a write; None for all.

        Raises:
            PreconditionFailed: no revision can meet them.
        """
        excluded = _revisions(self.none_match, role)
        if self.match is None:
            return _ranges_without(excluded) if excluded else None
        accepted = _revisions(self.match, role) - excluded
        if not accepted:
            raise precondition_failed()
        return [Range(revision, revision, upper_inc=True) for revision in sorted(accepted)]


def preconditions(request: web.Request) -> Preconditions:
    """Return the conditions in ``If-Match`` (strong comparison) and ``If-None-Match`` (weak comparison).

    A malformed header is a condition that no tag meets (``If-Match``) or that every tag meets (``If-None-Match``).

    Raises:
        PreconditionFailed: no existing resource meets the conditions.
    """
    match, none_match = _header(request, hdrs.IF_MATCH), _header(request, hdrs.IF_NONE_MATCH)
    if none_match == "*":
        raise precondition_failed()
    accepted = None
    if match is not None and match != "*":
        accepted = frozenset(value for value, weak in _tags(match) if not weak)
        if not accepted:
            raise precondition_failed()
    return Preconditions(accepted, frozenset(value for value, _ in _tags(none_match or "")))


def expected_revisions(request: web.Request, role: str = "") -> Revisions | None:
    """Return the revisions at which the request may change the resource; None for all.

    Raises:
        PreconditionFailed: there are none.
    """
    return preconditions(request).revisions(role)


def check_preconditions_without_etag(request: web.Request) -> None:
    """Check the preconditions for a resource without an ETag.

    Raises:
        PreconditionFailed: they do not hold.
    """
    if not preconditions(request).hold_for():
        raise precondition_failed()


def precondition_failed() -> PreconditionFailed:
    return PreconditionFailed("The resource does not meet If-Match or If-None-Match")


def conditional_write_error(revisions: Revisions | None) -> ServiceError:
    """Return the error for a conditional write that found no row: another revision, or no such row."""
    return NotFound("Resource not found") if revisions is None else precondition_failed()


def _header(request: web.Request, name: str) -> str | None:
    """Return the lines of a header as one (RFC 9110, section 5.3), or None without the header."""
    lines = request.headers.getall(name, None)
    return None if lines is None else ", ".join(lines).strip()


def _tags(header: str) -> Iterator[tuple[str, bool]]:
    """Yield the opaque tags of a list, and whether each is weak, up to the first malformed one."""
    for tag_match in LIST_QUOTED_ETAG_RE.finditer(header):
        if tag_match[4] is not None:
            return
        yield tag_match[3], tag_match[2] is not None


def _revisions(tags: frozenset[str], role: str) -> set[int]:
    """Return the revisions whose exact tags these are: ``01-owner`` is not the tag of any revision."""
    numbers = (tag.partition("-")[0] for tag in tags)
    revisions = {int(number) for number in numbers if number.isdecimal() and len(number) <= _MAX_DIGITS}
    return {revision for revision in revisions if etag(revision, role) in tags}


def _ranges_without(excluded: set[int]) -> Revisions:
    edges = [None, *sorted(excluded), None]
    return [Range(low, high, lower_inc=False) for low, high in pairwise(edges)]
