"""A TCP link that can be bad: it stalls, resets, cuts half-way, and cuts an answer off after it was made.

Its one invariant: with `rate` 0 it passes every byte on, at once and unchanged.

The worst moment is when the far side has done what was asked and the near side does not hear of it. `DEAF` is that
moment: the request passes, the answer comes back to here, and goes no further. Of a stream of events it lets all
pass but the end.
"""

import asyncio
import contextlib
import random
from collections import Counter
from typing import Any

RESET = "reset"
HALF_REQUEST = "half a request"
HALF_ANSWER = "half an answer"
DEAF = "done but not heard"
STALL = "stall"
WEIGHTS = {RESET: 2, HALF_REQUEST: 2, HALF_ANSWER: 2, DEAF: 5, STALL: 2}
_BYTES = 256 * 2**10
_END_OF_STREAM = b"message_stop"


class Link:
    """Listens on `port`; leads to a TCP address or a unix socket.

    `rate` is the share of exchanges that go wrong, of those that begin with something that holds `only`.
    """

    def __init__(
        self,
        name: str,
        *,
        seed: str,
        host: str = "127.0.0.1",
        port: int = 0,
        path: str = "",
        stall_seconds: float = 4.0,
        weights: dict[str, int] | None = None,
        only: bytes = b"",
    ) -> None:
        self.name = name
        self.rate = 0.0
        self.faults: Counter[str] = Counter()
        self.port = 0
        self._random = random.Random(f"{seed} {name}")
        self._target = (host, port, path)
        self._stall_seconds = stall_seconds
        self.weights = weights or WEIGHTS
        self._only = only
        self._server: asyncio.Server
        self._open: set[asyncio.Task[None]] = set()

    async def open(self) -> "Link":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_all(self) -> None:
        """Whatever runs through it now ends."""
        for task in list(self._open):
            task.cancel()

    def pick(self, data: bytes) -> str:
        """What befalls the exchange that begins with this; empty: nothing."""
        if self._random.random() >= self.rate or self._only not in data:
            return ""
        fault = self._random.choices(list(self.weights), list(self.weights.values()))[0]
        self.faults[fault] += 1
        return fault

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            await _Passage(self, reader, writer).run(self._target, self._random.uniform(0.1, self._stall_seconds))
        except (OSError, asyncio.CancelledError):
            pass  # the link is down; that is its trade
        finally:
            writer.transport.abort()
            self._open.discard(task)


class _Passage:
    """One connection, both ways."""

    def __init__(self, link: Link, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        self._link = link
        self._near_in, self._near_out = near_in, near_out
        self._fault = ""
        self._is_answered = True  # the next bytes from the near side begin an exchange
        self._is_stream = False

    async def run(self, target: tuple[str, int, str], stall_seconds: float) -> None:
        host, port, path = target
        opening: Any = asyncio.open_unix_connection(path) if path else asyncio.open_connection(host, port)
        far_in, far_out = await opening
        ways = [
            asyncio.create_task(self._there(far_out, stall_seconds)),
            asyncio.create_task(self._back(far_in)),
        ]
        try:
            # The far side's end is the end; the near side's may leave an answer to come.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if ways[0].done() and not ways[0].exception() and ways[0].result():
                await ways[1]
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_out.transport.abort()

    async def _there(self, out: asyncio.StreamWriter, stall_seconds: float) -> bool:
        """Whether the near side has said its last word, and the far side may still answer."""
        while data := await self._near_in.read(_BYTES):
            if self._is_answered:
                self._is_answered, self._is_stream = False, False
                self._fault = self._link.pick(data)
            if self._fault == RESET:
                return False
            if self._fault == HALF_REQUEST:
                out.write(data[: len(data) // 2])
                await out.drain()
                return False
            if self._fault == STALL:
                self._fault = ""
                await asyncio.sleep(stall_seconds)
            out.write(data)
            await out.drain()
        with contextlib.suppress(OSError):
            out.write_eof()
        return True

    async def _back(self, far_in: asyncio.StreamReader) -> None:
        while data := await far_in.read(_BYTES):
            if not self._is_answered:
                self._is_answered = True
                self._is_stream = b"text/event-stream" in data
            if self._fault == DEAF and (not self._is_stream or _END_OF_STREAM in data):
                return
            if self._fault == HALF_ANSWER:
                self._near_out.write(data[: len(data) // 2])
                await self._near_out.drain()
                return
            self._near_out.write(data)
            await self._near_out.drain()
        with contextlib.suppress(OSError):
            self._near_out.write_eof()
