"""Memories: what should be remembered of a session beside its messages.

Its one invariant: a memory changes only while its session is not archived.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy import and_, bindparam, func, insert, select, tuple_
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.sql.elements import ColumnElement
from uuid_utils import uuid7

from services.session_service import cursors, sessions
from services.session_service.schema import session_memories as table
from services.session_service.schema import sessions as _session
from services.session_service.sessions import NOW
from shared import wire
from shared.database import Conn, Database, Row, Writer
from shared.errors import MemoryNotFound, SessionArchived

COLUMNS: tuple[ColumnElement[Any], ...] = (
    table.c.memory_id,
    table.c.session_id,
    table.c.user_id,
    table.c.memory_type,
    table.c.content,
    table.c.metadata,
    table.c.created_at,
    table.c.updated_at,
)
mine: ColumnElement[bool] = and_(table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id"))
_this = and_(mine, table.c.memory_id == bindparam("memory_id"))
_type, _content = bindparam("memory_type", type_=sa.Text), bindparam("content", type_=sa.Text)
_metadata = bindparam("metadata", type_=JSONB)

# A memory is a write to the session, and moves its version; being no activity, it does not keep it awake.
_write = (
    sa.update(_session)
    .where(sessions.mine, _session.c.status != sa.literal_column("'archived'"))
    .values(version=_session.c.version + 1, updated_at=NOW)
    .returning(_session.c.user_id, _session.c.session_id)
)
_written = _write.cte("written")
_written_with_this = _write.where(select(table.c.memory_id).where(_this).exists()).cte("written")
CREATE = (
    insert(table)
    .from_select(
        ["user_id", "session_id", "memory_id", "memory_type", "content", "metadata", "created_at", "updated_at"],
        select(_written.c.user_id, _written.c.session_id, bindparam("memory_id"), _type, _content, _metadata, NOW, NOW),
    )
    .returning(*COLUMNS)
)
UPDATE = (
    sa.update(table)
    .where(_this, table.c.session_id == _written_with_this.c.session_id)
    .values(
        memory_type=func.coalesce(_type, table.c.memory_type),
        content=func.coalesce(_content, table.c.content),
        metadata=func.coalesce(_metadata, table.c.metadata),
        updated_at=NOW,
    )
    .returning(*COLUMNS)
)
DELETE = (
    sa.delete(table).where(_this, table.c.session_id == _written_with_this.c.session_id).returning(table.c.memory_id)
)
# An imported copy keeps its memories' ids and times; of such twins the session tells the order.
_place = (table.c.created_at, table.c.memory_id, table.c.session_id)
_newest_first = tuple(column.desc() for column in _place)
NEWEST = select(*COLUMNS).where(mine).order_by(*_newest_first).limit(1)

_after_moment = bindparam("after_moment", type_=TIMESTAMP(timezone=True))
_after_id = bindparam("after_id", type_=sa.Text)
_after_session = bindparam("after_session", type_=sa.Text)
_found = and_(
    sa.or_(_after_id.is_(None), tuple_(*_place) < tuple_(_after_moment, _after_id, _after_session)),
    sa.or_(_type.is_(None), table.c.memory_type == _type),
    sa.or_(
        bindparam("q", type_=sa.Text).is_(None),
        func.strpos(func.lower(table.c.content), func.lower(bindparam("q", type_=sa.Text))) > 0,
    ),
)
_in_pages = select(*COLUMNS).order_by(*_newest_first).limit(bindparam("limit", type_=sa.Integer))
LIST = _in_pages.where(mine, _found)
LIST_OF_USER = _in_pages.where(table.c.user_id == bindparam("user_id"), _found)


def from_row(row: Row) -> wire.Memory:
    return wire.Memory.model_construct(**dict(row.items()))


async def _why_not(conn: Conn, user_id: str, session_id: str) -> Exception:
    session = await sessions.get(conn, user_id, session_id)
    return SessionArchived() if session.status == "archived" else MemoryNotFound()


async def create(writer: Writer, user_id: str, session_id: str, new: wire.NewMemory) -> wire.Memory:
    """The memory made. Raises SessionNotFound, SessionArchived."""

    async def work(conn: Conn) -> wire.Memory:
        row = await conn.row(
            CREATE,
            user_id=user_id,
            session_id=session_id,
            memory_id=str(uuid7()),
            memory_type=new.memory_type,
            content=new.content,
            metadata=new.metadata or {},
        )
        if row is None:
            raise await _why_not(conn, user_id, session_id)
        return from_row(row)

    return await writer.write(work)


async def get_newest(conn: Conn, user_id: str, session_id: str) -> wire.Memory:
    row = await conn.row(NEWEST, user_id=user_id, session_id=session_id)
    if row is None:
        await sessions.get(conn, user_id, session_id)
        raise MemoryNotFound
    return from_row(row)


async def update(
    database: Database, user_id: str, session_id: str, memory_id: str, change: wire.UpdateMemory
) -> wire.Memory:
    ids = {"user_id": user_id, "session_id": session_id, "memory_id": memory_id}
    row = await database.row(
        UPDATE, **ids, memory_type=change.memory_type, content=change.content, metadata=change.metadata
    )
    if row is None:
        raise await _why_not(database, user_id, session_id)
    return from_row(row)


async def delete(database: Database, user_id: str, session_id: str, memory_id: str) -> None:
    if await database.row(DELETE, user_id=user_id, session_id=session_id, memory_id=memory_id) is None:
        raise await _why_not(database, user_id, session_id)


async def list_memories(
    conn: Conn,
    user_id: str,
    session_id: str | None,
    *,
    limit: int,
    memory_type: wire.MemoryType | None = None,
    q: str | None = None,
    cursor: str | None = None,
) -> wire.MemoryList:
    """Memories of one session, or of all of a user's with `session_id` None; newest first."""
    moment, after_id = cursors.decode(cursor, "memories") if cursor else (None, None)
    asked: dict[str, Any] = {"user_id": user_id, "memory_type": memory_type, "q": q, "limit": limit + 1}
    after_session, _, after_memory = (after_id or "").partition("/")  # a session's id has none
    asked |= {"after_moment": moment, "after_id": after_id and after_memory, "after_session": after_session}
    if session_id is None:
        rows = await conn.rows(LIST_OF_USER, **asked)
    else:
        await sessions.get(conn, user_id, session_id)
        rows = await conn.rows(LIST, **asked, session_id=session_id)
    memories = [from_row(row) for row in rows[:limit]]
    last = memories[-1] if len(rows) > limit else None
    next_cursor = cursors.encode("memories", last.created_at, f"{last.session_id}/{last.memory_id}") if last else None
    return wire.MemoryList.model_construct(memories=memories, next_cursor=next_cursor)
