"""How requests reach the application: those, too, that aiohttp would refuse by itself, in its own words.

It answers in plain text, with a ``Server`` header and without a request id, what it cannot read (a header beyond its
limit, a bad Content-Length, an unknown method) and what it is asked to expect. Here both go the way of every request.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import ERROR, RequestHandler
from multidict import CIMultiDict, CIMultiDictProxy

from server.errors import BadRequest
from server.rest.keys import BROKEN_OFF, UNREADABLE
from server.rest.middlewares import problem, recognise

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
_BLANK = ERROR._replace(headers=CIMultiDictProxy(CIMultiDict()))


class Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made: Any = await super()._make_server()
        return _Server(_expecting(made.request_handler), request_factory=_marking(made.request_factory), **made._kwargs)


class _Server(web.Server):
    def __call__(self) -> "_Connection":
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    def _make_error_handler(self, err_info: Any) -> Any:  # noqa: ARG002 - it may hold anything, and is not told
        return self._request_handler


def _marking(make: Callable[..., web.Request]) -> Callable[..., web.Request]:
    """aiohttp makes one and the same request of all that it cannot read."""

    def marking(message: Any, *others: Any) -> web.Request:
        if message is not ERROR:
            return make(message, *others)
        request = make(_BLANK, *others)
        request[UNREADABLE] = request[BROKEN_OFF] = True
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
