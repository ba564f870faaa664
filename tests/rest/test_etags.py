"""Preconditions by RFC 9110, section 13: which tags match, and what a write may then change."""

import pytest
from aiohttp import hdrs
from aiohttp.test_utils import make_mocked_request
from aiohttp.web import Request
from asyncpg import Range

from server.errors import NotFound, PreconditionFailed
from server.rest.etags import Preconditions, changed, etag, expected_revisions, lost, preconditions, unchanged, untagged


def asking(**headers: str) -> Request:
    """``if_match='"1"'``: a request with this header."""
    return make_mocked_request("GET", "/", {name.replace("_", "-"): value for name, value in headers.items()})


def asking_twice(name: str, *values: str) -> Request:
    request = asking()
    return request.clone(headers=[(name, value) for value in values])  # type: ignore[arg-type]


def holds(revision: int, header: str, *, role: str = "OWNER", name: str = "if_match") -> bool:
    """Whether a write at this revision would be made, as its WHERE clause has it."""
    try:
        revisions = expected_revisions(asking(**{name: header}), role)
    except PreconditionFailed:
        return False
    return revisions is None or any(contains(each, revision) for each in revisions)


def contains(found: Range, value: int) -> bool:
    above = found.lower is None or value > found.lower or (found.lower_inc and value == found.lower)
    below = found.upper is None or value < found.upper or (found.upper_inc and value == found.upper)
    return above and below


def test_a_tag_is_the_revision_and_the_role() -> None:
    assert etag(7) == "7"
    assert etag(7, "OWNER") == "7-owner"


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
def test_if_match_takes_the_tag_itself(header: str) -> None:
    assert holds(7, header)
    assert holds(8, header) is (header == "*")


@pytest.mark.parametrize("header", NOT_MATCHING.values(), ids=list(NOT_MATCHING))
def test_if_match_takes_nothing_else(header: str) -> None:
    assert not holds(7, header)


def test_if_match_lists_every_revision_that_is_meant() -> None:
    assert [revision for revision in range(12) if holds(revision, '"3-owner", "9-owner", W/"5-owner"')] == [3, 9]


def test_a_list_ends_where_it_cannot_be_read() -> None:
    assert holds(3, '"3-owner", nonsense, "9-owner"')
    assert not holds(9, '"3-owner", nonsense, "9-owner"')


def test_headers_that_come_twice_are_one_list() -> None:
    request = asking_twice(hdrs.IF_MATCH, '"3-owner"', '"9-owner"')
    revisions = expected_revisions(request, "OWNER")
    assert revisions is not None
    assert [each.lower for each in revisions] == [3, 9]


@pytest.mark.parametrize("digits", [17, 18])
def test_the_largest_revisions_can_be_named(digits: int) -> None:
    assert holds(int("9" * digits), f'"{"9" * digits}-owner"')


def test_no_header_is_no_condition() -> None:
    assert expected_revisions(asking(), "OWNER") is None
    assert preconditions(asking()) == Preconditions(None, frozenset())


def test_if_none_match_leaves_out_what_it_names() -> None:
    for header in ('"3-owner", W/"9-owner"', '"3-owner","9-owner", "4-viewer", "05-owner", "5"'):
        found = [revision for revision in range(1, 12) if holds(revision, header, name="if_none_match")]
        assert found == [1, 2, 4, 5, 6, 7, 8, 10, 11]
    assert not holds(3, "*", name="if_none_match")  # it exists
    assert holds(3, "nonsense", name="if_none_match")


def test_both_conditions_must_hold() -> None:
    request = asking(if_match='"3-owner", "9-owner"', if_none_match='"9-owner"')
    [left] = expected_revisions(request, "OWNER") or []
    assert (left.lower, left.upper) == (3, 3)
    with pytest.raises(PreconditionFailed):
        expected_revisions(asking(if_match='"9-owner"', if_none_match='"9-owner"'), "OWNER")


def test_a_thing_of_several_tags_meets_a_condition_by_any_of_them() -> None:
    demanded = preconditions(asking(if_match='"a", "b"'))
    assert demanded.hold_for("b", "c")
    assert not demanded.hold_for("c", "d")
    refused = preconditions(asking(if_none_match='"b"'))
    assert not refused.hold_for("b", "c")
    assert refused.hold_for("c", "d")


def test_a_thing_without_a_tag_meets_what_names_no_tag() -> None:
    for request in (asking(), asking(if_match="*"), asking(if_none_match='"1"')):
        untagged(request)
    for request in (asking(if_match='"1"'), asking(if_match=""), asking(if_none_match="*")):
        with pytest.raises(PreconditionFailed):
            untagged(request)


@pytest.mark.parametrize("header", ['"7-owner"', 'W/"7-owner"', '"1", W/"7-owner"', "*", " * "])
def test_a_reader_that_has_it_is_told_so_by_weak_comparison(header: str) -> None:
    assert unchanged(asking(if_none_match=header), "7-owner")


@pytest.mark.parametrize("header", ['"07-owner"', '"7-viewer"', "7-owner", '"', "", '"x", nonsense, "7-owner"'])
def test_a_reader_that_has_another_gets_it(header: str) -> None:
    assert not unchanged(asking(if_none_match=header), "7-owner")
    assert not unchanged(asking(), "7-owner")


def test_a_write_that_found_no_row_says_why() -> None:
    assert isinstance(lost(None), NotFound)
    assert isinstance(lost([Range(1, 1, upper_inc=True)]), PreconditionFailed)
    assert isinstance(changed(), PreconditionFailed)
