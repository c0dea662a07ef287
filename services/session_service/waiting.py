"""Waiting for a busy session, in the order of arrival.

Its one invariant: of the callers that wait here for one session, only the one at the head of its line tries,
and a caller whose client has gone leaves the line without having tried.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from shared.errors import TurnInProgress

T = TypeVar("T")
Key = tuple[str, str]

_POLL_SECONDS: Final = 0.1
"""How often the head looks for turns that another instance closed, and for whether its client is still there."""


class Lines:
    """The lines of this process, one for each session that someone waits for."""

    def __init__(self) -> None:
        self._lines: dict[Key, deque[asyncio.Event]] = {}

    def wake(self, key: Key) -> None:
        """Tells the head of a line that its session may be free."""
        if line := self._lines.get(key):
            line[0].set()

    @asynccontextmanager
    async def _place(self, key: Key) -> AsyncIterator[tuple[asyncio.Event, deque[asyncio.Event]]]:
        line = self._lines.setdefault(key, deque())
        turn_came = asyncio.Event()
        line.append(turn_came)
        try:
            yield turn_came, line
        finally:
            line.remove(turn_came)
            if line:
                line[0].set()
            else:
                del self._lines[key]

    async def wait(
        self,
        key: Key,
        attempt: Callable[[], Awaitable[T]],
        *,
        seconds: float,
        is_gone: Callable[[], Awaitable[bool]],
    ) -> T:
        """The value of `attempt` once it no longer says TurnInProgress; that error when the time is up."""
        if not seconds:
            return await attempt()
        deadline = asyncio.get_running_loop().time() + seconds
        busy = TurnInProgress(retry_after_seconds=1)
        async with self._place(key) as (came, line):
            while True:
                left = deadline - asyncio.get_running_loop().time()
                if await is_gone():
                    raise busy
                if line[0] is came:
                    came.clear()
                    try:
                        return await attempt()
                    except TurnInProgress as error:
                        busy = error
                if left <= 0:
                    raise busy
                try:
                    await asyncio.wait_for(came.wait(), min(left, _POLL_SECONDS))
                except TimeoutError:
                    continue
