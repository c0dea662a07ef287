"""Taking messages back: they stay stored and counted as spent, and no longer belong to the conversation.

Its one invariant: message_count is the number of messages that are not superseded.
"""

import sqlalchemy as sa
from sqlalchemy import bindparam, case, func, select
from sqlalchemy.sql.elements import ColumnElement

from services.session_service import counting
from services.session_service.leases import close_overdue
from services.session_service.schema import session_messages
from services.session_service.schema import sessions as table
from services.session_service.sessions import COLUMNS, NOW, Detail, IfVersion, from_row, lock, mine
from shared import wire
from shared.database import Conn, Database
from shared.errors import ValidationFailed

_from_seq = bindparam("from_seq", type_=sa.Integer)
_to_seq = bindparam("to_seq", type_=sa.Integer)

_superseded = (
    sa.update(session_messages)
    .where(
        session_messages.c.user_id == bindparam("user_id"),
        session_messages.c.session_id == bindparam("session_id"),
        session_messages.c.seq.between(_from_seq, _to_seq),
        session_messages.c.superseded_at.is_(None),
    )
    .values(superseded_at=NOW)
    .returning(session_messages.c.seq, session_messages.c.tokens_used, session_messages.c.cost_usd)
    .cte("superseded")
)
_count = select(func.count()).select_from(_superseded).scalar_subquery()
_tokens = select(func.coalesce(func.sum(_superseded.c.tokens_used), 0)).scalar_subquery()
_cost = select(func.coalesce(func.sum(_superseded.c.cost_usd), 0)).scalar_subquery()
_covers_one: ColumnElement[bool] = (
    select(_superseded.c.seq).where(_superseded.c.seq <= table.c.summary_to_seq).correlate(table).exists()
)
_breaks_chain = table.c.chain_seq >= _from_seq
_is_behind_window = table.c.window_start_seq >= _from_seq
SUPERSEDE = (
    sa.update(table)
    .where(mine)
    .values(
        message_count=table.c.message_count - _count,
        superseded_tokens=table.c.superseded_tokens + _tokens,
        superseded_cost=table.c.superseded_cost + _cost,
        # A summary that tells of a message taken back would bring it back.
        session_summary=case((_covers_one, ""), else_=table.c.session_summary),
        summary_to_seq=case((_covers_one, sa.null()), else_=table.c.summary_to_seq),
        summary_model=case((_covers_one, sa.null()), else_=table.c.summary_model),
        # A rewind behind the window lets the next turn place it anew.
        window_start_seq=case(
            (table.c.window_start_seq >= _from_seq, table.c.first_seq), else_=table.c.window_start_seq
        ),
        rewinds=table.c.rewinds + 1,
        # What was known as one sequence has lost a part; it is put together again beside the request path.
        chain_count=case((_breaks_chain, 0), else_=table.c.chain_count),
        chain_seq=case((_breaks_chain, 0), else_=table.c.chain_seq),
        chain_hash=case((_breaks_chain, sa.literal_column("''::bytea")), else_=table.c.chain_hash),
        counted_to=counting.COUNTED_TO,
        updated_at=NOW,
        version=table.c.version + 1,
    )
    .returning(*COLUMNS)
)


async def supersede(conn: Conn, locked: Detail, *, from_seq: int, to_seq: int | None = None) -> wire.Session:
    """The session after its visible messages in from_seq…to_seq (default: the last) have been taken back."""
    last = locked.last_seq if to_seq is None else to_seq
    await counting.take_out(conn, locked.key, from_seq=from_seq, to_seq=last)
    return from_row(await conn.row(SUPERSEDE, **locked.key, from_seq=from_seq, to_seq=last))


async def rewind(
    database: Database, user_id: str, session_id: str, to_seq: int, if_match: IfVersion | None = None
) -> wire.Session:
    """The session with everything after `to_seq` taken back.

    Raises VersionMismatch, SessionNotActive, TurnInProgress, or ValidationFailed for a seq past the last.
    """

    async def work(conn: Conn) -> wire.Session:
        locked = await lock(conn, user_id, session_id, if_match)
        locked.require_active()
        locked.require_free()
        await close_overdue(conn, locked)
        return await supersede_after(conn, locked, to_seq, "to_seq")

    return await database.transact(work)


async def supersede_after(conn: Conn, locked: Detail, to_seq: int, field: str) -> wire.Session:
    """Takes back what comes after `to_seq`, which the body's `field` named; nothing may."""
    if to_seq > locked.last_seq:
        raise ValidationFailed.at("body", field, msg=f"The last message has seq {locked.last_seq}")
    if to_seq == locked.last_seq:
        return locked.session
    return await supersede(conn, locked, from_seq=to_seq + 1)
