"""A bounded queue of bytes between the task that reads upstream and the response that the client drains.

Its one invariant: it never holds more than `limit_bytes` and one piece; whoever puts waits, until the client has
taken some, or has gone: then what is put is dropped, and nobody waits.

A thousand are open at once, and each passes thousands of events: who waits is one future, made only while there is
something to wait for, and silence is measured by one timer that outlives many events.
"""

import asyncio
from typing import Final

LIMIT_BYTES: Final = 32 * 2**10

Waiter = asyncio.Future[None]


class Pipe:
    """For one writer and one reader. Pieces are whole events, so a reader may put something between them."""

    __slots__ = (
        "_is_closed",
        "_is_dropped",
        "_limit_bytes",
        "_pieces",
        "_reader",
        "_silence",
        "_size_bytes",
        "_writer",
    )

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: list[bytes] = []
        self._size_bytes = 0
        self._is_closed = False
        self._is_dropped = False
        self._reader: Waiter | None = None
        self._writer: Waiter | None = None
        self._silence = _Silence()

    @property
    def has_room(self) -> bool:
        return self._is_dropped or self._size_bytes < self._limit_bytes

    async def put(self, piece: bytes) -> None:
        """Adds a piece once there is room for it."""
        while not self.has_room:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        self.put_now(piece)

    def put_now(self, piece: bytes) -> None:
        """Adds a piece, room or not: for the few bytes that end a stream."""
        if piece and not self._is_dropped:
            self._pieces.append(piece)
            self._size_bytes += len(piece)
            _wake(self._reader)

    async def get(self, timeout_seconds: float) -> bytes | None:
        """All that waits, as one piece; b"" at the end; None when nothing came for so long."""
        if not self._pieces and not self._is_closed:
            self._reader = asyncio.get_running_loop().create_future()
            self._silence.begin(self._reader, timeout_seconds)
            try:
                await self._reader
            finally:
                self._silence.end()
                self._reader = None
            if not self._pieces and not self._is_closed:
                return None
        together = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._size_bytes = 0
        _wake(self._writer)
        return together

    def close(self) -> None:
        """No more pieces will come."""
        self._is_closed = True
        self._silence.stop()
        _wake(self._reader)

    def drop(self) -> None:
        """Nobody reads any more."""
        self._is_dropped = True
        self._pieces.clear()
        self._size_bytes = 0
        self.close()
        _wake(self._writer)

    def cut(self, piece: bytes) -> None:
        """As `drop`, but for a reader that may still come: it finds this piece, and then the end."""
        self.drop()
        self._pieces.append(piece)


class _Silence:
    """Wakes a reader that has waited too long.

    Its timer is not set anew for each wait: when it is due it looks how long the wait of that moment has lasted.
    """

    __slots__ = ("_began_at", "_reader", "_seconds", "_timer")

    def __init__(self) -> None:
        self._reader: Waiter | None = None
        self._began_at = 0.0
        self._seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, reader: Waiter, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._reader, self._seconds, self._began_at = reader, seconds, loop.time()
        if self._timer is None:
            self._timer = loop.call_later(seconds, self._due)

    def end(self) -> None:
        self._reader = None

    def stop(self) -> None:
        """For good."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        if self._reader is None:
            return
        loop = asyncio.get_running_loop()
        left_seconds = self._began_at + self._seconds - loop.time()
        if left_seconds > 0:
            self._timer = loop.call_later(left_seconds, self._due)
        else:
            _wake(self._reader)


def _wake(waiter: Waiter | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
