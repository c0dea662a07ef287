"""Hearing of it when a table of the relay changes, whoever changed it.

Its one invariant: `refresh` is called within a second of any change: Postgres notifies at once, and where that fails
(no connection, a pooler that swallows it) the second that has passed is enough.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import asyncpg
import structlog

from shared.errors import Unavailable

log = structlog.get_logger(__name__)

_EVERY_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 2.0
_CONNECT_SECONDS: Final = 3.0
_HEARD_SECONDS: Final = 5.0
_HELLO: Final = "hello"


class Changes:
    """Listens on the channel that the tables' triggers notify: `relay_` and the schema's name."""

    def __init__(self, url: str, schema: str, refresh: Callable[[], Awaitable[None]]) -> None:
        self._url = url
        self._channel = f"relay_{schema}"
        self._refresh = refresh
        self._changed = asyncio.Event()
        self._heard = asyncio.Event()

    async def run(self) -> None:
        """For ever."""
        listening = asyncio.create_task(self._keep_listening())
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), _EVERY_SECONDS)
                self._changed.clear()
                try:
                    await self._refresh()
                except Unavailable as error:
                    log.warning("refresh_delayed", reason=error.code)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _keep_listening(self) -> None:
        while True:
            try:
                async with self._listening() as ended:
                    await ended.wait()
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.info("not_listening", reason=type(error).__name__)
            await asyncio.sleep(_AGAIN_SECONDS)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[asyncio.Event]:
        connection = await asyncpg.connect(self._url, timeout=_CONNECT_SECONDS)
        ended = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: ended.set())
            await connection.add_listener(self._channel, self._on_notify)
            self._heard.clear()
            await connection.execute("SELECT pg_notify($1, $2)", self._channel, _HELLO)
            try:
                await asyncio.wait_for(self._heard.wait(), _HEARD_SECONDS)
            except TimeoutError:
                log.warning("notifications_not_heard", hint="LISTEN_DATABASE_URL must not lead through a pooler")
            self._changed.set()  # what changed before we listened
            yield ended
        finally:
            with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close(timeout=1)

    def _on_notify(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        self._heard.set()
        if payload != _HELLO:
            self._changed.set()
