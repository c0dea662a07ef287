"""Who in this relay waits for news of a conversation: clients that watch it, its run, and those who pause it.

Its one invariant: whoever waits is woken after every change, whichever relay has made it: at once when Postgres
notifies, within a second or so where it does not.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import ARRAY, Text, bindparam, func, select

from services.relay.conversation_schema import relay_conversations as table
from shared.database import Conn
from shared.errors import DatabaseUnavailable

_PREFIX: Final = "conversation "
CHANGED_AT = select(table.c.id, table.c.next_seq, table.c.wants_pause, table.c.wants_run, table.c.run_id).where(
    table.c.id == func.any(bindparam("ids", type_=ARRAY(Text)))
)


class Live:
    """The watchers of one relay."""

    def __init__(self, conn: Conn) -> None:
        self._conn = conn
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._seen: dict[str, tuple[object, ...]] = {}

    @contextmanager
    def watching(self, conversation_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever there is news; whoever has looked clears it before looking again."""
        news = asyncio.Event()
        self._watchers.setdefault(conversation_id, set()).add(news)
        try:
            yield news
        finally:
            watchers = self._watchers[conversation_id]
            watchers.discard(news)
            if not watchers:
                del self._watchers[conversation_id]
                self._seen.pop(conversation_id, None)

    def heard(self, payload: str) -> None:
        """What the relay's channel says."""
        if payload.startswith(_PREFIX):
            self.wake(payload.removeprefix(_PREFIX))

    def wake(self, conversation_id: str) -> None:
        for news in self._watchers.get(conversation_id, ()):
            news.set()

    def wake_all(self) -> None:
        for conversation_id in self._watchers:
            self.wake(conversation_id)

    async def look(self) -> None:
        """Wakes those whose conversation has changed since the last look.

        Raises DatabaseUnavailable, and wakes all: none of them may wait on for what cannot be seen.
        """
        if not self._watchers:
            return
        try:
            rows = await self._conn.rows(CHANGED_AT, ids=list(self._watchers))
        except DatabaseUnavailable:
            self.wake_all()
            raise
        found = {row["id"]: tuple(row) for row in rows}
        for conversation_id in list(self._watchers):
            state = found.get(conversation_id, ())
            if self._seen.get(conversation_id) != state:
                self._seen[conversation_id] = state
                self.wake(conversation_id)
