"""Filling the search index beside the request path.

Its one invariant: a session whose version is past its indexed_version has news that are not indexed, and will be:
nothing that a writer has to do, nothing that a crash can lose. Any number of instances may run it; one works.
"""

import asyncio
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlalchemy import ARRAY, and_, bindparam, func, literal_column, or_, select
from sqlalchemy.dialects.postgresql import TSVECTOR, insert
from sqlalchemy.sql.elements import ColumnElement

from services.session_service import words
from services.session_service.schema import session_memories, session_messages, session_search
from services.session_service.schema import sessions as table
from services.session_service.sessions import NOW
from shared.database import Conn, Database, Row
from shared.errors import ServiceError

log = structlog.get_logger(__name__)

SESSIONS_AT_ONCE: Final = 200
MESSAGES_AT_ONCE: Final = 500
_LOCK: Final = 0x696E6478
# Longer than any statement may run: what was committed late is found again.
_OVERLAP: ColumnElement[Any] = literal_column("interval '1 minute'")

TRY_LOCK = select(func.pg_try_advisory_xact_lock(literal_column(str(_LOCK))))
NEWS = (
    select(
        table.c.user_id,
        table.c.session_id,
        table.c.title,
        table.c.version,
        table.c.last_seq,
        table.c.indexed_seq,
        table.c.indexed_at,
    )
    .where(table.c.indexed_version < table.c.version)
    .limit(SESSIONS_AT_ONCE)
)
MESSAGES = (
    select(session_messages.c.seq, func.left(session_messages.c.content, words.SEARCHED_BYTES).label("content"))
    .where(
        session_messages.c.user_id == bindparam("user_id"),
        session_messages.c.session_id == bindparam("session_id"),
        session_messages.c.seq > bindparam("indexed_seq", type_=sa.Integer),
    )
    .order_by(session_messages.c.seq)
    .limit(bindparam("limit", type_=sa.Integer))
)
_since = bindparam("indexed_at", type_=sa.TIMESTAMP(timezone=True))
MEMORIES = select(session_memories.c.memory_id, session_memories.c.content).where(
    session_memories.c.user_id == bindparam("user_id"),
    session_memories.c.session_id == bindparam("session_id"),
    or_(_since.is_(None), session_memories.c.updated_at > _since - _OVERLAP),
)

_ARRAYS: dict[str, sa.types.TypeEngine[Any]] = {
    "user_id": sa.Text(),
    "session_id": sa.Text(),
    "seq": sa.Integer(),
    "memory_id": sa.Text(),
    "words": sa.Text(),
    "is_long": sa.Boolean(),
}
_new = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _ARRAYS.items()))
    .table_valued(*_ARRAYS, name="new")
    .render_derived()
)
_put = insert(session_search).from_select(
    [*_ARRAYS], select(*(_new.c[name].cast(TSVECTOR) if name == "words" else _new.c[name] for name in _ARRAYS))
)
PUT = _put.on_conflict_do_update(
    index_elements=["user_id", "session_id", "seq", "memory_id"],
    set_={"words": _put.excluded.words, "is_long": _put.excluded.is_long},
    where=session_search.c.words != _put.excluded.words,
)

_done = (
    func.unnest(
        *(
            bindparam(f"{name}_array", type_=ARRAY(kind))
            for name, kind in {**_ARRAYS, "version": sa.BigInteger()}.items()
            if name in {"user_id", "session_id", "seq", "version"}
        )
    )
    .table_valued("user_id", "session_id", "seq", "version", name="done")
    .render_derived()
)
# A session that someone is just writing to is left for the next round: writers never wait for the index.
_free = (
    select(table.c.user_id, table.c.session_id)
    .join(_done, and_(table.c.user_id == _done.c.user_id, table.c.session_id == _done.c.session_id))
    .with_for_update(of=table, skip_locked=True)
    .cte("free")
)
MARK = (
    sa.update(table)
    .where(
        table.c.user_id == _free.c.user_id,
        table.c.session_id == _free.c.session_id,
        table.c.user_id == _done.c.user_id,
        table.c.session_id == _done.c.session_id,
    )
    .values(indexed_seq=_done.c.seq, indexed_version=_done.c.version, indexed_at=NOW)
)


async def index_news(database: Database) -> bool:
    """Indexes some of what is new; whether it left more than it took is what it gives."""

    async def work(conn: Conn) -> bool:
        if not await conn.value(TRY_LOCK):
            return False
        news = await conn.rows(NEWS)
        entries: list[tuple[Any, ...]] = []
        marks: list[tuple[str, str, int, int]] = []
        for row in news:
            seq, version = await _collect(conn, row, entries)
            marks.append((row["user_id"], row["session_id"], seq, version))
            if len(entries) >= MESSAGES_AT_ONCE:
                break  # the others are news still
        if entries:
            vectors = await asyncio.to_thread(_vectors, entries)
            await conn.rows(PUT, **_arrays(_ARRAYS, vectors))
        if marks:
            await conn.rows(MARK, **_arrays(("user_id", "session_id", "seq", "version"), marks))
        return len(entries) >= MESSAGES_AT_ONCE or len(news) == SESSIONS_AT_ONCE

    return await database.transact(work)


async def _collect(conn: Conn, row: Row, entries: list[tuple[Any, ...]]) -> tuple[int, int]:
    """Adds the session's new texts to `entries`; gives the seq and the version that will be indexed then."""
    key = {"user_id": row["user_id"], "session_id": row["session_id"]}
    place = (row["user_id"], row["session_id"])
    seq, version = row["indexed_seq"], row["version"]
    if row["title"] is not None:
        entries.append((*place, 0, "", row["title"]))
    if row["last_seq"] > seq:
        messages = await conn.rows(MESSAGES, **key, indexed_seq=seq, limit=MESSAGES_AT_ONCE)
        entries += [(*place, message["seq"], "", message["content"]) for message in messages]
        seq = messages[-1]["seq"] if messages else seq
        if len(messages) == MESSAGES_AT_ONCE:
            version = row["version"] - 1  # there may be more
    memories = await conn.rows(MEMORIES, **key, indexed_at=row["indexed_at"])
    entries += [(*place, 0, memory["memory_id"], memory["content"]) for memory in memories]
    return seq, version


def _vectors(entries: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(*entry[:-1], *words.vector(entry[0], entry[-1])) for entry in entries]


def _arrays(names: Any, rows: list[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {f"{name}_array": list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


async def keep_indexing(database: Database, *, interval_seconds: float) -> None:
    """Indexes what is new, for ever; an outage of the database only delays it."""
    while True:
        try:
            is_behind = await index_news(database)
        except ServiceError as error:
            log.warning("indexing_failed", reason=error.code)
            is_behind = False
        await asyncio.sleep(0 if is_behind else interval_seconds)
