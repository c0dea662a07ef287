"""Bytes of the test proxy: heads of HTTP messages, pieces of SOCKS5, and what is passed on between two sides.

Its one invariant: nothing here decides; it reads, passes and closes.
"""

import asyncio
import base64
import socket
import struct
from contextlib import suppress
from typing import Final, NamedTuple

HEAD_END: Final = b"\r\n\r\n"
_SLICE_BYTES: Final = 64 * 2**10
_LINGER_SECONDS: Final = 1.0
_FOR_THE_PROXY: Final = {"proxy-authorization", "proxy-connection", "connection", "keep-alive"}

Credentials = tuple[str, str]
Headers = list[tuple[str, str]]


class Streams(NamedTuple):
    """One side of what passes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


async def pump_up(client: Streams, target: Streams) -> None:
    with suppress(OSError):
        while piece := await client.reader.read(_SLICE_BYTES):
            target.writer.write(piece)
            await target.writer.drain()
    target.writer.close()  # the client has gone, so the target's answer ends too


async def pump_down(target: Streams, client: Streams, piece: bytes, left: int | None) -> bool:
    """Passes `piece` and all that follows; False once `left` bytes have passed."""
    while piece := piece or await target.reader.read(_SLICE_BYTES):
        client.writer.write(piece if left is None else piece[:left])
        await client.writer.drain()
        if left is not None and (left := left - len(piece)) <= 0:
            return False
        piece = b""
    return True


async def close(client: Streams) -> None:
    """Ends the connection after what was said: a client that still sends must not lose it to a TCP reset."""
    with suppress(OSError, TimeoutError):
        if not client.writer.transport.is_closing():
            client.writer.write_eof()
            await asyncio.wait_for(until_gone(client), _LINGER_SECONDS)
    client.writer.close()


def reset(client: Streams) -> None:
    """Ends the connection at once, by a TCP reset."""
    raw: socket.socket = client.writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


async def until_gone(client: Streams) -> None:
    while await client.reader.read(_SLICE_BYTES):
        continue


def parsed(head: bytes) -> tuple[str, Headers]:
    line, *rest = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    pairs = [each.partition(":") for each in rest]
    return line, [(name.lower(), value.strip()) for name, _, value in pairs]


def head(line: str, headers: Headers) -> bytes:
    """The head of a request or an answer as it goes on: without what was for the proxy."""
    kept = [f"{name}: {value}" for name, value in headers if name not in _FOR_THE_PROXY]
    return "\r\n".join([line, *kept, "connection: close"]).encode("latin-1") + HEAD_END


def basic(value: str) -> Credentials | None:
    """The user and password of a Basic header; None when there is no header, empty ones when it holds none."""
    with suppress(ValueError):
        user, _, password = base64.b64decode(value.partition(" ")[2], validate=True).decode().partition(":")
        return (user, password) if value else None
    return "", ""


async def counted(reader: asyncio.StreamReader) -> bytes:
    (count,) = await reader.readexactly(1)
    return await reader.readexactly(count)
