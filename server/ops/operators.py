"""Authentication of operators by Basic credentials of their own: OPS_USERNAME and OPS_PASSWORD."""

import base64
import hmac

from aiohttp import hdrs, web
from aiohttp_basicauth import BasicAuthMiddleware

from server.settings import Settings


class OperatorAuth(BasicAuthMiddleware):  # type: ignore[misc]
    """Basic authentication in constant time: its duration does not reveal how much of the credentials is right."""

    async def authenticate(self, request: web.Request) -> bool:
        # The parent's method uses a deprecated class of aiohttp.
        scheme, _, encoded = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        try:
            username, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except ValueError:
            return False
        return scheme.lower() == "basic" and await self.check_credentials(username, password, request)

    async def check_credentials(self, username: str, password: str, request: web.Request) -> bool:  # noqa: ARG002
        return _equal_in_constant_time(username, self.username) & _equal_in_constant_time(password, self.password)


def has_credentials(settings: Settings) -> bool:
    return bool(settings.ops_username and settings.ops_password)


def disabled(settings: Settings) -> bool:
    """Return whether the operators' endpoints are off: in production, without credentials, they would be public."""
    return settings.production and not has_credentials(settings)


def basic_auth(settings: Settings) -> list[OperatorAuth]:
    """Return the middleware that requires the credentials; an empty list if none are set."""
    if not has_credentials(settings):
        return []
    return [OperatorAuth(username=settings.ops_username, password=settings.ops_password, realm="operators")]


def _equal_in_constant_time(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())
