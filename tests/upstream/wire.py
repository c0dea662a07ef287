"""HTTP/1.1 by hand, because a test upstream must also be able to speak it badly.

Its one invariant: an exchange whose client has gone raises ClientGone at its next step, and the moment of
it is known.
"""

import asyncio
import itertools
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast
from urllib.parse import unquote

import httptools

_REASONS = {200: "OK", 307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden"}
_BUFFER_BYTES = 64 * 2**10


class ClientGone(Exception):
    """The client closed the connection before the answer was whole."""


class Exchange:
    """One request and its answer on a connection."""

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection
        self.method = ""
        self.target = b""
        self.raw_headers: list[tuple[str, str]] = []
        self.body = bytearray()
        self.keep_alive = True
        self.bytes_sent = 0
        self.chunked = False

    @property
    def path(self) -> str:
        return unquote(self.target.decode("latin-1").partition("?")[0])

    @property
    def query(self) -> str:
        return self.target.decode("latin-1").partition("?")[2]

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.raw_headers)

    async def start(self, status: int, headers: Mapping[str, str | list[str]], length_bytes: int | None = None) -> None:
        """Sends status and headers; without a length the body is chunked."""
        self.chunked = length_bytes is None
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}"]
        for name, value in headers.items():
            lines += [f"{name}: {one}" for one in ([value] if isinstance(value, str) else value)]
        lines.append("transfer-encoding: chunked" if length_bytes is None else f"content-length: {length_bytes}")
        await self.connection.write(("\r\n".join(lines) + "\r\n\r\n").encode("utf-8"))

    async def send(self, data: bytes) -> None:
        """Sends a piece of the body."""
        if data:
            await self.connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)
            self.bytes_sent += len(data)

    async def finish(self) -> None:
        """Ends the body."""
        if self.chunked:
            await self.connection.write(b"0\r\n\r\n")

    async def send_raw(self, data: bytes) -> None:
        """Bytes that may be anything but HTTP."""
        await self.connection.write(data)

    async def pause(self, seconds: float) -> None:
        """Waits; raises ClientGone as soon as the client goes."""
        try:
            async with asyncio.timeout(seconds):
                await self.connection.gone.wait()
        except TimeoutError:
            return
        raise ClientGone

    def close(self, *, reset: bool = False) -> None:
        """Ends the connection, after what was sent; with `reset` at once, by a TCP reset."""
        self.keep_alive = False
        self.connection.close(reset=reset)


Handler = Callable[[Exchange], Awaitable[None]]


class Connection(asyncio.Protocol):
    """One TCP connection; its requests are answered one after the other."""

    _numbers = itertools.count(1)

    def __init__(self, handler: Handler, connections: "set[Connection]") -> None:
        self.number = next(self._numbers)
        self.gone = asyncio.Event()
        self.gone_at: float | None = None
        self.control_only = True
        self._handler = handler
        self._connections = connections
        self._waiting: list[Exchange] = []
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._exchange = Exchange(self)
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone_at = time.time()
        self.gone.set()
        self._writable.set()
        self._connections.discard(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            self._transport.close()

    # httptools calls these

    def on_message_begin(self) -> None:
        self._exchange = Exchange(self)

    def on_url(self, url: bytes) -> None:
        self._exchange.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._exchange.raw_headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_body(self, body: bytes) -> None:
        self._exchange.body += body

    def on_message_complete(self) -> None:
        self._exchange.method = self._parser.get_method().decode()
        self._exchange.keep_alive = self._parser.should_keep_alive()
        self._waiting.append(self._exchange)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        while self._waiting and not self.gone.is_set():
            exchange = self._waiting.pop(0)
            try:
                await self._handler(exchange)
            except ClientGone:
                break
            except BaseException:  # a mistake in the test upstream itself: never a silent hang
                self._transport.close()
                raise
            if not exchange.keep_alive:
                self._transport.close()
        self._task = None

    async def write(self, data: bytes) -> None:
        if self.gone.is_set() or self._transport.is_closing():
            raise ClientGone
        self._transport.write(data)
        if not self._writable.is_set():
            await self._writable.wait()

    def close(self, *, reset: bool) -> None:
        if not reset:
            self._transport.close()
            return
        raw: socket.socket = self._transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
