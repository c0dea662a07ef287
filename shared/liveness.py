"""A call that gets no answer: given up once the instance that was called answers nothing else either.

Its one invariant: an instance that lives is waited for, however long the call may take; one that hangs, its process
stopped or its machine gone, is not.
"""

import asyncio
from types import TracebackType
from typing import Final

import aiohttp
from yarl import URL

from shared.http_client import FAULTS, exchange

QUIET_SECONDS: Final = 5.0
"""How long an answer may take before the instance is asked whether it lives, and how long that may take."""


class WhileAlive:
    """`async with` it around a call: raises TimeoutError when the instance at `url` no longer lives.

    A timer and not a task: nearly every call is answered long before it is due.
    """

    __slots__ = ("_asking", "_over", "_quiet_seconds", "_timeout", "_timer", "_url")

    def __init__(self, over: aiohttp.ClientSession, url: str, quiet_seconds: float) -> None:
        self._over = over
        self._url = url
        self._quiet_seconds = quiet_seconds
        self._timeout = asyncio.timeout(None)
        self._asking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._quiet_seconds, self._due)

    def _due(self) -> None:
        self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        url, limit = URL(f"{self._url}/health/live", encoded=True), aiohttp.ClientTimeout(total=self._quiet_seconds)
        try:
            await exchange(self._over, "GET", url, headers={}, content=b"", timeout=limit)
        except TimeoutError:
            self._timeout.reschedule(asyncio.get_running_loop().time())
            return
        except FAULTS:
            pass  # it takes no connections any more: it stops, and still answers what it has begun
        self._wait()
