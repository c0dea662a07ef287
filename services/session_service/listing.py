"""A user's sessions in pages: by number with an honest total, or by cursor over a keyset.

Its one invariant: a walk by cursor gives every session once that was not touched meanwhile.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import ARRAY, Select, bindparam, func, or_, select, true, tuple_
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.sql.elements import ColumnElement

from services.session_service import cursors
from services.session_service.schema import sessions as table
from services.session_service.sessions import COLUMNS, active, expired, from_row
from shared import wire
from shared.database import Conn

Order = Literal["last_activity", "created_at"]


def _has_status(status: str | None) -> ColumnElement[bool]:
    if status is None:
        return true()
    if status == "active":
        return active
    stored = table.c.status == sa.literal_column(f"'{status}'")
    return or_(stored, expired) if status == "ended" else stored


def _among(*, of_ids: bool) -> ColumnElement[bool]:
    return table.c.session_id == func.any(bindparam("session_ids", type_=ARRAY(sa.Text))) if of_ids else true()


@cache
def _count(status: wire.Status | None, *, of_ids: bool) -> Select[Any]:
    wanted = (table.c.user_id == bindparam("user_id"), _has_status(status), _among(of_ids=of_ids))
    return select(func.count()).select_from(table).where(*wanted)


@cache
def _page(status: wire.Status | None, order: Order, *, by_cursor: bool, of_ids: bool) -> Select[Any]:
    moment = table.c[order]
    statement = (
        select(*COLUMNS)
        .where(table.c.user_id == bindparam("user_id"), _has_status(status), _among(of_ids=of_ids))
        .order_by(moment.desc(), table.c.session_id.desc())
        .limit(bindparam("limit", type_=sa.Integer))
    )
    if not by_cursor:
        return statement.offset(bindparam("offset", type_=sa.BigInteger))
    after = tuple_(bindparam("moment", type_=TIMESTAMP(timezone=True)), bindparam("after_id", type_=sa.Text))
    return statement.where(tuple_(moment, table.c.session_id) < after)


async def list_sessions(
    conn: Conn,
    user_id: str,
    *,
    status: wire.Status | None,
    active_only: bool,
    order: Order,
    page: int,
    page_size: int,
    cursor: str | None,
    session_ids: Sequence[str] | None = None,
) -> wire.SessionList:
    """One page, newest first; a cursor wins over `page`. With `session_ids` only of these sessions."""
    if active_only and status not in {None, "active"}:
        return wire.SessionList(sessions=[], total=0, page=page, page_size=page_size, next_cursor=None)
    status = "active" if active_only else status
    among = {"of_ids": session_ids is not None}
    bounds: dict[str, Any] = {"offset": (page - 1) * page_size}
    if cursor is not None:
        moment, after_id = cursors.decode(cursor, order)
        bounds = {"moment": moment, "after_id": after_id}
    statement = _page(status, order, by_cursor=cursor is not None, **among)
    rows = await conn.rows(statement, user_id=user_id, session_ids=session_ids, limit=page_size + 1, **bounds)
    total = await conn.value(_count(status, **among), user_id=user_id, session_ids=session_ids)
    sessions = [from_row(row) for row in rows[:page_size]]
    last = sessions[-1] if len(rows) > page_size else None
    return wire.SessionList.model_construct(
        sessions=sessions,
        total=total,
        page=page,
        page_size=page_size,
        next_cursor=cursors.encode(order, getattr(last, order), last.session_id) if last else None,
    )
