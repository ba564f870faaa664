"""The one family of refusals, rendered once per door.

REST answers with the status and an RFC 9457 problem body, the socket with an ``error`` frame, the queue with
a failure that is not tried again. ``code`` is stable: clients rely on it.
"""

from collections.abc import Sequence
from typing import Any, TypedDict


class FieldError(TypedDict):
    field: str
    message: str


class ServiceError(Exception):
    """A refusal. ``code`` and ``detail`` are for the client; the class gives the HTTP status."""

    status = 500
    default_code = "internal"
    title = "Internal Server Error"

    def __init__(
        self,
        detail: str | None = None,
        *,
        code: str | None = None,
        details: Sequence[FieldError] = (),
        retry_after: int | None = None,
    ) -> None:
        self.detail = detail or self.title
        self.code = code or self.default_code
        self.details = list(details)
        self.retry_after = retry_after
        super().__init__(self.detail)


class BadRequest(ServiceError):
    status, default_code, title = 400, "bad_request", "Bad Request"


class Unauthenticated(ServiceError):
    status, default_code, title = 401, "unauthenticated", "Unauthorized"


class Forbidden(ServiceError):
    status, default_code, title = 403, "forbidden", "Forbidden"


class NotFound(ServiceError):
    status, default_code, title = 404, "not_found", "Not Found"


class MethodNotAllowed(ServiceError):
    status, default_code, title = 405, "method_not_allowed", "Method Not Allowed"


class Conflict(ServiceError):
    status, default_code, title = 409, "conflict", "Conflict"


class Gone(ServiceError):
    status, default_code, title = 410, "gone", "Gone"


class PreconditionFailed(ServiceError):
    status, default_code, title = 412, "precondition_failed", "Precondition Failed"


class TooLarge(ServiceError):
    status, default_code, title = 413, "too_large", "Content Too Large"


class UnsupportedMediaType(ServiceError):
    status, default_code, title = 415, "unsupported_media_type", "Unsupported Media Type"


class ValidationFailed(ServiceError):
    status, default_code, title = 422, "validation_failed", "Unprocessable Content"


class PreconditionRequired(ServiceError):
    status, default_code, title = 428, "precondition_required", "Precondition Required"


class RateLimited(ServiceError):
    status, default_code, title = 429, "rate_limited", "Too Many Requests"


class Unavailable(ServiceError):
    """A store is down, or cannot be asked in time; always with ``retry_after``."""

    status, default_code, title = 503, "unavailable", "Service Unavailable"

    def __init__(self, detail: str | None = None, *, code: str | None = None, retry_after: int = 2) -> None:
        super().__init__(detail, code=code, retry_after=retry_after)


def invalid(field: str, message: str) -> ValidationFailed:
    """One field that does not fit."""
    return ValidationFailed("Validation failed", details=[{"field": field, "message": message}])


def problem(error: ServiceError, *, request_id: str) -> dict[str, Any]:
    """The body of RFC 9457, with ``error`` repeating ``detail`` for older clients."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "error": error.detail,
        "requestId": request_id,
    }
    if error.details:
        body["details"] = error.details
    return body
