"""A network that fails: a TCP proxy between a server and one of its stores."""

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

CHUNK = 64 << 10
DELAY_SECONDS = 0.3  # each way


class Mode(enum.Enum):
    PASS = "pass"
    STOPPED = "stopped"  # refuses connections, and has reset the open ones
    BLACK_HOLE = "black hole"  # accepts everything, and never responds
    SLOW = "slow"
    RESET = "reset"  # accepts connections, and closes them at once


class Proxy:
    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self.mode = Mode.PASS
        self.port = 0
        self.connections = 0

    async def start(self) -> None:
        self._passing.set()
        await self._listen()

    async def stop(self) -> None:
        await self._stop_listening()
        self._abort_all()
        self._passing.set()

    async def set_mode(self, mode: Mode) -> None:
        """Switch to another mode."""
        previous, self.mode = self.mode, mode
        (self._passing.clear if mode is Mode.BLACK_HOLE else self._passing.set)()
        if mode is Mode.STOPPED:
            await self._stop_listening()
        elif previous is Mode.STOPPED:
            await self._listen()
        if mode in (Mode.STOPPED, Mode.RESET) or previous is Mode.BLACK_HOLE:
            self._abort_all()  # bytes that a black hole has swallowed are lost

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        inner: asyncio.StreamWriter | None = None
        try:
            if self.mode is Mode.RESET:
                return
            await self._passing.wait()
            inner_reader, inner = await asyncio.open_connection(*self._target)
            self._writers.add(inner)
            await asyncio.gather(self._pump(reader, inner), self._pump(inner_reader, writer))
        except OSError:
            return
        finally:
            for stream in (writer, inner):
                if stream is not None:
                    self._writers.discard(stream)
                    stream.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK):
            await self._passing.wait()
            if self.mode is Mode.SLOW:
                await asyncio.sleep(DELAY_SECONDS)
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError  # one side has closed: close the other


class FaultyNetwork:
    """A proxy in front of each store; ``urls`` are settings for ``make_server``."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = urls
        self.stores: dict[str, Proxy] = {}
        self.urls: dict[str, str] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, urls: dict[str, str]) -> AsyncIterator["FaultyNetwork"]:
        network = cls(urls)
        try:
            for name, url in urls.items():
                address = urlsplit(url)
                assert address.hostname
                assert address.port
                proxy = network.stores[name] = Proxy(address.hostname, address.port)
                await proxy.start()
                network.urls[name] = url.replace(f":{address.port}/", f":{proxy.port}/")
            yield network
        finally:
            for proxy in network.stores.values():
                await proxy.stop()
