"""HTTP as bytes: what well-behaved clients refuse to send.

Its one invariant: what is sent is exactly what was given.
"""

import asyncio
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """`status` is 0 when the connection ended without an answer. `is_whole`: nothing is missing at its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    is_whole: bool

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")


NOTHING = Answer(0, {}, b"", is_whole=False)


def request(
    method: bytes, target: bytes, headers: Mapping[bytes, bytes], body: bytes | None = None, *, close: bool = True
) -> bytes:
    """One request; a body gets its length unless the headers say something of it."""
    lines = [method + b" " + target + b" HTTP/1.1"]
    named = {name.lower() for name in headers}
    if b"host" not in named:
        lines.append(b"host: 127.0.0.1")
    lines += [name + b": " + value for name, value in headers.items()]
    if body is not None and not named & {b"content-length", b"transfer-encoding"}:
        lines.append(b"content-length: %d" % len(body))
    if close and b"connection" not in named:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


async def exchange(port: int, sent: bytes, *, seconds: float = 30) -> Answer:
    """Sends these bytes on a connection of their own and gives the first final answer.

    Raises TimeoutError when there is none, nor an end, in so many seconds.
    """
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
        try:
            writer.write(sent)
            with contextlib.suppress(OSError):  # it may have answered already
                await writer.drain()
            return await read_answer(reader)
        finally:
            writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next final answer (not 100 Continue); NOTHING when the connection ends before one."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            found = re.match(r"HTTP/1\.[01] (\d{3})", head)
            if found is None:
                return Answer(-1, {}, head.encode("latin-1"), is_whole=False)
            status = int(found[1])
            if status >= 200:
                break
    except (asyncio.IncompleteReadError, OSError):
        return NOTHING
    headers = {
        name.strip().lower(): value.strip()
        for name, colon, value in (line.partition(":") for line in head.split("\r\n")[1:])
        if colon
    }
    try:
        body = await _body(reader, headers, status)
    except (asyncio.IncompleteReadError, OSError):
        return Answer(status, headers, b"", is_whole=False)
    return Answer(status, headers, body, is_whole=True)


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str], status: int) -> bytes:
    if status in {204, 304}:
        return b""
    if "chunked" in headers.get("transfer-encoding", ""):
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return body
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()
