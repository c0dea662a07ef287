"""A session as NDJSON lines: a header, its messages, memories and turns, and a last line that seals them.

Its one invariant: memory does not grow with the session; no database connection is held while a client reads.
"""

import hashlib
from collections.abc import AsyncIterator
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import bindparam, func, select

from services.session_service import memories, messages, sessions, turns
from services.session_service.schema import session_memories, session_messages, session_turns
from shared.database import Conn, Row
from shared.errors import BrokenOff
from shared.json import dumps

FORMAT: Final = "session-export"
FORMAT_VERSION: Final = 1
_PAGE: Final = 500
_PAGE_BYTES: Final = 4 * 2**20
"""Of messages, whatever their number: one alone may hold 32 MiB."""

_limit = bindparam("limit", type_=sa.Integer)
_first, _last = bindparam("first", type_=sa.Integer), bindparam("last", type_=sa.Integer)
MESSAGES = (
    select(
        *messages.COLUMNS,
        session_messages.c.turn_id,
        session_messages.c.context_tokens,
        session_messages.c.context_tokens_reported,
    )
    .where(messages.mine, session_messages.c.seq.between(_first, _last))
    .order_by(session_messages.c.seq)
)
_json_bytes = [
    func.coalesce(func.octet_length(session_messages.c[name].cast(sa.Text)), 0) for name in ("content_blocks", "native")
]
SIZES = (
    select(
        session_messages.c.seq,
        (func.octet_length(session_messages.c.content) + _json_bytes[0] + _json_bytes[1]).label("bytes"),
    )
    .where(messages.mine, session_messages.c.seq.between(_first, _last))
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
    yield _sealed(digest, header)
    async for kind, rows in _pages(conn, detail):
        for row in rows:
            fields = _as_it_was(_fields(row), detail.last_seq) if kind == "turns" else _fields(row)
            if fields is not None:
                counts[kind] += 1
                yield _sealed(digest, {"type": _TYPES[kind], **fields})
    if counts["messages"] != detail.last_seq:
        # What there was of it must not look like all of it.
        raise BrokenOff("the session was erased while it was exported")
    yield dumps({"type": "end", "counts": counts, "sha256": digest.hexdigest()}) + b"\n"


def _fields(row: Row) -> dict[str, Any]:
    """The row's fields; of a message with blocks not its text, which follows from them."""
    return {name: value for name, value in row.items() if name != "content" or not row.get("content_blocks")}


_TYPES: Final = {"messages": "message", "memories": "memory", "turns": "turn"}


def _sealed(digest: Any, line: dict[str, Any]) -> bytes:
    text = dumps(line) + b"\n"
    digest.update(text)
    return text


def _as_it_was(turn: dict[str, Any], last_seq: int) -> dict[str, Any] | None:
    """The turn as it stood when the session had `last_seq` messages: still open, or (None) not there yet."""
    if (turn["input_to_seq"] or 0) > last_seq:
        return None
    if (turn["output_to_seq"] or 0) <= last_seq:
        return turn
    later = ("closed_at", "output_from_seq", "output_to_seq", "stop_reason", "model", "usage", "cost_usd", "upstream")
    return {**turn, **dict.fromkeys(later), "error": None, "status": "open"}


async def _pages(conn: Conn, detail: sessions.Detail) -> AsyncIterator[tuple[str, list[Row]]]:
    """Everything of the session up to the last message that it had when the export began."""
    after = 0
    while after < detail.last_seq:
        sizes = await conn.rows(SIZES, **detail.key, first=after + 1, last=detail.last_seq, limit=_PAGE)
        if not sizes:
            return
        last = _within(sizes, _PAGE_BYTES)
        yield "messages", await conn.rows(MESSAGES, **detail.key, first=after + 1, last=last)
        after = last
    for kind, statement, place in (("memories", MEMORIES, "memory_id"), ("turns", TURNS, "turn_id")):
        after_id = ""
        while rows := await conn.rows(statement, **detail.key, after=after_id, limit=_PAGE):
            yield kind, rows
            after_id = rows[-1][place]


def _within(sizes: list[Row], budget_bytes: int) -> int:
    """The seq up to which the messages fit into the budget; the first always does."""
    total: int = sizes[0]["bytes"]
    last: int = sizes[0]["seq"]
    for row in sizes[1:]:
        total += row["bytes"]
        if total > budget_bytes:
            break
        last = row["seq"]
    return last
