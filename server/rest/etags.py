"""Strong ETags and the preconditions that name them (RFC 9110, section 13)."""

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
    """Return the opaque tag of an entity: its revision, and the caller's role where the answer depends on it."""
    return f"{revision}-{role.lower()}" if role else str(revision)


def unchanged(request: web.Request, tag: str) -> bool:
    """Return whether ``If-None-Match`` names this tag, by weak comparison."""
    header = _header(request, hdrs.IF_NONE_MATCH)
    return header == "*" or tag in (value for value, _ in _tags(header or ""))


@dataclass(frozen=True)
class Preconditions:
    """What a request that changes a thing demands of the thing's current tag."""

    match: frozenset[str] | None
    """The tag must be one of these; None where any will do."""
    none_match: frozenset[str]
    """The tag must be none of these."""

    def hold_for(self, *tags: str) -> bool:
        """Return whether a thing with this tag, or with several of different kinds, meets them."""
        return (self.match is None or not self.match.isdisjoint(tags)) and self.none_match.isdisjoint(tags)

    def revisions(self, role: str) -> Revisions | None:
        """Return the revisions that meet them, for the WHERE clause of a write; None for all.

        Raises:
            PreconditionFailed: none can.
        """
        unwanted = _revisions(self.none_match, role)
        if self.match is None:
            return _all_but(unwanted) if unwanted else None
        wanted = _revisions(self.match, role) - unwanted
        if not wanted:
            raise changed()
        return [Range(revision, revision, upper_inc=True) for revision in sorted(wanted)]


def preconditions(request: web.Request) -> Preconditions:
    """Return what ``If-Match`` (strong comparison) and ``If-None-Match`` (weak comparison) demand.

    A header that cannot be read is a condition that nothing meets (``If-Match``) or everything (``If-None-Match``).

    Raises:
        PreconditionFailed: no thing that exists meets them.
    """
    match, none_match = _header(request, hdrs.IF_MATCH), _header(request, hdrs.IF_NONE_MATCH)
    if none_match == "*":
        raise changed()
    wanted = None
    if match is not None and match != "*":
        wanted = frozenset(value for value, weak in _tags(match) if not weak)
        if not wanted:
            raise changed()
    return Preconditions(wanted, frozenset(value for value, _ in _tags(none_match or "")))


def expected_revisions(request: web.Request, role: str = "") -> Revisions | None:
    """Return the revisions at which the request may change the thing; None for all.

    Raises:
        PreconditionFailed: there are none.
    """
    return preconditions(request).revisions(role)


def untagged(request: web.Request) -> None:
    """Evaluate the preconditions for a thing that has no tag.

    Raises:
        PreconditionFailed: they do not hold.
    """
    if not preconditions(request).hold_for():
        raise changed()


def changed() -> PreconditionFailed:
    return PreconditionFailed("The resource does not meet If-Match or If-None-Match")


def lost(revisions: Revisions | None) -> ServiceError:
    """Return why a conditional write found no row: another revision, or none at all."""
    return NotFound("It is gone") if revisions is None else changed()


def _header(request: web.Request, name: str) -> str | None:
    """Its lines as one (RFC 9110, section 5.3); None where there is none."""
    lines = request.headers.getall(name, None)
    return None if lines is None else ", ".join(lines).strip()


def _tags(header: str) -> Iterator[tuple[str, bool]]:
    """The opaque tags of a list, and whether each is weak, up to the first that cannot be read."""
    for found in LIST_QUOTED_ETAG_RE.finditer(header):
        if found[4] is not None:
            return
        yield found[3], found[2] is not None


def _revisions(tags: frozenset[str], role: str) -> set[int]:
    """The revisions whose tags these are, character by character: ``01-owner`` is no revision's."""
    numbers = (tag.partition("-")[0] for tag in tags)
    revisions = {int(number) for number in numbers if number.isdecimal() and len(number) <= _MAX_DIGITS}
    return {revision for revision in revisions if etag(revision, role) in tags}


def _all_but(unwanted: set[int]) -> Revisions:
    edges = [None, *sorted(unwanted), None]
    return [Range(low, high, lower_inc=False) for low, high in pairwise(edges)]
