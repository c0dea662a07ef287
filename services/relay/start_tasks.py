"""Start tasks: the rows. How far the start of a conversation has come.

Its one invariant: READY and ERROR are final; until then one relay works on a task, and holds it by a time that it
moves on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert
from sqlalchemy.sql import Select
from sqlalchemy.sql.elements import ColumnElement

from services.relay.conversation_schema import relay_start_tasks as table
from shared.database import Conn, Row

Status = Literal[
    "WORKING",
    "WAITING_FOR_SANDBOX",
    "PREPARING_REPOSITORY",
    "RUNNING_SETUP_SCRIPT",
    "STARTING_CONVERSATION",
    "READY",
    "ERROR",
]
SortOrder = Literal["CREATED_AT", "CREATED_AT_DESC", "UPDATED_AT", "UPDATED_AT_DESC"]

LEASE_SECONDS: Final = 10.0
RENEW_SECONDS: Final = 2.0
_NOW = func.statement_timestamp()
_SECOND: ColumnElement[Any] = literal_column("interval '1 second'")
_LEASE = _NOW + sa.literal_column(str(LEASE_SECONDS)) * _SECOND


@dataclass(frozen=True, slots=True)
class StartTask:
    """A row; `conversation_id` is what is going to be the conversation's."""

    id: str
    user_id: str
    status: Status
    detail: str | None
    app_conversation_id: str | None
    conversation_id: str
    sandbox_id: str | None
    agent_server_url: str | None
    request: dict[str, Any]
    created_at: datetime
    updated_at: datetime


_COLUMNS: Final = tuple(table.c[name] for name in StartTask.__dataclass_fields__)
_open: ColumnElement[bool] = literal_column("status NOT IN ('READY', 'ERROR')")
_own = table.c.user_id == bindparam("user_id")
_moment = TIMESTAMP(timezone=True)

CREATE = (
    insert(table)
    .values(
        **{name: bindparam(name, type_=table.c[name].type) for name in ("id", "user_id", "conversation_id", "request")},
        status="WORKING",
        expires_at=_LEASE,
        created_at=_NOW,
        updated_at=_NOW,
    )
    .returning(*_COLUMNS)
)
_told = {
    name: func.coalesce(bindparam(name, type_=sa.Text), table.c[name])
    for name in ("detail", "app_conversation_id", "sandbox_id", "agent_server_url")
}
ADVANCE = (
    sa.update(table)
    .where(table.c.id == bindparam("id"), _open)
    .values(status=bindparam("status"), **_told, expires_at=_LEASE, updated_at=_NOW)
    .returning(*_COLUMNS)
)
RENEW = (
    sa.update(table)
    .where(table.c.id == func.any(bindparam("ids", type_=ARRAY(sa.Text))), _open)
    .values(expires_at=_LEASE)
)
STRANDED = select(table.c.id, table.c.conversation_id, table.c.expires_at).where(_open, table.c.expires_at < _NOW)
GIVE_UP = (
    sa.update(table)
    .where(
        table.c.id == bindparam("id"),
        _open,
        table.c.expires_at == bindparam("expires_at", type_=_moment),
    )
    .values(status="ERROR", detail=bindparam("detail"), updated_at=_NOW)
    .returning(table.c.id)
)
BY_IDS = select(*_COLUMNS).where(_own, table.c.id == func.any(bindparam("ids", type_=ARRAY(sa.Text))))
_FOUND: Final = (
    _own,
    sa.or_(
        bindparam("conversation_id", type_=sa.Text).is_(None),
        table.c.app_conversation_id == bindparam("conversation_id", type_=sa.Text),
    ),
    sa.or_(
        bindparam("created_from", type_=_moment).is_(None),
        table.c.created_at >= bindparam("created_from", type_=_moment),
    ),
)
COUNT = select(func.count()).select_from(table).where(*_FOUND)


def _search(order: SortOrder) -> Select[Any]:
    moment = table.c["updated_at" if order.startswith("UPDATED") else "created_at"]
    place = sa.tuple_(moment, table.c.id)
    last = sa.tuple_(bindparam("last_moment", type_=_moment), bindparam("last_id", type_=sa.Text))
    is_descending = order.endswith("DESC")
    beyond = place < last if is_descending else place > last
    directions = (moment.desc(), table.c.id.desc()) if is_descending else (moment, table.c.id)
    return (
        select(*_COLUMNS)
        .where(*_FOUND, sa.or_(bindparam("last_id", type_=sa.Text).is_(None), beyond))
        .order_by(*directions)
        .limit(bindparam("limit", type_=sa.Integer))
    )


SEARCHES: Final[dict[SortOrder, Select[Any]]] = {
    order: _search(order) for order in ("CREATED_AT", "CREATED_AT_DESC", "UPDATED_AT", "UPDATED_AT_DESC")
}


def from_row(row: Row) -> StartTask:
    return StartTask(*(row[name] for name in StartTask.__dataclass_fields__))


async def create(conn: Conn, *, task_id: str, user_id: str, conversation_id: str, request: dict[str, Any]) -> StartTask:
    row = await conn.row(CREATE, id=task_id, user_id=user_id, conversation_id=conversation_id, request=request)
    assert row is not None  # noqa: S101 - an insert returns its row
    return from_row(row)


async def advance(conn: Conn, task_id: str, status: Status, **told: str) -> StartTask | None:
    """The task in its next status, with what is known now; None when another relay has given it up."""
    values = {name: told.get(name) for name in _told}
    row = await conn.row(ADVANCE, id=task_id, status=status, **values)
    return None if row is None else from_row(row)


async def by_ids(conn: Conn, user_id: str, ids: Sequence[str]) -> dict[str, StartTask]:
    return {row["id"]: from_row(row) for row in await conn.rows(BY_IDS, user_id=user_id, ids=list(set(ids)))}


async def search(
    conn: Conn,
    user_id: str,
    *,
    conversation_id: str | None,
    created_from: datetime | None,
    order: SortOrder,
    last: tuple[datetime, str] | None,
    limit: int,
) -> list[StartTask]:
    """Tasks in this order, those after `last` (a time of the order's kind, and an id)."""
    last_moment, last_id = last or (None, None)
    rows = await conn.rows(
        SEARCHES[order],
        user_id=user_id,
        conversation_id=conversation_id,
        created_from=created_from,
        last_moment=last_moment,
        last_id=last_id,
        limit=limit,
    )
    return [from_row(row) for row in rows]


async def count(conn: Conn, user_id: str, *, conversation_id: str | None, created_from: datetime | None) -> int:
    found: int = await conn.value(COUNT, user_id=user_id, conversation_id=conversation_id, created_from=created_from)
    return found
