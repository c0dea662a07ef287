"""Messages: appending them, and reading them back.

Its one invariant: the seqs of a session are 1, 2, 3 … without a gap or a twin, and the session's counters
are the sums over its rows; one statement, `APPEND`, moves both.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ARRAY, Insert, and_, bindparam, case, func, insert, select
from sqlalchemy.sql.elements import ColumnElement

from services.session_service import sessions
from services.session_service.drafts import ARRAYS, JSON_ARRAYS, Draft, draft, parameters, stored
from services.session_service.schema import session_messages as table
from services.session_service.schema import sessions as _session
from services.session_service.sessions import TOUCHED, active, lease_is_over
from shared import wire
from shared.database import Conn, Database, Row, Violation, Writer
from shared.errors import MessageExists, MessageNotFound, TurnInProgress
from shared.json import equal

COLUMNS: tuple[ColumnElement[Any], ...] = (
    table.c.message_id,
    table.c.session_id,
    table.c.user_id,
    table.c.seq,
    table.c.role,
    table.c.content,
    table.c.content_blocks,
    table.c.message_type,
    table.c.metadata,
    table.c.native,
    table.c.tokens_used,
    table.c.cost_usd,
    table.c.created_at,
    table.c.superseded_at,
)
mine: ColumnElement[bool] = and_(table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id"))

# ── append ──────────────────────────────────────────────────────────────────────────────────────

_new = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in ARRAYS.items()))
    .table_valued(*ARRAYS, with_ordinality="place", name="new")
    .render_derived()
)
COUNT = bindparam("count", type_=sa.Integer)
# What storing `parameters` of drafts sets in the session's row.
COUNTED: dict[str, ColumnElement[Any]] = {
    "message_count": _session.c.message_count + COUNT,
    "last_seq": _session.c.last_seq + COUNT,
    "total_tokens": _session.c.total_tokens + bindparam("tokens", type_=sa.BigInteger),
    "total_cost": _session.c.total_cost + bindparam("cost", type_=sa.Numeric),
}


def span(last_seq: ColumnElement[int]) -> tuple[ColumnElement[int], ColumnElement[int]]:
    """First and last seq of what is stored after `last_seq`; null where nothing is."""
    return case((COUNT > 0, last_seq + 1)), case((COUNT > 0, last_seq + COUNT))


def storing(advanced: sa.CTE, turn_id: ColumnElement[str] | None = None) -> Insert:
    """The insert of the drafts into the session whose row `advanced` has just made COUNTED."""
    return insert(table).from_select(
        ["user_id", "session_id", "turn_id", "created_at", "seq", *ARRAYS],
        select(
            advanced.c.user_id,
            advanced.c.session_id,
            sa.null().cast(sa.Text) if turn_id is None else turn_id,
            advanced.c.last_activity,
            advanced.c.last_seq - COUNT + _new.c.place,
            *(_new.c[name].cast(JSON_ARRAYS[name]) if name in JSON_ARRAYS else _new.c[name] for name in ARRAYS),
        ).select_from(advanced.join(_new, sa.true())),
    )


APPEND = storing(
    sa.update(_session)
    .where(sessions.mine, active, lease_is_over)
    .values(**COUNTED, **TOUCHED)
    .returning(_session.c.user_id, _session.c.session_id, _session.c.last_seq, _session.c.last_activity)
    .cte("advanced")
).returning(table.c.seq, table.c.created_at)


_TRIES = 5


async def append_drafts(conn: Conn, user_id: str, session_id: str, drafts: list[Draft]) -> list[wire.Message] | None:
    """The messages stored, at least one; None when the session cannot take them."""
    rows = await conn.rows(APPEND, user_id=user_id, session_id=session_id, **parameters(drafts))
    if not rows:
        return None
    last_seq = max(row["seq"] for row in rows)
    return stored(drafts, user_id, session_id, last_seq, rows[0]["created_at"])


Gather = Callable[[str, str, Draft], Awaitable[wire.Message | None]]
"""Stores a message together with others, or gives None."""


async def append(
    writer: Writer,
    database: Database,
    user_id: str,
    session_id: str,
    message: wire.NewMessage,
    gather: Gather | None = None,
) -> wire.Message:
    """The message stored. One that was stored before under its message_id is given again.

    Raises SessionNotFound, SessionNotActive, TurnInProgress, or MessageExists for another body.
    """
    drafted = draft(message)
    gathered = await gather(user_id, session_id, drafted) if gather and writer is database else None
    return gathered or await _append_alone(writer, database, user_id, session_id, drafted)


async def _append_alone(
    writer: Writer, database: Database, user_id: str, session_id: str, drafted: Draft
) -> wire.Message:
    message = drafted.message

    async def work(conn: Conn) -> wire.Message:
        appended = await append_drafts(conn, user_id, session_id, [drafted])
        if appended is None:
            raise _NotAppended
        return appended[0]

    async def again(conn: Conn) -> wire.Message:
        earlier = await conn.row(GET, user_id=user_id, message_id=message.message_id)
        if earlier is None:
            raise _NotAppended
        return _same(from_row(earlier), session_id, drafted)

    for _ in range(_TRIES):
        try:
            return await writer.write(work)
        except _NotAppended:
            pass
        except Violation as violation:
            if violation.constraint != "session_messages_message_id_key":
                raise
        if message.message_id is not None:
            with suppress(_NotAppended):
                return await writer.write(again)
        # Where nothing is in the way any more (the session was just made, a turn just closed), it is tried again.
        await _require_appendable(database, user_id, session_id)
    raise TurnInProgress(retry_after_seconds=1)


class _NotAppended(Exception):
    """The session could not take the message."""


def _same(earlier: wire.Message, session_id: str, drafted: Draft) -> wire.Message:
    again = drafted.stored(earlier.user_id, session_id, earlier.seq, earlier.created_at)
    again.superseded_at = earlier.superseded_at
    if not equal(again.__dict__, earlier.__dict__):
        raise MessageExists
    return earlier


async def _require_appendable(database: Database, user_id: str, session_id: str) -> None:
    """Raises what keeps an append out of the session; asked only after something has."""

    async def work(conn: Conn) -> None:
        locked = await sessions.lock(conn, user_id, session_id)
        locked.require_active()
        locked.require_free()

    await database.transact(work)


# ── read ────────────────────────────────────────────────────────────────────────────────────────

GET = select(*COLUMNS).where(table.c.user_id == bindparam("user_id"), table.c.message_id == bindparam("message_id"))


def from_row(row: Row) -> wire.Message:
    return wire.Message.model_construct(**dict(row.items()))


async def get(conn: Conn, user_id: str, session_id: str, message_id: str) -> wire.Message:
    row = await conn.row(GET, user_id=user_id, message_id=message_id)
    if row is None or row["session_id"] != session_id:
        await sessions.get(conn, user_id, session_id)
        raise MessageNotFound
    return from_row(row)
