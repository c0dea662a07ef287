"""Leases of open turns: who may still write, and closing the turns whose lease has run out.

Its one invariant: a session with an open turn has lease_expires_at, one without has none.
"""

import sqlalchemy as sa
from sqlalchemy import bindparam, literal_column

from services.session_service.schema import OPEN, session_turns
from services.session_service.schema import sessions as table
from services.session_service.sessions import NOW, Detail, mine
from shared.database import Conn

EXPIRE_TURN = (
    sa.update(session_turns)
    .where(
        session_turns.c.user_id == bindparam("user_id"),
        session_turns.c.session_id == bindparam("session_id"),
        session_turns.c.status == OPEN,
    )
    .values(status=literal_column("'expired'"), closed_at=NOW)
)
RELEASE = sa.update(table).where(mine).values(lease_expires_at=sa.null(), version=table.c.version + 1)


async def close_overdue(conn: Conn, locked: Detail) -> None:
    """Closes the open turn as expired, when there is one and its lease has run out; its messages stay."""
    if locked.has_open_turn and not locked.lease_left_seconds:
        await conn.rows(EXPIRE_TURN, **locked.key)
        await conn.rows(RELEASE, **locked.key)
