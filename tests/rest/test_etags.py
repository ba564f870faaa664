"""Preconditions by RFC 9110, section 13: matching of tags, and the revisions that a write may change."""

import pytest
from aiohttp import hdrs
from aiohttp.test_utils import make_mocked_request
from aiohttp.web import Request
from asyncpg import Range

from server.errors import NotFound, PreconditionFailed
from server.rest.etags import (
    Preconditions,
    check_preconditions_without_etag,
    conditional_write_error,
    etag,
    expected_revisions,
    is_not_modified,
    precondition_failed,
    preconditions,
)


def request_with(**headers: str) -> Request:
    """Return a request with these headers: ``if_match='"1"'``."""
    return make_mocked_request("GET", "/", {name.replace("_", "-"): value for name, value in headers.items()})


def request_with_repeated(name: str, *values: str) -> Request:
    request = request_with()
    return request.clone(headers=[(name, value) for value in values])  # type: ignore[arg-type]


def holds(revision: int, header: str, *, role: str = "OWNER", name: str = "if_match") -> bool:
    """Return whether a write would change this revision, as its WHERE clause decides."""
    try:
        revisions = expected_revisions(request_with(**{name: header}), role)
    except PreconditionFailed:
        return False
    return revisions is None or any(contains(revision_range, revision) for revision_range in revisions)


def contains(span: Range, value: int) -> bool:
    above = span.lower is None or value > span.lower or (span.lower_inc and value == span.lower)
    below = span.upper is None or value < span.upper or (span.upper_inc and value == span.upper)
    return above and below


def test_a_tag_is_the_revision_and_the_role() -> None:
    assert etag(7) == "7"
    assert etag(7, "OWNER") == "7-owner"


def test_both_conditions_must_hold_for_a_revision() -> None:
    both = request_with(if_match='"1", "2"', if_none_match='"2", "3"')
    assert expected_revisions(both) == [Range(1, 1, upper_inc=True)]


def test_revision_beyond_a_bigint_is_no_revision() -> None:
    with pytest.raises(PreconditionFailed):
        expected_revisions(request_with(if_match=f'"{10**18}"'))
    assert expected_revisions(request_with(if_none_match=f'"{10**18}"')) is None


MATCHING = ['"7-owner"', '"1", "7-owner"', '"7-owner","9-owner"', "*", ' "7-owner" ', '"7-owner", W/"7-owner"']
NOT_MATCHING = {
    "weak": 'W/"7-owner"',
    "zeros before": '"07-owner"',
    "another revision": '"8-owner"',
    "another role": '"7-viewer"',
    "no role": '"7"',
    "upper case": '"7-OWNER"',
    "other digits": '"٧-owner"',
    "superscript": '"⁷-owner"',
    "a sign": '"+7-owner"',
    "space": '" 7-owner"',
    "unquoted": "7-owner",
    "empty": "",
    "half quoted": '"7-owner',
    "more behind it": '"7-owner-x"',
    "beyond a bigint": '"' + "7" * 30 + '-owner"',
    "star in quotes": '"*"',
    "star in a list": '*, "1"',
}


@pytest.mark.parametrize("header", MATCHING)
def test_if_match_accepts_the_exact_tag(header: str) -> None:
    assert holds(7, header)
    assert holds(8, header) is (header == "*")


@pytest.mark.parametrize("header", NOT_MATCHING.values(), ids=list(NOT_MATCHING))
def test_if_match_accepts_no_other_tag(header: str) -> None:
    assert not holds(7, header)


def test_if_match_accepts_every_listed_revision() -> None:
    assert [revision for revision in range(12) if holds(revision, '"3-owner", "9-owner", W/"5-owner"')] == [3, 9]


def test_list_ends_at_the_first_malformed_tag() -> None:
    assert holds(3, '"3-owner", nonsense, "9-owner"')
    assert not holds(9, '"3-owner", nonsense, "9-owner"')


def test_repeated_headers_are_one_list() -> None:
    request = request_with_repeated(hdrs.IF_MATCH, '"3-owner"', '"9-owner"')
    revisions = expected_revisions(request, "OWNER")
    assert revisions is not None
    assert [revision_range.lower for revision_range in revisions] == [3, 9]


@pytest.mark.parametrize("digits", [17, 18])
def test_the_largest_revisions_can_be_named(digits: int) -> None:
    assert holds(int("9" * digits), f'"{"9" * digits}-owner"')


def test_no_header_is_no_condition() -> None:
    assert expected_revisions(request_with(), "OWNER") is None
    assert preconditions(request_with()) == Preconditions(None, frozenset())


def test_if_none_match_excludes_the_listed_revisions() -> None:
    for header in ('"3-owner", W/"9-owner"', '"3-owner","9-owner", "4-viewer", "05-owner", "5"'):
        accepted = [revision for revision in range(1, 12) if holds(revision, header, name="if_none_match")]
        assert accepted == [1, 2, 4, 5, 6, 7, 8, 10, 11]
    assert not holds(3, "*", name="if_none_match")  # the resource exists
    assert holds(3, "nonsense", name="if_none_match")


def test_both_conditions_must_hold() -> None:
    request = request_with(if_match='"3-owner", "9-owner"', if_none_match='"9-owner"')
    [left] = expected_revisions(request, "OWNER") or []
    assert (left.lower, left.upper) == (3, 3)
    with pytest.raises(PreconditionFailed):
        expected_revisions(request_with(if_match='"9-owner"', if_none_match='"9-owner"'), "OWNER")


def test_resource_with_several_tags_meets_a_condition_by_any_of_them() -> None:
    if_match = preconditions(request_with(if_match='"a", "b"'))
    assert if_match.hold_for("b", "c")
    assert not if_match.hold_for("c", "d")
    if_none_match = preconditions(request_with(if_none_match='"b"'))
    assert not if_none_match.hold_for("b", "c")
    assert if_none_match.hold_for("c", "d")


def test_resource_without_a_tag_meets_conditions_that_name_no_tag() -> None:
    for request in (request_with(), request_with(if_match="*"), request_with(if_none_match='"1"')):
        check_preconditions_without_etag(request)
    for request in (request_with(if_match='"1"'), request_with(if_match=""), request_with(if_none_match="*")):
        with pytest.raises(PreconditionFailed):
            check_preconditions_without_etag(request)


@pytest.mark.parametrize("header", ['"7-owner"', 'W/"7-owner"', '"1", W/"7-owner"', "*", " * "])
def test_if_none_match_compares_weakly_for_reads(header: str) -> None:
    assert is_not_modified(request_with(if_none_match=header), "7-owner")


@pytest.mark.parametrize("header", ['"07-owner"', '"7-viewer"', "7-owner", '"', "", '"x", nonsense, "7-owner"'])
def test_other_tags_do_not_match_if_none_match(header: str) -> None:
    assert not is_not_modified(request_with(if_none_match=header), "7-owner")
    assert not is_not_modified(request_with(), "7-owner")


def test_write_that_found_no_row_gets_the_reason() -> None:
    assert isinstance(conditional_write_error(None), NotFound)
    assert isinstance(conditional_write_error([Range(1, 1, upper_inc=True)]), PreconditionFailed)
    assert isinstance(precondition_failed(), PreconditionFailed)
