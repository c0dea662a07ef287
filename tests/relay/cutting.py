"""A TCP proxy in front of a relay that cuts, freezes and refuses connections, or answers a call itself.

Its one invariant: while nothing is asked of it, bytes pass unchanged.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_LINGER_NONE = struct.pack("ii", 1, 0)


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class Way:
    """The way to a relay: `refuse` so many connections more, `answers` for requests that begin with these bytes."""

    target_port: int
    port: int = 0
    refuse: int = 0
    refused: int = 0
    opened: int = 0
    cut_after_bytes: int | None = None
    answers: dict[bytes, bytes] = field(default_factory=dict)
    heard: list[bytes] = field(default_factory=list)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _serving: set[asyncio.Task[None]] = field(default_factory=set)
    _flows: asyncio.Event = field(default_factory=_set)
    _frozen: list[asyncio.Event] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Resets every connection."""
        for writer in list(self._writers):
            reset(writer)

    def freeze(self) -> None:
        """Connections that there are stay open, and nothing passes any more; new ones are fine."""
        self._flows.clear()
        self._frozen.append(self._flows)
        self._flows = _set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._serving.discard(task)

    async def close(self) -> None:
        """Resets what is open, and waits for the end of all."""
        for flows in self._frozen:
            flows.set()
        self.cut()
        while self._serving:
            await asyncio.wait(self._serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            self.refuse -= 1
            self.refused += 1
            reset(writer)
            return
        self.opened += 1
        there, back = await asyncio.open_connection("127.0.0.1", self.target_port)
        self._writers |= {writer, back}
        flows = self._flows
        both = [
            asyncio.create_task(self._up(reader, back, writer, flows)),
            asyncio.create_task(self._down(there, writer, flows)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            self._writers -= {writer, back}
            writer.close()
            back.close()

    async def _up(
        self,
        reader: asyncio.StreamReader,
        back: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
        flows: asyncio.Event,
    ) -> None:
        while piece := await _read(reader):
            await flows.wait()
            self.heard.append(piece.split(b"\r\n")[0])
            for begins, answer in self.answers.items():
                if piece.startswith(begins):
                    writer.write(answer)
                    return
            back.write(piece)

    async def _down(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event) -> None:
        while piece := await _read(there):
            await flows.wait()
            if self.cut_after_bytes is not None and b"HTTP/1.1 101" not in piece:
                writer.write(piece[: self.cut_after_bytes])
                self.cut_after_bytes -= len(piece)
                if self.cut_after_bytes <= 0:
                    self.cut_after_bytes = None
                    await writer.drain()
                    return
                continue
            writer.write(piece)


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(2**16)
    except ConnectionError:
        return b""


def reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    writer.transport.abort()


@asynccontextmanager
async def way_to(port: int) -> AsyncIterator[Way]:
    way = Way(port)
    server = await asyncio.start_server(way.accept, "127.0.0.1", 0)
    way.port = server.sockets[0].getsockname()[1]
    try:
        yield way
    finally:
        server.close()
        await way.close()
