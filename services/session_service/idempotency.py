"""Idempotency-Key: a creating request sent again gets the first one's answer and changes nothing.

Its one invariant: an answer is on record exactly when the write that it tells of is committed: one transaction
holds both. The key and its rules follow the IETF draft "The Idempotency-Key HTTP Header Field".
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import and_, bindparam, literal_column, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.session_service.schema import idempotency_records as table
from services.session_service.sessions import NOW
from shared.database import Conn, Database
from shared.errors import IdempotencyInProgress, IdempotencyKeyReused
from shared.json import dump_text

T = TypeVar("T")

WAIT_SECONDS: Final = 5.0
_LIFETIME: Final[ColumnElement[Any]] = literal_column("interval '24 hours'")

_mine = and_(
    table.c.user_id == bindparam("user_id"),
    table.c.scope == bindparam("scope"),
    table.c.idempotency_key == bindparam("idempotency_key"),
)
_claim = insert(table).values(
    user_id=bindparam("user_id"),
    scope=bindparam("scope"),
    idempotency_key=bindparam("idempotency_key"),
    body_hash=bindparam("body_hash", type_=sa.LargeBinary),
    created_at=NOW,
)
# Waits for a first request that is still at it, in whatever process: its row is there, not yet committed.
CLAIM = _claim.on_conflict_do_update(
    index_elements=["user_id", "scope", "idempotency_key"],
    set_={"body_hash": _claim.excluded.body_hash, "created_at": NOW, "answer": sa.null()},
    where=table.c.created_at <= NOW - _LIFETIME,
).returning(table.c.created_at)
GET = select(table.c.body_hash, table.c.answer).where(_mine, table.c.created_at > NOW - _LIFETIME)
RECORD = sa.update(table).where(_mine).values(answer=bindparam("answer", type_=sa.Text))
FORGET = (
    sa.delete(table)
    .where(
        sa.tuple_(table.c.user_id, table.c.scope, table.c.idempotency_key).in_(
            select(table.c.user_id, table.c.scope, table.c.idempotency_key)
            .where(table.c.created_at <= NOW - _LIFETIME)
            .limit(1000)
            .with_for_update(skip_locked=True)
        )
    )
    .returning(table.c.scope)
)


class Replayed(Exception):
    """The request was answered before; `answer` is that answer's JSON."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        super().__init__("answered before")


@dataclass(frozen=True, slots=True)
class Key:
    """What makes two requests the same: the user, the method and path, the key; and the body that came with it."""

    user_id: str
    scope: str
    idempotency_key: str
    body_hash: bytes

    @property
    def place(self) -> dict[str, str]:
        return {"user_id": self.user_id, "scope": self.scope, "idempotency_key": self.idempotency_key}


class Running:
    """Keys whose first request runs in this process, so that others wait here and hold no connection."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, ...], asyncio.Event] = {}

    @asynccontextmanager
    async def alone(self, key: Key) -> AsyncIterator[None]:
        """Enters when no other request with this key runs here; IdempotencyInProgress after WAIT_SECONDS."""
        place = tuple(key.place.values())
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while (first := self._running.get(place)) is not None:
                    await first.wait()
        except TimeoutError:
            raise IdempotencyInProgress(retry_after_seconds=1) from None
        done = self._running[place] = asyncio.Event()
        try:
            yield
        finally:
            del self._running[place]
            done.set()


class Once:
    """A writer that records the answer of what it writes under a key; Replayed where it is on record already."""

    def __init__(self, database: Database, key: Key) -> None:
        self._database = database
        self._key = key

    async def write(self, work: Callable[[Conn], Awaitable[T]]) -> T:
        return await self.transact(work)

    async def transact(self, work: Callable[[Conn], Awaitable[T]]) -> T:
        async def recorded(conn: Conn) -> T:
            await self._claim(conn)
            value = await work(conn)
            await conn.rows(RECORD, **self._key.place, answer=dump_text(value))
            return value

        return await self._database.transact(recorded)

    async def _claim(self, conn: Conn) -> None:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                claimed = await conn.row(CLAIM, **self._key.place, body_hash=self._key.body_hash)
        except TimeoutError:
            raise IdempotencyInProgress(retry_after_seconds=1) from None
        if claimed is None:
            await replay(conn, self._key)


async def replay(conn: Conn, key: Key) -> None:
    """Raises Replayed where the key's answer is on record, IdempotencyKeyReused where its body was another."""
    row: Any = await conn.row(GET, **key.place)
    if row is None:
        return
    if row["body_hash"] != key.body_hash:
        raise IdempotencyKeyReused
    raise Replayed(row["answer"])


async def forget(database: Database) -> int:
    """Deletes records past their day, batch by batch; gives their number."""
    deleted = 0
    while rows := await database.rows(FORGET):
        deleted += len(rows)
    return deleted
