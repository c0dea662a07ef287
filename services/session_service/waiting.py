"""Waiting for a busy session, in the order of arrival.

Its one invariant: of the callers that wait here for one session, only the one at the head of its line tries,
and a caller whose client has gone leaves the line without having tried.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar

from shared.errors import TurnInProgress

T = TypeVar("T")
Key = tuple[str, str]

_POLL_SECONDS: Final = 0.1
"""How often the head looks for turns that another instance closed, and for whether its client is still there."""


@dataclass(slots=True)
class _Line:
    """Those who wait for one session, in order of arrival, and what the head was told last."""

    waiting: deque[asyncio.Event] = field(default_factory=deque)
    busy: TurnInProgress | None = None


class Lines:
    """The lines of this process, one for each session that someone waits for."""

    def __init__(self) -> None:
        self._lines: dict[Key, _Line] = {}

    def wake(self, key: Key) -> None:
        """Tells the head of a line that its session may be free."""
        if line := self._lines.get(key):
            line.waiting[0].set()

    @asynccontextmanager
    async def _place(self, key: Key) -> AsyncIterator[tuple[asyncio.Event, _Line]]:
        line = self._lines.setdefault(key, _Line())
        turn_came = asyncio.Event()
        line.waiting.append(turn_came)
        try:
            yield turn_came, line
        finally:
            line.waiting.remove(turn_came)
            if line.waiting:
                line.waiting[0].set()
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
        """The value of `attempt` once it no longer says TurnInProgress; that error when the time is up.

        With no time to wait, whoever finds a line here is told so without overtaking it.
        """
        line = self._lines.get(key)
        if not seconds and line is not None and line.busy is not None:
            raise line.busy
        if not seconds:
            return await attempt()
        deadline = asyncio.get_running_loop().time() + seconds
        async with self._place(key) as (came, line):
            while True:
                left = deadline - asyncio.get_running_loop().time()
                if await is_gone():
                    raise line.busy or TurnInProgress(retry_after_seconds=1)
                if line.waiting[0] is came:
                    came.clear()
                    try:
                        return await attempt()
                    except TurnInProgress as error:
                        line.busy = error
                if left <= 0:
                    raise line.busy or TurnInProgress(retry_after_seconds=1)
                with suppress(TimeoutError):
                    await asyncio.wait_for(came.wait(), min(left, _POLL_SECONDS))
