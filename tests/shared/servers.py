"""Small HTTP servers on loopback that misbehave on purpose: other people's parts, for clients of ours."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Heard:
    """A server's address, and the request lines that it has heard."""

    port: int = 0
    requests: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def answer(status: int, body: bytes, content_type: str = "application/json", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Answer", f"content-type: {content_type}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode() + body


@asynccontextmanager
async def serving(*said: bytes, port: int = 0) -> AsyncIterator[Heard]:
    """A server that reads a request, says this, and hangs up; with nothing to say it only hangs up.

    Of several answers each is given once, and the last one from then on.
    """
    heard = Heard()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            heard.requests.append(head.split("\r\n")[0])
            for line in head.lower().split("\r\n"):
                if line.startswith("content-length: "):
                    await reader.readexactly(int(line.split(": ")[1]))
            writer.write(said[min(len(heard.requests), len(said)) - 1])
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    heard.port = server.sockets[0].getsockname()[1]
    try:
        yield heard
    finally:
        server.close()
        await server.wait_closed()
