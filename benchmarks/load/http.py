"""HTTP/1.1 as cheap as it gets: raw sockets of the event loop and httptools' parser, nothing in between.

Its one invariant: a connection carries one request at a time, and the moments at which its answer's pieces came are
those at which the loop read them.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

Headers = dict[str, str]


@dataclass(slots=True)
class Answer:
    """`pieces` are the body's, each with the moment when it came."""

    status: int
    headers: dict[bytes, bytes]
    pieces: list[tuple[float, bytes]]

    @property
    def body(self) -> bytes:
        return b"".join([piece for _, piece in self.pieces])

    def json(self) -> Any:
        return orjson.loads(self.body)


def request(method: str, path: str, body: Any = None, headers: Headers | None = None) -> bytes:
    """A request's bytes; the host is left to the connection's address."""
    content = b"" if body is None else orjson.dumps(body)
    lines = [f"{method} {path} HTTP/1.1", "host: bench", f"content-length: {len(content)}"]
    if content:
        lines.append("content-type: application/json")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


class Connection(asyncio.Protocol):
    """One keep-alive connection; made anew by whoever holds it when it has ended."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiting: asyncio.Future[Answer] | None = None
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[tuple[float, bytes]] = []
        self._on_first: Callable[[], None] | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, raw: bytes, on_first: Callable[[], None] | None = None) -> Answer:
        """The whole answer; `on_first` is called at its first piece. Raises ConnectionError when it is cut off."""
        assert self._transport is not None
        assert self._waiting is None
        self._waiting = asyncio.get_running_loop().create_future()
        self._headers, self._pieces, self._on_first = {}, [], on_first
        self._transport.write(raw)
        try:
            return await self._waiting
        finally:
            self._waiting = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionError(f"the connection ended before the answer: {exc}"))

    # the parser's side

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._pieces.append((monotonic(), body))
        if self._on_first is not None:
            self._on_first()
            self._on_first = None

    def on_message_complete(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Answer(self._parser.get_status_code(), self._headers, self._pieces))


class Connections:
    """As many connections to one address as are asked for at once; the one used last is used first."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._idle: deque[Connection] = deque()

    async def take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return made

    def give_back(self, connection: Connection) -> None:
        self._idle.append(connection)

    async def ask(self, raw: bytes, on_first: Callable[[], None] | None = None) -> Answer:
        connection = await self.take()
        answer = await connection.ask(raw, on_first)
        self.give_back(connection)
        return answer

    async def warm(self, count: int) -> None:
        """Opens so many, so that a run does not begin with connecting."""
        for connection in [await self.take() for _ in range(count)]:
            self.give_back(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
