"""Giving something up from outside: at once where it waits, and before it begins where it does not yet.

Its one invariant: what runs outside of `watched` is never cut off in the middle.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.relay.errors import Interrupted


class Interruption:
    """Set once; what is being watched then ends with Interrupted, and so does whatever is to be watched later."""

    def __init__(self) -> None:
        self.is_set = False
        self._watched: asyncio.Timeout | None = None

    def set(self) -> None:
        if self._watched is not None and not self.is_set:
            self._watched.reschedule(asyncio.get_running_loop().time())
        self.is_set = True

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Raises Interrupted as soon as it is set; whatever runs inside is cancelled."""
        if self.is_set:
            raise Interrupted
        self._watched = asyncio.timeout(None)
        try:
            async with self._watched:
                yield
        except TimeoutError:
            if self.is_set:
                raise Interrupted from None
            raise
        finally:
            self._watched = None
