"""One turn at a time for each session, as far as this process goes; the store sees to it between processes.

Its one invariant: requests for one session are served in the order in which they came.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from shared.errors import TurnInProgress
from shared.session_client import SessionKey

_BUSY_SECONDS = 1.0


@dataclass(slots=True)
class _Line:
    free: asyncio.Lock = field(default_factory=asyncio.Lock)
    people: int = 0


class Lines:
    """The sessions that somebody is served in, or waits for."""

    def __init__(self) -> None:
        self._lines: dict[SessionKey, _Line] = {}

    @property
    def waiting(self) -> int:
        return sum(line.people - 1 for line in self._lines.values())

    @asynccontextmanager
    async def place(self, key: SessionKey, *, wait_seconds: float) -> AsyncIterator[None]:
        """The session to oneself; raises TurnInProgress when it is not free in time."""
        line = self._lines.setdefault(key, _Line())
        line.people += 1
        try:
            try:
                async with asyncio.timeout(wait_seconds):
                    await line.free.acquire()
            except TimeoutError:
                raise TurnInProgress(retry_after_seconds=_BUSY_SECONDS) from None
            try:
                yield
            finally:
                line.free.release()
        finally:
            line.people -= 1
            if not line.people:
                del self._lines[key]
