"""Lining a client's message array up with the stored history, by hashes alone.

Its one invariant: `matched` messages of the client's are, in order, the first `matched` visible ones here.
"""

from itertools import islice

import sqlalchemy as sa
from sqlalchemy import bindparam, select

from services.session_service import sessions
from services.session_service.messages import mine
from services.session_service.schema import session_messages as table
from shared import wire
from shared.database import Conn

_CHUNK = 1_000

# System messages go into the system prompt, so that no client's array has them.
HASHES = (
    select(table.c.seq, table.c.canonical_hash)
    .where(
        mine,
        table.c.superseded_at.is_(None),
        table.c.role != sa.literal_column("'system'"),
        table.c.seq > bindparam("after_seq", type_=sa.Integer),
    )
    .order_by(table.c.seq)
    .limit(_CHUNK)
)


async def align(conn: Conn, user_id: str, session_id: str, hashes: list[str]) -> wire.Aligned:
    """How many of the hashes, from the first on, are the beginning of the visible history, and the seq up to there."""
    session = await sessions.get(conn, user_id, session_id)
    wanted = iter(hashes)
    matched = seq = 0
    while True:
        rows = await conn.rows(HASHES, user_id=user_id, session_id=session_id, after_seq=seq)
        for row, hashed in zip(rows, islice(wanted, len(rows)), strict=False):
            if row["canonical_hash"].hex() != hashed:
                return wire.Aligned(matched=matched, seq=seq, version=session.version)
            matched, seq = matched + 1, row["seq"]
        if len(rows) < _CHUNK or matched == len(hashes):
            return wire.Aligned(matched=matched, seq=seq, version=session.version)
