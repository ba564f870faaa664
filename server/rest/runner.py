"""How requests reach the application: those, too, that aiohttp would refuse by itself, in its own words.

It answers in plain text, with a ``Server`` header and without a request id, what it cannot read (a header beyond its
limit, a bad Content-Length, an unknown method) and what it is asked to expect. Here both go the way of every request.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.web_protocol import ERROR, RequestHandler
from multidict import CIMultiDict, CIMultiDictProxy

from server.errors import BadRequest, HeaderFieldsTooLarge, ServiceError, UriTooLong
from server.rest.keys import BROKEN_OFF, MALFORMED_REQUEST
from server.rest.middlewares import problem, recognise

MAX_TARGET_BYTES = 8 << 10  # of a path with its query
MAX_FIELD_BYTES = 8190  # of a header field. Another number: the parser's error says which limit it was, not of what
MAX_FIELDS = 128
LINGER_SECONDS = 2.0  # for the rest of a request that cannot be read
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
_BLANK = ERROR._replace(headers=CIMultiDictProxy(CIMultiDict()))
_LIMITS = {"max_line_size": MAX_TARGET_BYTES, "max_field_size": MAX_FIELD_BYTES, "max_headers": MAX_FIELDS}


class Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made: Any = await super()._make_server()
        options = {**made._kwargs, **_LIMITS}
        return _Server(_expecting(made.request_handler), request_factory=_marking(made.request_factory), **options)


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
        answer: Any = self._request_handler

        async def refuse(request: web.Request) -> web.StreamResponse:
            request[MALFORMED_REQUEST] = _refusal(err_info.exc)
            response: web.StreamResponse = await answer(request)
            await response.prepare(request)
            await response.write_eof()
            await self._linger()
            return response

        return refuse

    async def _linger(self) -> None:
        """Discard what is still being sent, until the client has read the answer and closes (RFC 9112, section 9.6).

        A connection that is closed while data is unread is reset, and the client may lose the answer.
        """
        self.close()  # from here on data is discarded
        if self.transport is not None and self.transport.can_write_eof():
            self.transport.write_eof()
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                await self._lost.wait()
        except TimeoutError:
            return


def _refusal(error: BaseException) -> ServiceError:
    """The refusal of what the parser cannot read."""
    if isinstance(error, LineTooLong) and error.args[1] == MAX_TARGET_BYTES:
        return UriTooLong(f"Path and query exceed the maximum size of {MAX_TARGET_BYTES} bytes")
    if isinstance(error, LineTooLong):
        return HeaderFieldsTooLarge(f"A header field exceeds the maximum size of {MAX_FIELD_BYTES} bytes")
    if isinstance(error, BadHttpMessage) and error.message.startswith("Too many headers"):
        return HeaderFieldsTooLarge(f"The request exceeds the maximum of {MAX_FIELDS} header fields")
    return BadRequest("Malformed request")


def _marking(make: Callable[..., web.Request]) -> Callable[..., web.Request]:
    """aiohttp makes one and the same request of all that it cannot read."""

    def marking(message: Any, *others: Any) -> web.Request:
        if message is not ERROR:
            return make(message, *others)
        request = make(_BLANK, *others)
        request[BROKEN_OFF] = True
        return request

    return marking


def _expecting(answer: Answer) -> Any:
    async def expecting(request: web.Request) -> web.StreamResponse:
        try:
            return await answer(request)
        except web.HTTPExpectationFailed:  # before any middleware
            recognise(request)
            return problem(request, BadRequest("Of Expect only 100-continue is known"))

    return expecting
