"""What accounts look like from outside."""

from typing import Any

from marshmallow import ValidationError, fields, validate

from server.fields import Email, Id, Schema, Text, Time, WebAddress


def strong(password: Any) -> None:
    validate.Length(8, 128)(password)
    kinds = (str.isupper, str.islower, str.isdigit)
    if not all(any(map(kind, password)) for kind in kinds):
        raise ValidationError("Must contain an upper-case letter, a lower-case letter and a digit.")


def email(**options: Any) -> Email:
    return Email(metadata={"example": "ada@example.org", "maxLength": 254}, **options)


def password(**options: Any) -> fields.String:
    return fields.String(
        validate=strong, metadata={"example": "Lovelace1815", "minLength": 8, "maxLength": 128}, **options
    )


def any_password() -> fields.String:
    """One that exists already: whether it fits is for bcrypt to say."""
    return fields.String(required=True, validate=validate.Length(max=128), metadata={"example": "Lovelace1815"})


def secret(**options: Any) -> fields.String:
    return fields.String(validate=validate.Length(1, 256), **options)


def user_name(**options: Any) -> Text:
    return Text(2, 100, metadata={"example": "Ada Lovelace"}, **options)


class Register(Schema):
    email = email(required=True)
    password = password(required=True)
    name = user_name(required=True)
    invitation_token = secret(load_default=None, metadata={"description": "joins that project at once"})


class Login(Schema):
    email = fields.String(required=True, validate=validate.Length(max=254), metadata={"example": "ada@example.org"})
    password = any_password()


class Refresh(Schema):
    refresh_token = secret(required=True)


class Logout(Schema):
    refresh_token = secret(load_default=None)


class ProfileChange(Schema):
    name = user_name()
    avatar_url = WebAddress(allow_none=True, metadata={"maxLength": 2048})


class AccountDeletion(Schema):
    password = any_password()


class PasswordChange(Schema):
    current_password = any_password()
    new_password = password(required=True)


class Person(Schema):
    """A user as others see them."""

    id = Id()
    email = fields.String()
    name = fields.String(metadata={"example": "Ada Lovelace"})
    avatar_url = fields.String(allow_none=True)


class User(Person):
    created_at = Time()
    updated_at = Time()


class TokenPair(Schema):
    access_token = fields.String()
    refresh_token = fields.String()
    token_type = fields.Constant("Bearer", metadata={"example": "Bearer"})
    expires_in = fields.Integer(metadata={"description": "seconds"})


class SignedIn(TokenPair):
    user = fields.Nested(User)


class Session(Schema):
    id = Id()
    created_at = Time()
    last_used_at = Time()
    expires_at = Time()
    user_agent = fields.String()
    ip = fields.String()
    current = fields.Boolean()


class Ticket(Schema):
    ticket = fields.String()
    expires_in = fields.Integer(metadata={"description": "seconds", "example": 30})
