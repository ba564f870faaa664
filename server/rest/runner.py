"""The HTTP runner: requests that aiohttp would reject by itself pass through the middlewares, too.

aiohttp responds in plain text, with a ``Server`` header and without a request id, to a request that it cannot parse (a
header beyond the limit, a bad Content-Length, an unknown method) and to an unknown expectation. Here both get the same
problem body, headers and log line as every other request.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.web_protocol import ERROR, RequestHandler
from multidict import CIMultiDict, CIMultiDictProxy

from server.errors import BadRequest, HeaderFieldsTooLarge, ServiceError, UriTooLong
from server.rest.keys import CLOSE_AFTER_RESPONSE, MALFORMED_REQUEST
from server.rest.middlewares import assign_request_id, problem_response

MAX_TARGET_BYTES = 8 << 10  # of a path with its query
MAX_FIELD_BYTES = 8190  # of a header field; differs, because the parser's error names only the limit
MAX_FIELDS = 128
LINGER_TIMEOUT_SECONDS = 2.0  # for the rest of a malformed request
RequestHandlerFunction = Callable[[web.Request], Awaitable[web.StreamResponse]]
_EMPTY_MESSAGE = ERROR._replace(headers=CIMultiDictProxy(CIMultiDict()))
_LIMITS = {"max_line_size": MAX_TARGET_BYTES, "max_field_size": MAX_FIELD_BYTES, "max_headers": MAX_FIELDS}


class HttpRunner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        server: Any = await super()._make_server()
        options = {**server._kwargs, **_LIMITS}
        return _Server(
            _handling_expect(server.request_handler),
            request_factory=_marking_malformed(server.request_factory),
            **options,
        )


class _Server(web.Server):
    def __call__(self) -> "_Connection":
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lost = asyncio.Event()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._lost.set()
        super().connection_lost(exc)

    def _make_error_handler(self, err_info: Any) -> Any:
        handler: Any = self._request_handler

        async def refuse(request: web.Request) -> web.StreamResponse:
            request[MALFORMED_REQUEST] = _parse_error(err_info.exc)
            response: web.StreamResponse = await handler(request)
            await response.prepare(request)
            await response.write_eof()
            await self._linger()
            return response

        return refuse

    async def _linger(self) -> None:
        """Discard further data until the client has read the response and closes (RFC 9112, section 9.6).

        A connection that is closed with unread data is reset, and the client may lose the response.
        """
        self.close()  # from here on received data is discarded
        if self.transport is not None and self.transport.can_write_eof():
            self.transport.write_eof()
        try:
            async with asyncio.timeout(LINGER_TIMEOUT_SECONDS):
                await self._lost.wait()
        except TimeoutError:
            return


def _parse_error(error: BaseException) -> ServiceError:
    """Return the service error for an error of the parser."""
    if isinstance(error, LineTooLong) and error.args[1] == MAX_TARGET_BYTES:
        return UriTooLong(f"Path and query exceed the maximum size of {MAX_TARGET_BYTES} bytes")
    if isinstance(error, LineTooLong):
        return HeaderFieldsTooLarge(f"A header field exceeds the maximum size of {MAX_FIELD_BYTES} bytes")
    if isinstance(error, BadHttpMessage) and error.message.startswith("Too many headers"):
        return HeaderFieldsTooLarge(f"The request exceeds the maximum of {MAX_FIELDS} header fields")
    return BadRequest("Malformed request")


def _marking_malformed(make_request: Callable[..., web.Request]) -> Callable[..., web.Request]:
    """Return a request factory that marks malformed requests; aiohttp passes the message ``ERROR`` for all of them."""

    def marking(message: Any, *others: Any) -> web.Request:
        if message is not ERROR:
            return make_request(message, *others)
        request = make_request(_EMPTY_MESSAGE, *others)
        request[CLOSE_AFTER_RESPONSE] = True
        return request

    return marking


def _handling_expect(handler: RequestHandlerFunction) -> Any:
    async def expecting(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPExpectationFailed:  # before any middleware
            assign_request_id(request)
            return problem_response(request, BadRequest("Expect supports only 100-continue"))

    return expecting
