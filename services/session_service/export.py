"""A session as NDJSON lines: a header, its messages, memories and turns, and a last line that seals them.

Its one invariant: memory does not grow with the session; no database connection is held while a client reads.
"""

import hashlib
from collections.abc import AsyncIterator
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import bindparam, select

from services.session_service import memories, messages, sessions, turns
from services.session_service.schema import session_memories, session_messages, session_turns
from shared.database import Conn, Row
from shared.json import dumps

FORMAT: Final = "session-export"
FORMAT_VERSION: Final = 1
_PAGE: Final = 500
_PAGE_OF_MESSAGES: Final = 100
"""Fewer at a time: a message may hold 32 MiB."""

_limit = bindparam("limit", type_=sa.Integer)
MESSAGES = (
    select(
        *messages.COLUMNS,
        session_messages.c.turn_id,
        session_messages.c.context_tokens,
        session_messages.c.context_tokens_reported,
    )
    .where(
        messages.mine,
        session_messages.c.seq > bindparam("after", type_=sa.Integer),
        session_messages.c.seq <= bindparam("last_seq", type_=sa.Integer),
    )
    .order_by(session_messages.c.seq)
    .limit(_limit)
)
MEMORIES = (
    select(*memories.COLUMNS)
    .where(memories.mine, session_memories.c.memory_id > bindparam("after", type_=sa.Text))
    .order_by(session_memories.c.memory_id)
    .limit(_limit)
)
TURNS = (
    select(*turns.COLUMNS)
    .where(turns.mine, session_turns.c.turn_id > bindparam("after", type_=sa.Text))
    .order_by(session_turns.c.turn_id)
    .limit(_limit)
)


async def export(conn: Conn, user_id: str, session_id: str) -> AsyncIterator[bytes]:
    """The lines of a session, a page's worth at a time. Raises SessionNotFound before the first."""
    detail = await sessions.look(conn, user_id, session_id)
    return _lines(conn, detail)


async def _lines(conn: Conn, detail: sessions.Detail) -> AsyncIterator[bytes]:
    digest = hashlib.sha256()
    counts = {"messages": 0, "memories": 0, "turns": 0}
    header = {
        "type": "header",
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "session": detail.session,
        "summary_to_seq": detail.summary_to_seq,
        "first_seq": detail.first_seq,
        "window_start_seq": detail.window_start_seq,
    }
    yield _sealed(digest, [header])
    async for kind, rows in _pages(conn, detail):
        counts[kind] += len(rows)
        yield _sealed(digest, [{"type": _TYPES[kind], **dict(row.items())} for row in rows])
    yield dumps({"type": "end", "counts": counts, "sha256": digest.hexdigest()}) + b"\n"


_TYPES: Final = {"messages": "message", "memories": "memory", "turns": "turn"}


def _sealed(digest: Any, lines: list[dict[str, Any]]) -> bytes:
    text = b"".join(dumps(line) + b"\n" for line in lines)
    digest.update(text)
    return text


async def _pages(conn: Conn, detail: sessions.Detail) -> AsyncIterator[tuple[str, list[Row]]]:
    """Everything of the session up to the last message that it had when the export began."""
    bounds: dict[str, Any] = {"after": 0, "last_seq": detail.last_seq, "limit": _PAGE_OF_MESSAGES}
    while rows := await conn.rows(MESSAGES, **detail.key, **bounds):
        yield "messages", rows
        bounds["after"] = rows[-1]["seq"]
    for kind, statement, place in (("memories", MEMORIES, "memory_id"), ("turns", TURNS, "turn_id")):
        after = ""
        while rows := await conn.rows(statement, **detail.key, after=after, limit=_PAGE):
            yield kind, rows
            after = rows[-1][place]
