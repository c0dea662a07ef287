"""A bounded queue of bytes between the task that reads upstream and the response that the client drains.

Its one invariant: it never holds more than `limit_bytes` and one piece; whoever puts waits, until the client has
taken some, or has gone: then what is put is dropped, and nobody waits.
"""

import asyncio
from collections import deque
from typing import Final

LIMIT_BYTES: Final = 32 * 2**10


class Pipe:
    """For one writer and one reader. Pieces are whole events, so a reader may put something between them."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: deque[bytes] = deque()
        self._size_bytes = 0
        self._is_closed = False
        self._is_dropped = False
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()

    @property
    def has_room(self) -> bool:
        return self._is_dropped or self._size_bytes < self._limit_bytes

    async def put(self, piece: bytes) -> None:
        """Adds a piece once there is room for it."""
        while not self.has_room:
            self._taken.clear()
            await self._taken.wait()
        self.put_now(piece)

    def put_now(self, piece: bytes) -> None:
        """Adds a piece, room or not: for the few bytes that end a stream."""
        if piece and not self._is_dropped:
            self._pieces.append(piece)
            self._size_bytes += len(piece)
            self._changed.set()

    async def get(self, timeout_seconds: float) -> bytes | None:
        """All that waits, as one piece; b"" at the end; None when nothing came for so long."""
        if not self._pieces and not self._is_closed:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_seconds)
            except TimeoutError:
                return None
        if len(self._pieces) == 1:
            together = self._pieces.popleft()
        else:
            together = b"".join(self._pieces)
            self._pieces.clear()
        self._size_bytes = 0
        self._taken.set()
        return together

    def close(self) -> None:
        """No more pieces will come."""
        self._is_closed = True
        self._changed.set()

    def drop(self) -> None:
        """Nobody reads any more."""
        self._is_dropped = True
        self._pieces.clear()
        self._size_bytes = 0
        self.close()
        self._taken.set()

    def cut(self, piece: bytes) -> None:
        """As `drop`, but for a reader that may still come: it finds this piece, and then the end."""
        self.drop()
        self._pieces.append(piece)
