"""Making sessions, and bringing ended ones back.

Its one invariant: of any number of callers that make the same session at once, one makes it and the others find it.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, case, func, literal_column
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.sql.elements import ColumnElement
from uuid_utils import uuid7

from services.session_service.leases import close_overdue
from services.session_service.rewind import supersede
from services.session_service.schema import ACTIVE
from services.session_service.schema import sessions as table
from services.session_service.sessions import (
    COLUMNS,
    DETAILS,
    MOMENT,
    NOW,
    SECOND,
    TOUCHED,
    Detail,
    IfVersion,
    detail_of,
    from_row,
    get,
    lock,
    mine,
)
from shared import wire
from shared.database import Conn, Writer
from shared.errors import SessionArchived, SessionExists, SessionNotActive, SessionNotFound

_title = bindparam("title", type_=sa.Text)
_metadata = bindparam("metadata", type_=JSONB)
_conversation_data = bindparam("conversation_data", type_=JSONB)
_idle = bindparam("idle_timeout_seconds", type_=sa.Integer)
_restarts = bindparam("restarts", type_=sa.Boolean)
_EMPTY: ColumnElement[Any] = literal_column("'{}'::jsonb")

NEW = (
    insert(table)
    .values(
        user_id=bindparam("user_id"),
        session_id=bindparam("session_id"),
        title=_title,
        metadata=func.coalesce(_metadata, _EMPTY),
        conversation_data=func.coalesce(_conversation_data, _EMPTY),
        idle_timeout_seconds=_idle,
        created_at=NOW,
        updated_at=NOW,
        last_activity=NOW,
        expires_at=NOW + _idle * SECOND,
    )
    .on_conflict_do_nothing(index_elements=["user_id", "session_id"])
)
CREATE = NEW.returning(*COLUMNS)

# For a transaction that goes on with what it has made.
CREATE_LOCKED = CREATE.returning(*DETAILS)

REVIVE = (
    sa.update(table)
    .where(mine)
    .values(
        **TOUCHED
        | {
            "status": ACTIVE,
            "ended_reason": sa.null(),
            "generation": table.c.generation + 1,
            "session_summary": case((_restarts, ""), else_=table.c.session_summary),
            "summary_to_seq": case((_restarts, sa.null()), else_=table.c.summary_to_seq),
            "summary_model": case((_restarts, sa.null()), else_=table.c.summary_model),
            "first_seq": case((_restarts, table.c.last_seq + 1), else_=table.c.first_seq),
            "window_start_seq": case((_restarts, table.c.last_seq + 1), else_=table.c.window_start_seq),
            "title": func.coalesce(_title, table.c.title),
            "metadata": func.coalesce(_metadata, table.c.metadata),
            "conversation_data": func.coalesce(_conversation_data, table.c.conversation_data),
            "idle_timeout_seconds": func.coalesce(_idle, table.c.idle_timeout_seconds),
            "expires_at": MOMENT + func.coalesce(_idle, table.c.idle_timeout_seconds) * SECOND,
            # An answer to what a restart took back has nothing to follow; after a resume it may still come.
            "latest_turn_id": case((_restarts, sa.null()), else_=table.c.latest_turn_id),
        }
    )
    .returning(*COLUMNS)
)


def values(options: wire.SessionOptions) -> dict[str, Any]:
    return {
        "title": options.title,
        "metadata": options.metadata,
        "conversation_data": options.conversation_data,
        "idle_timeout_seconds": options.idle_timeout_seconds,
    }


async def create(writer: Writer, new: wire.CreateSession) -> wire.Session:
    """The session made, or the one found where `if_exists` says so; else SessionExists."""
    session_id = new.session_id or str(uuid7())
    revives = new.if_exists in {"restart", "resume"}

    async def work(conn: Conn) -> wire.Session:
        row = await conn.row(CREATE, user_id=new.user_id, session_id=session_id, **values(new))
        if row is not None:
            return from_row(row)
        if new.if_exists == "return":
            return await get(conn, new.user_id, session_id)
        if not revives:
            raise SessionExists
        locked = await lock(conn, new.user_id, session_id)
        return locked.session if locked.session.is_active else await revive(conn, locked, new)

    return await (writer.transact(work) if revives else writer.write(work))


async def find_or_create(
    conn: Conn,
    user_id: str,
    session_id: str,
    options: wire.SessionOptions | None,
    if_match: IfVersion | None = None,
) -> Detail:
    """The session, locked and active; made or brought back as `options` say (None: it must be there)."""
    try:
        locked = await lock(conn, user_id, session_id, if_match)
    except SessionNotFound:
        if options is None:
            raise
        if if_match is not None:
            if_match.require(None)
        made = await conn.row(CREATE_LOCKED, user_id=user_id, session_id=session_id, **values(options))
        if made is not None:
            return detail_of(made)
        locked = await lock(conn, user_id, session_id)
    if options is not None and options.if_exists == "error":
        raise SessionExists
    if options is not None and options.if_exists in {"restart", "resume"} and locked.session.status == "ended":
        await revive(conn, locked, options)
        return await lock(conn, user_id, session_id)
    locked.require_active()
    locked.require_free()
    return locked


async def revive(conn: Conn, locked: Detail, options: wire.SessionOptions) -> wire.Session:
    """An ended session, active again: with nothing to be seen (`restart`), or with what it had (`resume`).

    Raises SessionArchived or SessionNotActive for one that is not ended, TurnInProgress while a turn holds it.
    """
    if locked.session.status == "archived":
        raise SessionArchived
    if locked.session.status != "ended":
        raise SessionNotActive
    locked.require_free()
    await close_overdue(conn, locked)
    restarts = options.if_exists == "restart"
    if restarts:
        await supersede(conn, locked, from_seq=locked.first_seq)
    return from_row(await conn.row(REVIVE, **locked.key, **values(options), restarts=restarts))
