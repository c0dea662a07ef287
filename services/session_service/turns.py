"""Turns: a request and the answer to it, applied once.

Its one invariant: of a session at most one turn is open, and only the holder of the lease of the turn opened
last can write the answer, once.
"""

import secrets
from typing import Any

import sqlalchemy as sa
from sqlalchemy import and_, bindparam, func, select
from sqlalchemy.sql.elements import ColumnElement

from services.session_service import cursors, messages, sessions
from services.session_service.schema import OPEN
from services.session_service.schema import session_turns as table
from services.session_service.schema import sessions as _session
from services.session_service.sessions import NOW, SECOND, TOUCHED, Detail
from shared import wire
from shared.database import Conn, Database, Row
from shared.errors import LeaseLost, TurnClosed, TurnNotFound

mine: ColumnElement[bool] = and_(table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id"))
THIS = and_(mine, table.c.turn_id == bindparam("turn_id"))
COLUMNS: tuple[ColumnElement[Any], ...] = tuple(table.c[name] for name in wire.Turn.model_fields)


def moved(version: ColumnElement[int]) -> ColumnElement[int]:
    """The version after a turn was opened or closed; the messages stored with that are a write of their own."""
    return version + 1 + func.least(messages.COUNT, 1)


# What a turn's opening and closing set in the session's row.
MOVED = TOUCHED | {"version": moved(_session.c.version)}

# ── renew ───────────────────────────────────────────────────────────────────────────────────────

GET = select(*COLUMNS).where(THIS)
GET_WITH_LEASE = select(*COLUMNS, table.c.lease_token, table.c.completion_hash).where(THIS)
RENEW = (
    sa.update(table)
    .where(THIS)
    .values(lease_expires_at=NOW + table.c.lease_seconds * SECOND)
    .returning(table.c.lease_expires_at)
)
TOUCH = (
    sa.update(_session)
    .where(sessions.mine)
    .values(**TOUCHED, lease_expires_at=bindparam("lease_expires_at", type_=sa.TIMESTAMP(timezone=True)))
)


def from_row(row: Row) -> wire.Turn:
    return wire.Turn.model_construct(**{name: row[name] for name in wire.Turn.model_fields})


async def held(conn: Conn, locked: Detail, turn_id: str, lease_token: str) -> Row:
    """The turn's row; LeaseLost for a wrong token."""
    row = await conn.row(GET_WITH_LEASE, **locked.key, turn_id=turn_id)
    if row is None:
        raise TurnNotFound
    if not secrets.compare_digest(row["lease_token"].encode(), lease_token.encode()):
        raise LeaseLost
    return row


async def renew(database: Database, user_id: str, session_id: str, turn_id: str, lease_token: str) -> wire.TurnRenewed:
    """The lease, running again for as long as it was opened for. Raises LeaseLost, TurnClosed."""

    async def work(conn: Conn) -> wire.TurnRenewed:
        locked = await sessions.lock(conn, user_id, session_id)
        row = await held(conn, locked, turn_id, lease_token)
        if row["status"] != "open":
            raise TurnClosed
        lease_expires_at = await conn.value(RENEW, **locked.key, turn_id=turn_id)
        if lease_expires_at is None:
            raise TurnNotFound  # its user is being erased
        await conn.rows(TOUCH, **locked.key, lease_expires_at=lease_expires_at)
        return wire.TurnRenewed.model_construct(turn_id=turn_id, lease_expires_at=lease_expires_at)

    return await database.transact(work)


# ── read ────────────────────────────────────────────────────────────────────────────────────────

LIST = (
    select(*COLUMNS)
    .where(
        mine,
        sa.or_(
            bindparam("after_id", type_=sa.Text).is_(None),
            sa.tuple_(table.c.opened_at, table.c.turn_id)
            < sa.tuple_(
                bindparam("after_moment", type_=sa.TIMESTAMP(timezone=True)), bindparam("after_id", type_=sa.Text)
            ),
        ),
    )
    .order_by(table.c.opened_at.desc(), table.c.turn_id.desc())
    .limit(bindparam("limit", type_=sa.Integer))
)
# Imports keep their turns' ids, so that several sessions may hold one; the order is the same each time.
FIND = (
    select(*COLUMNS)
    .where(table.c.user_id == bindparam("user_id"), table.c.turn_id == bindparam("turn_id"))
    .order_by(table.c.opened_at.desc(), table.c.session_id)
    .limit(1)
)
COUNT_OPEN = select(func.count()).select_from(table).where(table.c.status == OPEN)


async def get(conn: Conn, user_id: str, session_id: str, turn_id: str) -> wire.Turn:
    row = await conn.row(GET, user_id=user_id, session_id=session_id, turn_id=turn_id)
    if row is None:
        await sessions.get(conn, user_id, session_id)
        raise TurnNotFound
    return from_row(row)


async def find(conn: Conn, user_id: str, turn_id: str) -> wire.Turn:
    """The user's turn of this id, whatever its session: the newest opened one. Raises TurnNotFound."""
    row = await conn.row(FIND, user_id=user_id, turn_id=turn_id)
    if row is None:
        raise TurnNotFound
    return from_row(row)


async def list_turns(conn: Conn, user_id: str, session_id: str, *, limit: int, cursor: str | None) -> wire.TurnList:
    """A session's turns, newest first."""
    await sessions.get(conn, user_id, session_id)
    after_moment, after_id = cursors.decode(cursor, "turns") if cursor else (None, None)
    ids = {"user_id": user_id, "session_id": session_id}
    rows = await conn.rows(LIST, **ids, limit=limit + 1, after_moment=after_moment, after_id=after_id)
    turns = [from_row(row) for row in rows[:limit]]
    last = turns[-1] if len(rows) > limit else None
    return wire.TurnList.model_construct(
        turns=turns, next_cursor=cursors.encode("turns", last.opened_at, last.turn_id) if last else None
    )
