"""A session's messages in pages, by number or around a seq.

Its one invariant: a page is in the order of seq, whichever way it was asked for.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Select, bindparam, func, select

from services.session_service import sessions
from services.session_service.messages import COLUMNS, from_row, mine
from services.session_service.schema import session_messages as table
from shared import wire
from shared.database import Conn

Direction = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class Filter:
    role: wire.Role | None = None
    message_type: wire.MessageType | None = None
    include_superseded: bool = False

    @property
    def is_empty(self) -> bool:
        return self == Filter()


@cache
def _filtered(columns: tuple[Any, ...], wanted: Filter) -> Select[Any]:
    statement = select(*columns).where(mine)
    if wanted.role is not None:
        statement = statement.where(table.c.role == bindparam("role", wanted.role))
    if wanted.message_type is not None:
        statement = statement.where(table.c.message_type == bindparam("message_type", wanted.message_type))
    if not wanted.include_superseded:
        statement = statement.where(table.c.superseded_at.is_(None))
    return statement


@cache
def _count(wanted: Filter) -> Select[Any]:
    return _filtered((func.count(),), wanted)


@cache
def page_statement(wanted: Filter, order: Direction) -> Select[Any]:
    by_seq = table.c.seq.asc() if order == "asc" else table.c.seq.desc()
    limit, offset = bindparam("limit", type_=sa.Integer), bindparam("offset", type_=sa.BigInteger)
    return _filtered(COLUMNS, wanted).order_by(by_seq).limit(limit).offset(offset)


@cache
def _beside(wanted: Filter, side: Literal["after", "before"]) -> Select[Any]:
    seq = bindparam("seq", type_=sa.Integer)
    statement = _filtered(COLUMNS, wanted).limit(bindparam("limit", type_=sa.Integer))
    if side == "after":
        return statement.where(table.c.seq > seq).order_by(table.c.seq.asc())
    return statement.where(table.c.seq < seq).order_by(table.c.seq.desc())


async def list_messages(
    conn: Conn,
    user_id: str,
    session_id: str,
    *,
    wanted: Filter,
    order: Direction,
    page: int,
    page_size: int,
) -> wire.MessageList:
    """One page by number; `total` counts what the filter lets through."""
    total = await _total(conn, user_id, session_id, wanted)
    offset = (page - 1) * page_size
    rows = await conn.rows(
        page_statement(wanted, order), user_id=user_id, session_id=session_id, limit=page_size + 1, offset=offset
    )
    messages = [from_row(row) for row in rows[:page_size]]
    return wire.MessageList.model_construct(
        messages=messages, total=total, page=page, page_size=page_size, has_more=len(rows) > page_size
    )


async def list_beside(
    conn: Conn,
    user_id: str,
    session_id: str,
    *,
    wanted: Filter,
    order: Direction,
    side: Literal["after", "before"],
    seq: int,
    limit: int,
) -> wire.MessageList:
    """The nearest messages after or before a seq; `has_more` tells whether that side goes on."""
    total = await _total(conn, user_id, session_id, wanted)
    rows = await conn.rows(_beside(wanted, side), user_id=user_id, session_id=session_id, limit=limit + 1, seq=seq)
    messages = sorted((from_row(row) for row in rows[:limit]), key=lambda each: each.seq, reverse=order == "desc")
    return wire.MessageList.model_construct(
        messages=messages, total=total, page=1, page_size=limit, has_more=len(rows) > limit
    )


async def _total(conn: Conn, user_id: str, session_id: str, wanted: Filter) -> int:
    session = await sessions.get(conn, user_id, session_id)
    if wanted.is_empty:
        return session.message_count
    return int(await conn.value(_count(wanted), user_id=user_id, session_id=session_id))
