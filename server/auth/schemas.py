"""Schemas of accounts, sessions and tokens for requests and responses."""

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, validate

from server.auth import email_addresses
from server.auth.passwords import MAX_RAW_PASSWORD_CHARACTERS, normalize
from server.fields import HttpUrl, Id, Name, Schema, Text, Timestamp

MIN_PASSWORD_CHARACTERS, MAX_PASSWORD_CHARACTERS = 8, 128
_ADDRESS = {"example": "ada@example.org", "maxLength": email_addresses.MAX_LENGTH}


class Email(fields.String):
    """The address of a new account, in its canonical form."""

    def __init__(self, **options: Any) -> None:
        super().__init__(metadata={"format": "email", **_ADDRESS}, **options)

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> str:
        try:
            return email_addresses.parse(super()._deserialize(value, attr, data, **options))
        except email_addresses.InvalidAddressError as error:
            raise ValidationError(str(error)) from None


class AnyEmail(Text):
    """An address as it was typed, trimmed: older accounts may have addresses that today's rules reject."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_length=email_addresses.MAX_LENGTH, trim=True, metadata=_ADDRESS, **options)


def check_password_strength(password: Any) -> None:
    """Check a new password in the form that is hashed, so that the result does not depend on the keyboard."""
    too_long = f"Longer than maximum length {MAX_PASSWORD_CHARACTERS}."
    validate.Length(max=MAX_RAW_PASSWORD_CHARACTERS, error=too_long)(password)
    normal = normalize(password)
    validate.Length(MIN_PASSWORD_CHARACTERS, MAX_PASSWORD_CHARACTERS)(normal)
    kinds = (str.isupper, str.islower, str.isdigit)
    if not all(any(map(kind, normal)) for kind in kinds):
        raise ValidationError("Must contain an upper-case letter, a lower-case letter and a digit.")


def new_password_field(**options: Any) -> fields.String:
    return fields.String(
        validate=check_password_strength,
        metadata={
            "example": "Lovelace1815",
            "minLength": MIN_PASSWORD_CHARACTERS,
            "maxLength": MAX_PASSWORD_CHARACTERS,
        },
        **options,
    )


def existing_password_field() -> fields.String:
    """Return a field for an existing password: only its length is limited, bcrypt checks the rest."""
    length = validate.Length(max=MAX_RAW_PASSWORD_CHARACTERS)
    return fields.String(required=True, validate=length, metadata={"example": "Lovelace1815"})


def token_field(**options: Any) -> fields.String:
    return fields.String(validate=validate.Length(1, 256), **options)


def user_name_field(**options: Any) -> Name:
    return Name(2, 100, metadata={"example": "Ada Lovelace"}, **options)


class Register(Schema):
    email = Email(required=True)
    password = new_password_field(required=True)
    name = user_name_field(required=True)
    invitation_token = token_field(load_default=None, metadata={"description": "joins the project of that invitation"})


class Login(Schema):
    email = AnyEmail(required=True)
    password = existing_password_field()


class Refresh(Schema):
    refresh_token = token_field(required=True)


class Logout(Schema):
    refresh_token = token_field(load_default=None)


class ProfileChange(Schema):
    name = user_name_field()
    avatar_url = HttpUrl(allow_none=True, metadata={"maxLength": 2048})


class AccountDeletion(Schema):
    password = existing_password_field()


class PasswordChange(Schema):
    current_password = existing_password_field()
    new_password = new_password_field(required=True)


class Person(Schema):
    """A user as others see them."""

    id = Id()
    email = fields.String()
    name = fields.String(metadata={"example": "Ada Lovelace"})
    avatar_url = fields.String(allow_none=True)


class UserSchema(Person):
    created_at = Timestamp()
    updated_at = Timestamp()


class TokenPair(Schema):
    access_token = fields.String()
    refresh_token = fields.String()
    token_type = fields.Constant("Bearer", metadata={"example": "Bearer"})
    expires_in = fields.Integer(metadata={"description": "seconds"})


class SignedIn(TokenPair):
    user = fields.Nested(UserSchema)


class Session(Schema):
    id = Id()
    created_at = Timestamp()
    last_used_at = Timestamp()
    expires_at = Timestamp()
    user_agent = fields.String()
    ip = fields.String()
    current = fields.Boolean()


class Ticket(Schema):
    ticket = fields.String()
    expires_in = fields.Integer(metadata={"description": "seconds", "example": 30})
