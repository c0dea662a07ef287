"""Hearing of it when a table of the relay changes, whoever changed it.

Its one invariant: what reads a table is called within a second or so of any change. Postgres notifies at once; that
it is heard is tried every second, and as long as it is not (no connection, a pooler that swallows it), everything is
read every second. No table waits for another one.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import asyncpg
import structlog

from services.relay.live import Live
from shared.errors import Unavailable

log = structlog.get_logger(__name__)

_EVERY_SECONDS: Final = 1.0
_CONNECT_SECONDS: Final = 3.0
_HELLO: Final = "hello"
_FAULTS: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)

Read = Callable[[], Awaitable[None]]


class Changes:
    """Listens on the channel that the tables' triggers notify: `relay_` and the schema's name.

    `readers` are called by the name of the table that has changed. `live` hears of single conversations.
    """

    def __init__(self, url: str, schema: str, readers: Mapping[str, Read], live: Live) -> None:
        self._url = url
        self._channel = f"relay_{schema}"
        self._readers = readers
        self._live = live
        self._changed = {table: asyncio.Event() for table in readers}
        self._heard = asyncio.Event()
        self._is_hearing = False

    async def run(self) -> None:
        """For ever."""
        tasks = [asyncio.create_task(self._keep_reading(table)) for table in self._readers]
        tasks.append(asyncio.create_task(self._keep_listening()))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_reading(self, table: str) -> None:
        changed = self._changed[table]
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), _EVERY_SECONDS)
            if self._is_hearing and not changed.is_set():
                continue
            changed.clear()
            if not await self._read(table):
                await asyncio.sleep(_EVERY_SECONDS)
                changed.set()

    async def _read(self, table: str) -> bool:
        """Whether that could be done now."""
        try:
            await self._readers[table]()
        except Unavailable as error:
            log.warning("refresh_delayed", table=table, reason=error.code)
            return False
        except Exception:  # the next change must be heard all the same
            log.exception("refresh_failed", table=table)
            return False
        return True

    async def _keep_listening(self) -> None:
        while True:
            try:
                await self._listen()
            except _FAULTS as error:
                log.info("not_listening", reason=type(error).__name__)
            await asyncio.sleep(_EVERY_SECONDS)

    async def _listen(self) -> None:
        """Listens until it no longer hears itself; raises one of _FAULTS."""
        connection = await asyncpg.connect(self._url, timeout=_CONNECT_SECONDS, command_timeout=_CONNECT_SECONDS)
        try:
            connection.add_termination_listener(self._on_end)
            await connection.add_listener(self._channel, self._on_notify)
            while True:
                self._heard.clear()
                await connection.execute("SELECT pg_notify($1, $2)", self._channel, _HELLO)
                try:
                    await asyncio.wait_for(self._heard.wait(), _EVERY_SECONDS)
                except TimeoutError:
                    if self._is_hearing:
                        raise
                    log.warning("notifications_not_heard", hint="LISTEN_DATABASE_URL must not lead through a pooler")
                    return
                if not self._is_hearing:
                    self._is_hearing = True
                    self._read_all()  # what changed before is not known
                await asyncio.sleep(_EVERY_SECONDS)
        finally:
            if self._is_hearing:
                self._on_end(connection)
            with contextlib.suppress(*_FAULTS):
                await connection.close(timeout=1)

    def _on_notify(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        if payload == _HELLO:
            self._heard.set()
        elif payload in self._readers:
            self._changed[str(payload)].set()
        else:
            self._live.heard(str(payload))

    def _on_end(self, _connection: Any) -> None:
        """Does not wait for the next try to find out that nothing is heard any more."""
        self._is_hearing = False
        self._read_all()

    def _read_all(self) -> None:
        for changed in self._changed.values():
            changed.set()
        self._live.wake_all()
