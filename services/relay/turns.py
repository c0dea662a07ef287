"""The turns that run in this process: let in while there is room, interrupted and awaited when the relay stops.

Its one invariant: once `stop` has returned no turn runs any more, so that what they use may be closed.
"""

import asyncio
from typing import Final

from services.relay.errors import TooManyRequests
from services.relay.parts import Caller, Parts
from services.relay.request import ClaudeRequest
from services.relay.turn import Turn

_FULL_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 4.0


class Turns:
    """The running turns of one relay."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._running: set[Turn] = set()

    @property
    def in_flight(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many of them wait for their session."""
        return self._parts.lines.waiting

    def begin(self, caller: Caller, request: ClaudeRequest) -> Turn:
        """Starts a turn; raises TooManyRequests when there are as many as there may be."""
        if len(self._running) >= self._parts.settings.relay_max_in_flight:
            raise TooManyRequests(retry_after_seconds=_FULL_SECONDS)
        turn = Turn(self._parts, caller, request)
        self._running.add(turn)
        turn.task.add_done_callback(lambda _: self._running.discard(turn))
        return turn

    async def stop(self) -> None:
        """Interrupts the turns that still run, and waits until what they have is kept."""
        tasks = [turn.task for turn in self._running]
        for turn in list(self._running):
            turn.interrupt()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_STOP_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
