"""Validation of addresses, and keys that are equal for equal addresses."""

import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.auth import email_addresses
from server.auth.email_addresses import InvalidAddressError, key, parse

TEXTS = st.one_of(
    st.text(max_size=260),
    st.emails(),
    st.builds(
        "{}@{}.{}".format, st.text(min_size=1, max_size=70), st.text(max_size=70), st.sampled_from(["org", "рф"])
    ),
)
DOMAINS = st.text(
    alphabet=st.characters(categories=["Ll", "Lu", "Lo", "Mn", "Nd"], max_codepoint=0x3FFF), min_size=1, max_size=12
)


@given(TEXTS)
def test_any_text_is_an_ascii_address_or_rejected_with_a_reason(text: str) -> None:
    try:
        address, reason = parse(text), "none"
    except InvalidAddressError as error:
        address, reason = "", str(error)
    assert 0 < len(reason) <= email_addresses.MAX_REASON_LENGTH
    if address:
        assert address.isascii()
        assert len(address) <= 254
        assert parse(address) == address
        assert key(address) == key(text) == address.lower()


@given(TEXTS)
def test_key_of_any_text_is_its_own_key(text: str) -> None:
    assert key(key(text)) == key(text)
    assert key(f" {text}\n") == key(text)
    assert len(key(text)) <= 512  # the limit of the column
    if text.strip().isascii():
        assert key(text) == text.strip().lower()  # as the migration computes it in SQL


@given(DOMAINS)
def test_domain_has_one_key_in_unicode_and_in_ascii(label: str) -> None:
    try:
        address = parse(f"ada@{label}.example")
    except InvalidAddressError:
        assume(False)
        return
    domain = address.partition("@")[2]
    assert key(f"ada@{label}.example") == key(f"ADA@{domain.upper()}") == address


@pytest.mark.parametrize("text", ["mi\u212ae@x.example", "mi\uff4be@x.example", "\u017fam@x.example"])
def test_a_look_alike_has_a_key_of_its_own(text: str) -> None:
    """In the domain such characters are mapped, as a browser maps them."""
    assert not key(text).isascii()
    assert parse(f"ada@{text.partition('@')[0]}.example").isascii()


@pytest.mark.parametrize("local", ["Jürgen", "J\u030canko", "ΑΔΑΣ", "\u0130van", "ÅÅ\u0323"])
def test_old_local_part_has_one_key_in_every_spelling(local: str) -> None:
    spellings = [f"{local}@x.example", f"{local.lower()}@X.example"]
    spellings += [unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in spellings]
    assert len({key(text) for text in spellings}) == 1


@pytest.mark.parametrize(
    "text", ["", "@", "ada", "ada@", "@x.org", "Ada <ada@x.org>", '"a b"@x.org', "ada@[127.0.0.1]", "ada@localhost"]
)
def test_invalid_address_of_a_new_account_is_rejected(text: str) -> None:
    with pytest.raises(InvalidAddressError):
        parse(text)


@pytest.mark.parametrize("text", ["a@" + "b." * 500_000, "ä" * 1_000_000, "a@" + "ä." * 500_000])
def test_long_text_is_rejected_before_parsing(text: str) -> None:
    with pytest.raises(InvalidAddressError, match="Longer than maximum length 254"):
        parse(text)
    assert key(text) == text.lower()  # the library would take minutes
