"""The test proxy itself: HTTP and SOCKS5 by hand, one request or tunnel on a connection.

Its one invariant: bytes pass unchanged, but for the head of a request in absolute form, which loses what was for
the proxy, and that of its answer, which says that the connection ends.
"""

import asyncio
import json
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from tests.proxy import wire
from tests.proxy.wire import HEAD_END, Credentials, Headers, Streams


class Fault(BaseModel):
    """What becomes of a request instead; with `after_bytes` once so much of the answer has passed."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["refuse", "hang", "reset"]
    after_bytes: int | None = None
    repeat: int = 1


@dataclass(slots=True)
class Entry:
    """One request; with SOCKS5 the target of one without the right credentials is never known."""

    protocol: Literal["http", "connect", "socks5"]
    method: str
    target: str
    credentials: str  # right, wrong, none
    outcome: str = "running"  # finished, denied, unreachable, or the kind of the fault


class Words(NamedTuple):
    """What a protocol says to a request."""

    denied: bytes
    refused: bytes
    accepted: bytes


def _answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "connection: close"]
    return "\r\n".join(lines).encode() + HEAD_END + body


_ASK: Final = _answer("407 Proxy Authentication Required", 'proxy-authenticate: Basic realm="test proxy"')
_REFUSED: Final = _answer("502 Bad Gateway")
_NOWHERE: Final = b"\x00\x01\x00\x00\x00\x00\x00\x00"
_WORDS: Final = {
    "http": Words(_ASK, _REFUSED, b""),
    "connect": Words(_ASK, _REFUSED, b"HTTP/1.1 200 Connection established\r\n\r\n"),
    "socks5": Words(b"\x01\x01", b"\x05\x05" + _NOWHERE, b"\x05\x00" + _NOWHERE),
}


class Proxy:
    """One proxy; `serve` takes a connection. Without credentials of its own it asks for none."""

    def __init__(self, credentials: Credentials | None, *, socks: bool) -> None:
        self._credentials = credentials
        self._socks = socks
        self._log: list[Entry] = []
        self._faults: list[Fault] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Streams(reader, writer)
        with suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError):  # nonsense, or one side went
            first = await reader.readexactly(1)
            if first == b"\x05":
                await self._serve_socks(client)
            else:
                await self._serve_http(client, *wire.parsed(first + await reader.readuntil(HEAD_END)))
        await wire.close(client)

    async def _serve_http(self, client: Streams, line: str, headers: Headers) -> None:
        method, target, _ = line.split(" ", 2)
        if target.startswith("/"):
            await self._control(client, f"{method} {target}", int(dict(headers).get("content-length", 0)))
            return
        if self._socks:
            client.writer.write(_answer("405 Method Not Allowed"))
            return
        credentials = self._judged(wire.basic(dict(headers).get("proxy-authorization", "")))
        if method == "CONNECT":
            await self._pass(client, Entry("connect", method, target, credentials))
            return
        url = urlsplit(target)
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        entry = Entry("http", method, f"{url.hostname}:{url.port or 80}", credentials)
        await self._pass(client, entry, wire.head(f"{method} {path} HTTP/1.1", headers))

    async def _serve_socks(self, client: Streams) -> None:
        reader, writer = client
        needed = b"\x02" if self._credentials else b"\x00"
        if needed not in await wire.counted(reader) or not self._socks:
            self._log.append(Entry("socks5", "", "", "none", outcome="denied"))
            writer.write(b"\x05\xff")
            return
        writer.write(b"\x05" + needed)
        credentials = "none"
        if self._credentials:
            await reader.readexactly(1)
            credentials = self._judged(((await wire.counted(reader)).decode(), (await wire.counted(reader)).decode()))
            if credentials == "wrong":
                self._log.append(Entry("socks5", "", "", credentials, outcome="denied"))
                writer.write(_WORDS["socks5"].denied)
                return
            writer.write(b"\x01\x00")
        _, command, _, kind = await reader.readexactly(4)
        host = (await wire.counted(reader)).decode() if kind == 3 else ""
        host = host or str(ip_address(await reader.readexactly(4 if kind == 1 else 16)))
        (port,) = struct.unpack("!H", await reader.readexactly(2))
        if command == 1:
            await self._pass(client, Entry("socks5", "CONNECT", f"{host}:{port}", credentials))
        else:
            writer.write(b"\x05\x07" + _NOWHERE)

    async def _pass(self, client: Streams, entry: Entry, head: bytes = b"") -> None:
        """Connects the client to its target, or says why not; `head` is what the target hears first."""
        self._log.append(entry)
        words = _WORDS[entry.protocol]
        if self._credentials and entry.credentials != "right":
            entry.outcome = "denied"
            client.writer.write(words.denied)
            return
        fault = self._next_fault()
        if fault is not None and fault.after_bytes is None:
            await _fail(fault, client, entry)
            return
        host, _, port = entry.target.rpartition(":")
        try:
            target = Streams(*await asyncio.open_connection(host.strip("[]"), int(port)))
        except OSError:
            entry.outcome = "unreachable"
            client.writer.write(words.refused)
            return
        target.writer.write(head)
        client.writer.write(words.accepted)
        up = asyncio.create_task(wire.pump_up(client, target))
        try:
            first = wire.head(*wire.parsed(await target.reader.readuntil(HEAD_END))) if head else b""
            is_whole = await wire.pump_down(target, client, first, fault.after_bytes if fault else None)
        finally:
            entry.outcome = "finished"
            up.cancel()
            await asyncio.wait({up})
            target.writer.close()
        if fault is not None and not is_whole:
            await _fail(fault, client, entry)

    def _judged(self, given: Credentials | None) -> str:
        if given is None:
            return "none"
        return "right" if self._credentials in {None, given} else "wrong"

    def _next_fault(self) -> Fault | None:
        if not self._faults:
            return None
        fault = self._faults[0]
        fault.repeat -= fault.repeat > 0
        if not fault.repeat:
            del self._faults[0]
        return fault

    async def _control(self, client: Streams, call: str, length_bytes: int) -> None:
        content = await client.reader.readexactly(length_bytes)
        told: dict[str, Any] = {}
        if call == "GET /control/log":
            told = {"log": [asdict(entry) for entry in self._log]}
        elif call == "POST /control/reset":
            self._log, self._faults = [], []
        elif call == "POST /control/fault":
            try:
                self._faults.append(Fault.model_validate_json(content))
            except ValidationError as error:
                told = {"error": str(error)}
        else:
            told = {"error": "see python -m tests.proxy --help"}
        status = "400 Bad Request" if "error" in told else "200 OK"
        client.writer.write(_answer(status, "content-type: application/json", body=json.dumps(told).encode()))


async def _fail(fault: Fault, client: Streams, entry: Entry) -> None:
    entry.outcome = fault.kind
    if fault.kind == "refuse":
        client.writer.write(_WORDS[entry.protocol].refused)
    elif fault.kind == "reset":
        wire.reset(client)
    else:
        await wire.until_gone(client)
