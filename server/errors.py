"""The errors that clients receive; each transport renders them in one place.

REST responds with the status and an RFC 9457 problem body, the socket with an ``error`` frame, the queue with a
failure without retry. ``code`` is stable: clients rely on it.
"""

from collections.abc import Sequence
from typing import Any, TypedDict


class FieldError(TypedDict):
    field: str
    message: str


ERROR_CODES = {
    "bad_request": (400, "malformed JSON, or a malformed request"),
    "unauthenticated": (401, "no token, or an invalid one; or the session has ended"),
    "invalid_credentials": (401, "email or password is wrong"),
    "refresh_reused": (401, "a spent refresh token was used again; its session has ended"),
    "forbidden": (403, "a member without the required role"),
    "not_found": (404, "does not exist, or the caller has no access to it"),
    "method_not_allowed": (405, "the path does not allow this method; see `Allow`"),
    "conflict": (409, "the change conflicts with the current state"),
    "email_taken": (409, "an account with that email exists"),
    "already_collaborator": (409, "the user is a member of the project already"),
    "owner_immutable": (409, "the owner can be neither changed nor removed; transfer the project"),
    "path_taken": (409, "the path is that of another document or of its folder, or below another document"),
    "idempotency_in_progress": (409, "the first request with that `Idempotency-Key` is still running"),
    "idempotency_secret": (
        409,
        "the first response contained a secret, which is not replayed; `Location` names the resource",
    ),
    "not_cancellable": (409, "the job has finished"),
    "not_retryable": (409, "the job has neither failed nor been cancelled"),
    "gone": (410, "the resource has expired"),
    "precondition_failed": (412, "the condition of `If-Match` or `If-None-Match` is false"),
    "too_large": (413, "the body, a document or the input of a job exceeds the maximum size"),
    "uri_too_long": (414, "the path with its query exceeds the maximum length"),
    "unsupported_media_type": (415, "the path does not accept the body's `Content-Type`"),
    "range_not_satisfiable": (416, "`Range` lies outside of the file"),
    "validation_failed": (422, "the request is well-formed, but invalid; see `details`"),
    "idempotency_key_reused": (422, "the same `Idempotency-Key` was used with another body"),
    "language_unavailable": (422, "no worker offers that language"),
    "precondition_required": (428, "`If-Match` is required"),
    "rate_limited": (429, "too many requests; see `Retry-After`"),
    "header_fields_too_large": (431, "a header field exceeds the maximum size, or there are too many"),
    "internal": (500, "internal server error"),
    "unavailable": (503, "a store is down or slow, or writes conflicted; see `Retry-After`"),
    "sandbox_unavailable": (503, "no worker offers a sandbox"),
    "malformed": (None, "socket: the frame is not a JSON object with an event"),
    "unknown_event": (None, "socket: no such event"),
    "not_joined": (None, "socket: join the workspace first"),
    "not_open": (None, "socket: open the document first"),
}
"""Every error code that clients receive: its HTTP status (None for codes of sockets only) and its meaning."""


class ServiceError(Exception):
    """An error for the client, with ``code`` and ``detail``; its class gives the HTTP status."""

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
        assert self.code in ERROR_CODES, self.code
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

    def __init__(self, detail: str | None = None, *, allowed: Sequence[str] = ()) -> None:
        super().__init__(detail)
        self.allowed = allowed


class Conflict(ServiceError):
    status, default_code, title = 409, "conflict", "Conflict"


class Gone(ServiceError):
    status, default_code, title = 410, "gone", "Gone"


class PreconditionFailed(ServiceError):
    status, default_code, title = 412, "precondition_failed", "Precondition Failed"


class TooLarge(ServiceError):
    status, default_code, title = 413, "too_large", "Content Too Large"


class UriTooLong(ServiceError):
    status, default_code, title = 414, "uri_too_long", "URI Too Long"


class UnsupportedMediaType(ServiceError):
    status, default_code, title = 415, "unsupported_media_type", "Unsupported Media Type"


class RangeNotSatisfiable(ServiceError):
    status, default_code, title = 416, "range_not_satisfiable", "Range Not Satisfiable"


class ValidationFailed(ServiceError):
    status, default_code, title = 422, "validation_failed", "Unprocessable Content"


class PreconditionRequired(ServiceError):
    status, default_code, title = 428, "precondition_required", "Precondition Required"


class HeaderFieldsTooLarge(ServiceError):
    status, default_code, title = 431, "header_fields_too_large", "Request Header Fields Too Large"


class RateLimited(ServiceError):
    status, default_code, title = 429, "rate_limited", "Too Many Requests"


class Unavailable(ServiceError):
    """A store is down, did not answer in time, or rolled back conflicting writes; always with ``retry_after``."""

    status, default_code, title = 503, "unavailable", "Service Unavailable"

    def __init__(self, detail: str | None = None, *, code: str | None = None, retry_after: int = 2) -> None:
        super().__init__(detail, code=code, retry_after=retry_after)


def store_unreachable(store: str) -> Unavailable:
    """Return the error for a store without a connection: it is refused, closed, or the name does not resolve."""
    return Unavailable(f"{store} is unavailable")


def store_timed_out(store: str) -> Unavailable:
    """Return the error for a call that reached its timeout. The store may still complete the call later."""
    return Unavailable(f"{store} did not answer in time")


ERROR_CLASSES: tuple[type[ServiceError], ...] = (ServiceError, *ServiceError.__subclasses__())
"""All error classes; each has its own status."""


def invalid_field(field: str, message: str) -> ValidationFailed:
    """Return the validation error of one field."""
    return ValidationFailed("Validation failed", details=[{"field": field, "message": message}])


def problem(error: ServiceError, *, request_id: str) -> dict[str, Any]:
    """Return the problem body (RFC 9457); ``error`` repeats ``detail`` for older clients."""
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
