"""E-mail addresses: validation, and keys that are equal for equal addresses.

Syntax is RFC 5321 and 5322 without quoted local parts, domains are IDNA 2008 with the mapping of UTS #46; both as
email-validator and idna implement them. The functions are pure: no DNS, no store.
"""

import unicodedata

import email_validator
from email_validator import EmailNotValidError, ValidatedEmail, validate_email

MAX_LENGTH = 254  # RFC 5321, section 4.5.3.1.3, less the angle brackets
MAX_REASON_LENGTH = 200  # a reason may name each character that is not allowed

# Closed networks use .local and .test. Only the mail server knows whether mail arrives there.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()


class InvalidAddressError(ValueError):
    """The text is not an address; the message states the reason to a client."""


def parse(text: str) -> str:
    """Return the address for a new account or invitation: ASCII only, the domain in lower case.

    Surrounding space is trimmed; the local part stays as typed, at most 64 bytes of ASCII.

    Raises:
        InvalidAddressError: the text is no such address.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:  # the library inspects every character
        raise InvalidAddressError(f"Longer than maximum length {MAX_LENGTH}.")
    try:
        validated = validate_email(text, allow_smtputf8=False, strict=True, check_deliverability=False)
    except EmailNotValidError as error:
        raise InvalidAddressError(str(error)[:MAX_REASON_LENGTH]) from None
    return f"{_local_part(text)}@{validated.ascii_domain}"


def key(text: str) -> str:
    """Return the key for comparing addresses (``email_key`` in the database) of any text; never raise.

    Two spellings of one mailbox have one key: the domain counts in its ASCII form, the local part in lower case. The
    key of an ASCII address is that address in lower case, as migration 0007 computes it in SQL.

    Accounts that are older than these rules may have other addresses. A local part that is not ASCII counts in lower
    case and NFC, unless the result is ASCII: U+212A must not become k. A text that is no address is its own key.
    """
    text = text.strip()
    if text.isascii():
        return text.lower()
    domain = _ascii_domain(text)
    if domain is None:
        return text
    local = _local_part(text)
    folded = unicodedata.normalize("NFC", local.lower())
    if folded.isascii() and not local.isascii():
        folded = local
    return f"{folded}@{domain}"


def _ascii_domain(text: str) -> str | None:
    """Return the ASCII form of an address's domain, or None if the text is no address of any kind."""
    if len(text) > MAX_LENGTH:
        return None
    try:
        validated: ValidatedEmail = validate_email(
            text, allow_quoted_local=True, globally_deliverable=False, check_deliverability=False
        )
    except EmailNotValidError:
        return None
    return validated.ascii_domain


def _local_part(text: str) -> str:
    return text.rpartition("@")[0]
