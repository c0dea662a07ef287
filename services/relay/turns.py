"""The turns of this process: let in, interrupted and awaited when the relay stops.

Its one invariant: once `stop` has returned no turn runs any more, so that what they use may be closed.
"""

import asyncio
from typing import Final

from services.relay.admission import Entry
from services.relay.parts import Caller, Parts
from services.relay.request import ClaudeRequest
from services.relay.turn import Turn

_STOP_SECONDS: Final = 4.0


class Turns:
    """The running turns of one relay."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._running: set[Turn] = set()

    def begin(self, caller: Caller, request: ClaudeRequest) -> Turn:
        """Starts a turn; raises TooManyRequests when there are as many as there may be."""
        entry = self._parts.admission.enter()
        turn = Turn(self._parts, caller, request, entry)
        self._running.add(turn)
        turn.task.add_done_callback(lambda _: self._ended(turn, entry))
        return turn

    def _ended(self, turn: Turn, entry: Entry) -> None:
        self._running.discard(turn)
        entry.leave()

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
