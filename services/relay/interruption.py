"""Giving something up from outside: at once where it waits, and before it begins where it does not yet.

Its one invariant: what runs outside of `watched` is never cut off in the middle.
"""

import asyncio
from types import TracebackType

from services.relay.errors import Interrupted


class Interruption:
    """Set once; what is being watched then ends with Interrupted, and so does whatever is to be watched later."""

    def __init__(self) -> None:
        self.is_set = False
        self.timeout: asyncio.Timeout | None = None
        """Of what is being watched."""

    def set(self) -> None:
        if self.timeout is not None and not self.is_set:
            self.timeout.reschedule(asyncio.get_running_loop().time())
        self.is_set = True

    def watched(self) -> "_Watch":
        """`async with` it: raises Interrupted as soon as it is set; whatever runs inside is cancelled."""
        return _Watch(self)


class _Watch:
    """No generator: a stream would hold its frame for as long as it runs."""

    __slots__ = ("_interruption", "_timeout")

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        if self._interruption.is_set:
            raise Interrupted
        await self._timeout.__aenter__()
        self._interruption.timeout = self._timeout

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interruption.timeout = None
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as passed:
            error = passed
        if isinstance(error, TimeoutError):
            raise (Interrupted if self._interruption.is_set else error) from None
