"""Lining a client's message array up with the stored history, by hashes alone.

Its one invariant: `matched` messages of the client's are, in order, the first `matched` visible ones here.
"""

from itertools import islice

import sqlalchemy as sa
from sqlalchemy import bindparam, select

from services.session_service import sessions
from services.session_service.messages import mine
from services.session_service.schema import session_messages as table
from services.session_service.schema import sessions as _session
from shared import wire
from shared.canonical import chain
from shared.database import Conn
from shared.errors import SessionNotFound

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


CHAIN = select(_session.c.version, _session.c.chain_count, _session.c.chain_seq, _session.c.chain_hash).where(
    sessions.mine
)


async def align(conn: Conn, user_id: str, session_id: str, hashes: list[str]) -> wire.Aligned:
    """How many of the hashes, from the first on, are the beginning of the visible history, and the seq up to there.

    What the session knows as one sequence is compared as a whole, so that only what came since is looked at.
    """
    row = await conn.row(CHAIN, user_id=user_id, session_id=session_id)
    if row is None:
        raise SessionNotFound
    matched = seq = 0
    known: int = row["chain_count"]
    if 0 < known <= len(hashes) and chain(b"", map(bytes.fromhex, hashes[:known])) == row["chain_hash"]:
        matched, seq = known, row["chain_seq"]
    wanted = iter(hashes[matched:])
    while matched < len(hashes):
        rows = await conn.rows(HASHES, user_id=user_id, session_id=session_id, after_seq=seq)
        for found, hashed in zip(rows, islice(wanted, len(rows)), strict=False):
            if found["canonical_hash"].hex() != hashed:
                return wire.Aligned(matched=matched, seq=seq, version=row["version"])
            matched, seq = matched + 1, found["seq"]
        if len(rows) < _CHUNK:
            break
    return wire.Aligned(matched=matched, seq=seq, version=row["version"])
