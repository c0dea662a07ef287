"""Turns: a request and the answer to it, applied once.

Its one invariant: of a session at most one turn is open, and only the holder of the lease of the turn opened
last can write the answer, once.
"""

import secrets
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import and_, bindparam, func, insert, select
from sqlalchemy.sql.elements import ColumnElement
from uuid_utils import uuid7

from services.session_service import context, cursors, messages, sessions
from services.session_service.creation import find_or_create
from services.session_service.leases import close_overdue
from services.session_service.rewind import supersede_after
from services.session_service.schema import OPEN, session_messages
from services.session_service.schema import session_turns as table
from services.session_service.schema import sessions as _session
from services.session_service.sessions import NOW, SECOND, TOUCHED, Detail, IfVersion
from shared import wire
from shared.canonical import speaker
from shared.database import Conn, Database, Row, Writer
from shared.errors import LeaseLost, TurnClosed, TurnNotFound, ValidationFailed

mine: ColumnElement[bool] = and_(table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id"))
THIS = and_(mine, table.c.turn_id == bindparam("turn_id"))
COLUMNS: tuple[ColumnElement[Any], ...] = tuple(table.c[name] for name in wire.Turn.model_fields)
_lease_seconds = bindparam("lease_seconds", type_=sa.Integer)

_opened = (
    insert(table)
    .values(
        user_id=bindparam("user_id"),
        session_id=bindparam("session_id"),
        turn_id=bindparam("turn_id"),
        status=OPEN,
        lease_token=bindparam("lease_token"),
        lease_seconds=_lease_seconds,
        lease_expires_at=NOW + _lease_seconds * SECOND,
        opened_at=NOW,
        input_from_seq=bindparam("input_from_seq", type_=sa.Integer),
        input_to_seq=bindparam("input_to_seq", type_=sa.Integer),
    )
    .returning(table.c.lease_expires_at)
    .cte("opened")
)
OPEN_TURN = (
    sa.update(_session)
    .where(sessions.mine)
    .values(
        **TOUCHED,
        latest_turn_id=bindparam("turn_id", type_=sa.Text),
        lease_expires_at=_opened.c.lease_expires_at,
        window_start_seq=bindparam("window_start_seq", type_=sa.Integer),
    )
    .returning(*sessions.COLUMNS, _opened.c.lease_expires_at)
)
LAST_VISIBLE_ROLE = (
    select(session_messages.c.role)
    .where(messages.mine, session_messages.c.superseded_at.is_(None))
    .order_by(session_messages.c.seq.desc())
    .limit(1)
)


async def open_turn(
    writer: Writer,
    user_id: str,
    session_id: str,
    request: wire.OpenTurn,
    *,
    default_max_tokens: int,
    if_match: IfVersion | None = None,
) -> wire.TurnOpened:
    """Finds or makes the session, takes back what the request rewinds, stores its messages, opens the turn.

    All of it in one transaction. Raises TurnInProgress at once where another turn is open; waiting is waiting.py's.
    """
    drafts = [messages.draft(message) for message in request.messages]
    budget = context.Budget.of(request.context, default_max_tokens)

    async def work(conn: Conn) -> wire.TurnOpened:
        locked = await find_or_create(conn, user_id, session_id, request.create_session, if_match)
        await close_overdue(conn, locked)
        if request.rewind_to_seq is not None:
            await supersede_after(conn, locked, request.rewind_to_seq, "rewind_to_seq")
        if not drafts:
            await _require_user_last(conn, locked)
        turn_id = request.turn_id or str(uuid7())
        stored = await messages.append_drafts(conn, user_id, session_id, drafts, turn_id=turn_id) or []
        if request.rewind_to_seq is not None:
            locked = await sessions.lock(conn, user_id, session_id)
        elif stored:  # nothing else of what a context is made of has changed
            locked = replace(locked, last_seq=stored[-1].seq)
        built, window_start_seq = await context.build(conn, locked, budget, moves=True)
        lease_token = secrets.token_urlsafe(24)
        row = await conn.row(
            OPEN_TURN,
            **locked.key,
            turn_id=turn_id,
            lease_token=lease_token,
            lease_seconds=request.lease_seconds,
            input_from_seq=stored[0].seq if stored else None,
            input_to_seq=stored[-1].seq if stored else None,
            window_start_seq=window_start_seq,
        )
        assert row is not None  # noqa: S101 - the session is locked, so it is there
        values = dict(row.items())
        return wire.TurnOpened.model_construct(
            turn_id=turn_id,
            lease_token=lease_token,
            lease_expires_at=values.pop("lease_expires_at"),
            session=sessions.from_values(values),
            messages=stored,
            context=built,
        )

    return await writer.transact(work)


async def _require_user_last(conn: Conn, locked: Detail) -> None:
    role = await conn.value(LAST_VISIBLE_ROLE, **locked.key)
    if role is None or speaker(role) != "user":
        raise ValidationFailed.at("body", "messages", msg="May be empty only when the last message is the user's")


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
