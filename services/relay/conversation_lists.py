"""A user's conversations: some by their ids, or all of them in pages and by what they are.

Its one invariant: every statement here names one user, and a walk over pages gives every conversation once that was
there when it began.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, func, select
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.sql.elements import ColumnElement

from services.relay.conversation_schema import relay_conversations as table
from services.relay.conversations import COLUMNS, Conversation, from_row, own
from shared.database import Conn


@dataclass(frozen=True, slots=True)
class Filter:
    """Which of a user's conversations; None: whatever it is."""

    title: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None
    updated_from: datetime | None = None
    updated_before: datetime | None = None
    repository: str | None = None
    trigger: str | None = None
    with_children: bool = True


BY_IDS = select(*COLUMNS).where(own, table.c.id == func.any(bindparam("ids", type_=ARRAY(sa.Text))))
BY_SANDBOXES = (
    select(*COLUMNS)
    .where(own, table.c.sandbox_id == func.any(bindparam("ids", type_=ARRAY(sa.Text))))
    .order_by(table.c.created_at, table.c.id)
)
CHILDREN = (
    select(table.c.id, table.c.parent_id)
    .where(own, table.c.parent_id == func.any(bindparam("ids", type_=ARRAY(sa.Text))))
    .order_by(table.c.created_at, table.c.id)
)


def _or_null(name: str, type_: sa.types.TypeEngine[Any], says: ColumnElement[bool]) -> ColumnElement[bool]:
    return sa.or_(bindparam(name, type_=type_).is_(None), says)


_moment = TIMESTAMP(timezone=True)
_title = bindparam("title", type_=sa.Text)
_FOUND: Final = (
    own,
    _or_null(
        "title",
        sa.Text(),
        func.strpos(func.lower(func.coalesce(table.c.title, "Conversation " + table.c.id)), func.lower(_title)) > 0,
    ),
    _or_null("created_from", _moment, table.c.created_at >= bindparam("created_from", type_=_moment)),
    _or_null("created_before", _moment, table.c.created_at < bindparam("created_before", type_=_moment)),
    _or_null("updated_from", _moment, table.c.updated_at >= bindparam("updated_from", type_=_moment)),
    _or_null("updated_before", _moment, table.c.updated_at < bindparam("updated_before", type_=_moment)),
    _or_null("repository", sa.Text(), table.c.selected_repository == bindparam("repository", type_=sa.Text)),
    _or_null("trigger", sa.Text(), table.c.trigger == bindparam("trigger", type_=sa.Text)),
    sa.or_(bindparam("with_children", type_=sa.Boolean), table.c.parent_id.is_(None)),
)
_below = sa.tuple_(bindparam("below_moment", type_=_moment), bindparam("below_id", type_=sa.Text))
SEARCH = (
    select(*COLUMNS)
    .where(*_FOUND, _or_null("below_id", sa.Text(), sa.tuple_(table.c.created_at, table.c.id) < _below))
    .order_by(table.c.created_at.desc(), table.c.id.desc())
    .limit(bindparam("limit", type_=sa.Integer))
)
COUNT = select(func.count()).select_from(table).where(*_FOUND)


async def by_ids(conn: Conn, user_id: str, ids: Sequence[str]) -> dict[str, Conversation]:
    rows = await conn.rows(BY_IDS, user_id=user_id, ids=list(set(ids)))
    return {row["id"]: from_row(row) for row in rows}


async def by_sandboxes(conn: Conn, user_id: str, ids: Sequence[str]) -> dict[str, list[Conversation]]:
    """The conversations of each of these sandboxes, the oldest first; only sandboxes that the user has."""
    found: dict[str, list[Conversation]] = {}
    for row in await conn.rows(BY_SANDBOXES, user_id=user_id, ids=list(set(ids))):
        found.setdefault(row["sandbox_id"], []).append(from_row(row))
    return found


async def children(conn: Conn, user_id: str, ids: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {each: [] for each in ids}
    for row in await conn.rows(CHILDREN, user_id=user_id, ids=list(set(ids))):
        found[row["parent_id"]].append(row["id"])
    return found


async def search(
    conn: Conn, user_id: str, wanted: Filter, *, below: tuple[datetime, str] | None, limit: int
) -> list[Conversation]:
    """The newest first, those older than `below` (a time of creation, and an id)."""
    below_moment, below_id = below or (None, None)
    rows = await conn.rows(
        SEARCH, user_id=user_id, **_values(wanted), below_moment=below_moment, below_id=below_id, limit=limit
    )
    return [from_row(row) for row in rows]


async def count(conn: Conn, user_id: str, wanted: Filter) -> int:
    found: int = await conn.value(COUNT, user_id=user_id, **_values(wanted))
    return found


def _values(wanted: Filter) -> dict[str, Any]:
    return {name: getattr(wanted, name) for name in Filter.__dataclass_fields__}
