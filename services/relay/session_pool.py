"""The session pool: sessions of keys that opted in, and the current one, whose account has a warm prompt cache.

Its one invariant: nothing of one session leaves here for another one's request but the id of an account, and that
as a preference only.

A session enters once, with its first answer that was kept, while there is room. Account, model, last use and the
share of cache reads are those of its last turn, not of all: they say whether its cache is warm now. Turns only note
them; they are written beside the requests.
"""

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final

import structlog

from services.relay import pooled_sessions
from services.relay.errors import SessionNotPooled
from services.relay.keys import Key
from services.relay.pool import Pool
from services.relay.pooled_sessions import Entry, LastTurn
from shared.database import Conn, Database
from shared.session_client import SessionKey

log = structlog.get_logger(__name__)

_COLLECTED: Final = "[SessionPool] Collected session from whitelist API Key: {key} -> {session}"
_ADDED: Final = "[SessionPool] Added new session to pool: {session} (pool size: {size})"
_KEY_CHARACTERS: Final = len("cr_xxx")
_SESSION_CHARACTERS: Final = len("9f10edbb-")
_INPUT_TOKENS: Final = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class SessionPool:
    """The session pool, as far as this relay knows it. Call `refresh` before anything else."""

    def __init__(self, database: Database, pool: Pool, *, max_size: int) -> None:
        self._database = database
        self._pool = pool
        self.max_size = max_size
        self.preferred_account: str | None = None
        """The id of the current session's account."""
        self._known: set[SessionKey] = set()
        self._noted: dict[SessionKey, tuple[Key, LastTurn]] = {}
        self._saving = asyncio.Lock()
        self._reading = asyncio.Lock()

    # ── collecting ──────────────────────────────────────────────────────────────────────────────

    def note(
        self, key: Key, session: SessionKey, *, account_id: str | None, model: str | None, usage: Mapping[str, Any]
    ) -> None:
        """A turn of the session was just kept; means nothing where the key has not opted in."""
        if not key.collect_session:
            return
        inside = self._known | self._noted.keys()
        if session in inside or len(inside) < self.max_size:
            self._noted[session] = key, LastTurn(account_id, model, cache_read_share(usage), monotonic())

    async def save(self) -> None:
        """Writes what was noted; raises DatabaseUnavailable, and tries again the next time."""
        async with self._saving:
            if not (noted := dict(self._noted)):
                return
            turns = {session: turn for session, (_, turn) in noted.items()}
            touched = await pooled_sessions.touch(self._database, turns)
            if newcomers := {session: turn for session, turn in turns.items() if session not in touched}:
                for session, size in (await self._added(newcomers)).items():
                    _tell(noted[session][0], session, size)
                await self.refresh()
            for session, each in noted.items():
                if self._noted.get(session) is each:
                    del self._noted[session]

    async def _added(self, newcomers: Mapping[SessionKey, LastTurn]) -> dict[SessionKey, int]:
        async def work(conn: Conn) -> dict[SessionKey, int]:
            return await pooled_sessions.add(conn, newcomers, max_size=self.max_size)

        return await self._database.transact(work)

    async def refresh(self) -> None:
        """Reads the rows; raises DatabaseUnavailable."""
        async with self._reading:  # what was asked for last is what is known
            entries = await pooled_sessions.list_all(self._database)
            self._known = {entry.key for entry in entries}
            self.preferred_account = next((entry.account_id for entry in entries if entry.is_current), None)

    # ── what an administrator does ──────────────────────────────────────────────────────────────

    async def entries(self) -> list[Entry]:
        """All, in the order of collection."""
        await self.save()
        return await pooled_sessions.list_all(self._database)

    async def switch(self) -> Entry | None:
        """Makes the next healthy one in the order of collection current; None when there is no other."""

        def following(entries: list[Entry]) -> Entry | None:
            place = next((place for place, entry in enumerate(entries) if entry.is_current), len(entries))
            others = entries[place + 1 :] + entries[:place]
            return next((entry for entry in others if self.is_healthy(entry)), None)

        return await self._switched(following)

    async def set_current(self, session_id: str) -> None:
        """Makes this one current, of several with the same id the one collected first; raises SessionNotPooled."""

        def named(entries: list[Entry]) -> Entry:
            if found := next((entry for entry in entries if entry.session_id == session_id), None):
                return found
            raise SessionNotPooled

        await self._switched(named)

    async def _switched(self, choose: Callable[[list[Entry]], Entry | None]) -> Entry | None:
        async def work(conn: Conn) -> Entry | None:
            return await pooled_sessions.switch(conn, choose)

        await self.save()
        chosen = await self._database.transact(work)
        await self.refresh()
        return chosen

    async def clear(self) -> int:
        """Takes all out and says how many they were; the sessions themselves are untouched."""
        await self.save()
        async with self._saving:
            cleared = await self._database.transact(pooled_sessions.clear)
            self._noted.clear()
        await self.refresh()
        return cleared

    def is_healthy(self, entry: Entry) -> bool:
        """Whether its account can be used, at the latest when one of its slots is free again."""
        member = self._pool.members.get(entry.account_id or "")
        if member is None:
            return False
        obstacle = member.obstacle(monotonic())
        return obstacle is None or obstacle[0] == "full"


def cache_read_share(usage: Mapping[str, Any]) -> float | None:
    """Of all tokens that went in, the part that the prompt cache gave; None where none went in."""
    counts = [usage.get(name) or 0 for name in _INPUT_TOKENS]
    return round(counts[-1] / sum(counts), 4) if sum(counts) else None


def _tell(key: Key, session: SessionKey, size: int) -> None:
    """Only the beginnings of the key and the id: enough for people to tell them apart."""
    shown = session.session_id
    if len(shown) > _SESSION_CHARACTERS:
        shown = f"{shown[:_SESSION_CHARACTERS]}..."
    log.info(_COLLECTED.format(key=key.prefix[:_KEY_CHARACTERS], session=shown))
    log.info(_ADDED.format(session=shown, size=size))
