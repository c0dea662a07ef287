"""The newest visible messages of a session, as a context needs them: sizes of as many as could fit, and contents.

Its one invariant: messages that are about to be stored count as if they were there already.
"""

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import and_, bindparam, case, func, select
from sqlalchemy.sql.elements import ColumnElement

from services.session_service.drafts import Draft
from services.session_service.messages import mine
from services.session_service.repairs import Piece
from services.session_service.schema import session_messages as table
from services.session_service.sessions import Detail
from services.session_service.window import Entry, Window
from shared.canonical import speaker
from shared.database import Conn, Row

_CHUNK: Final = 500

_visible = and_(mine, table.c.superseded_at.is_(None))
_is_system = table.c.role == sa.literal_column("'system'")
_from_seq = bindparam("from_seq", type_=sa.Integer)
_stretch = and_(_visible, ~_is_system, table.c.seq >= _from_seq, table.c.seq < bindparam("below_seq", type_=sa.Integer))
_SIZE_COLUMNS = (table.c.seq, table.c.role, table.c.context_tokens, table.c.begins_window)
_CONTENT_COLUMNS = (table.c.content, table.c.content_blocks, table.c.context_tokens_reported)


def _newest(*columns: ColumnElement[Any]) -> sa.Select[Any]:
    return select(*columns).where(_stretch).order_by(table.c.seq.desc()).limit(bindparam("limit", type_=sa.Integer))


_first = _newest(*_SIZE_COLUMNS, *_CONTENT_COLUMNS).subquery("first")
# What there is room for comes with its content, so that it need not be asked for again.
_fits = func.sum(_first.c.context_tokens).over(order_by=_first.c.seq.desc()) <= bindparam(
    "room_tokens", type_=sa.BigInteger
)
_system = (
    select(*_SIZE_COLUMNS, *_CONTENT_COLUMNS)
    .where(_visible, _is_system)
    .order_by(table.c.seq.desc())
    .limit(_CHUNK)
    .subquery("system")
)
# The newest messages and all of the system messages, in no order.
BEGINNING = sa.union_all(
    select(
        *(_first.c[column.name] for column in _SIZE_COLUMNS),
        *(case((_fits, _first.c[column.name])).label(column.name) for column in _CONTENT_COLUMNS),
    ),
    select(*_system.c),
)
ENTRIES = _newest(*_SIZE_COLUMNS)
CONTENT = (
    select(*_SIZE_COLUMNS, *_CONTENT_COLUMNS)
    .where(_visible, ~_is_system, table.c.seq >= _from_seq, table.c.seq <= bindparam("last_seq", type_=sa.Integer))
    .order_by(table.c.seq)
)
FIRST_VISIBLE = select(table.c.seq).where(_stretch).order_by(table.c.seq).limit(1)


class Recent:
    """What `read` found: `entries` in order of seq, and whether they reach back to the window's start.

    They reach as far as the limits do, and on to a message of the user's own. `system` has the system messages, newest
    first.
    """

    def __init__(self, conn: Conn, found: Detail, ahead: Sequence[Draft]) -> None:
        self._conn = conn
        self._found = found
        self._ahead: list[Entry] = []
        self._pieces: dict[int, Piece] = {}
        self.entries: list[Entry] = []
        self.is_whole = False
        self.system: list[Piece] = []
        for seq, draft in enumerate(ahead, start=found.last_seq + 1):
            self._add_ahead(seq, draft)
        self.end_seq = found.last_seq + len(ahead) + 1

    @classmethod
    async def read(cls, conn: Conn, found: Detail, limits: Window, ahead: Sequence[Draft] = ()) -> "Recent":
        recent = cls(conn, found, ahead)
        await recent._read(limits)
        return recent

    async def _read(self, limits: Window) -> None:
        limit = min(_CHUNK, (limits.max_messages or _CHUNK) + 1)
        stored = await self._beginning(limits, limit)
        chunk = [*self._ahead[::-1], *stored]
        newest_first: list[Entry] = []
        used = 0
        while True:
            for entry in chunk:
                newest_first.append(entry)
                used += entry.tokens
                is_over = not limits.holds(used, len(newest_first))
                if is_over and any(each.begins_window for each in newest_first):
                    self.entries = newest_first[::-1]
                    return
            if len(stored) < limit:
                self.entries, self.is_whole = newest_first[::-1], True
                return
            limit = _CHUNK
            chunk = stored = await self._before(stored[-1].seq, limit)

    async def _beginning(self, limits: Window, limit: int) -> list[Entry]:
        if not self._found.last_seq:
            return []
        rows = await self._conn.rows(
            BEGINNING,
            **self._found.key,
            from_seq=self._found.window_start_seq,
            below_seq=self._found.last_seq + 1,
            limit=limit,
            room_tokens=limits.max_tokens - sum(entry.tokens for entry in self._ahead),
        )
        rows.sort(key=lambda row: row["seq"], reverse=True)
        for row in rows:
            if row["role"] == "system":
                self.system.append(_piece(row))
            elif row["content"] is not None:
                self._pieces[row["seq"]] = _piece(row)
        del self.system[_CHUNK:]
        return [_entry(row) for row in rows if row["role"] != "system"]

    async def _before(self, seq: int, limit: int) -> list[Entry]:
        bounds = {"from_seq": self._found.window_start_seq, "below_seq": seq, "limit": limit}
        return [_entry(row) for row in await self._conn.rows(ENTRIES, **self._found.key, **bounds)]

    def _add_ahead(self, seq: int, draft: Draft) -> None:
        role = draft.message.role
        content = draft.text if draft.blocks is None or role == "system" else draft.blocks
        piece = Piece(seq, speaker(role), content, draft.context_tokens, draft.context_tokens_reported)
        if role == "system":
            self.system.insert(0, piece)
        else:
            self._pieces[seq] = piece
            self._ahead.append(Entry(seq, piece.role, piece.tokens, bool(draft.column("begins_window"))))

    async def pieces(self, seqs: list[int]) -> list[Piece]:
        """The messages of these seqs, which are some of the entries', with their contents."""
        if any(seq not in self._pieces for seq in seqs):
            bounds = {"from_seq": seqs[0], "last_seq": self._found.last_seq}
            rows = await self._conn.rows(CONTENT, **self._found.key, **bounds)
            self._pieces |= {row["seq"]: _piece(row) for row in rows}
        # One that was there a moment ago may have been taken back.
        return [self._pieces[seq] for seq in seqs if seq in self._pieces]

    async def first_before(self, seq: int) -> int | None:
        """The first visible message's seq, if that is before this one."""
        bounds = {"from_seq": self._found.first_seq, "below_seq": min(seq, self._found.last_seq + 1)}
        row = None
        if bounds["from_seq"] < bounds["below_seq"]:
            row = await self._conn.row(FIRST_VISIBLE, **self._found.key, **bounds)
        if row is not None:
            return int(row["seq"])
        return next((entry.seq for entry in self._ahead if entry.seq < seq), None)


def _entry(row: Row) -> Entry:
    return Entry(row["seq"], speaker(row["role"]), row["context_tokens"], row["begins_window"])


def _piece(row: Row) -> Piece:
    has_blocks = row["content_blocks"] is not None and row["role"] != "system"
    return Piece(
        seq=row["seq"],
        role=speaker(row["role"]),
        content=row["content_blocks"] if has_blocks else row["content"],
        tokens=row["context_tokens"],
        reported=row["context_tokens_reported"],
    )
