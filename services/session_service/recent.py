"""The newest visible messages of a session, as a context needs them: sizes of as many as could fit, and contents.

Its one invariant: messages that are about to be stored count as if they were there already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Stretch:
    """Visible messages in a row: sizes in order of seq, contents by seq; and system messages, newest first.

    `earliest` is the session's first visible one, where that has been asked for. Nothing in here is ever changed, so
    that several stretches may have it.
    """

    entries: list[Entry]
    pieces: dict[int, Piece]
    system: list[Piece]
    earliest: int | None = None

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.entries)

    def followed_by(self, later: "Stretch") -> "Stretch":
        system = [*later.system, *self.system][:_CHUNK]
        return Stretch([*self.entries, *later.entries], self.pieces | later.pieces, system, self.earliest)


def stretch_of(drafts: Sequence[Draft], last_seq: int) -> Stretch:
    """The messages as they will be there when they have been stored after `last_seq`."""
    stretch = Stretch([], {}, [])
    for seq, draft in enumerate(drafts, start=last_seq + 1):
        role = draft.message.role
        content = draft.text if draft.blocks is None or role == "system" else draft.blocks
        piece = Piece(seq, speaker(role), content, draft.context_tokens, draft.context_tokens_reported)
        if role == "system":
            stretch.system.insert(0, piece)
        else:
            stretch.pieces[seq] = piece
            stretch.entries.append(Entry(seq, piece.role, piece.tokens, bool(draft.column("begins_window"))))
    return stretch


class Recent:
    """What `read` found: `entries` in order of seq, and whether they reach back to the window's start.

    They reach as far as the limits do, and on to a message of the user's own. `system` has the system messages, newest
    first.
    """

    def __init__(self, conn: Conn, found: Detail, ahead: Sequence[Draft], known: Stretch | None) -> None:
        self.conn = conn
        self.found = found
        self.end_seq = found.last_seq + len(ahead) + 1
        self._ahead = stretch_of(ahead, found.last_seq)
        self._known = known
        self._pieces: dict[int, Piece] = {}
        self._earliest = known.earliest if known else None
        self.entries: list[Entry] = []
        self.is_whole = False
        self.system: list[Piece] = []

    @classmethod
    async def read(
        cls,
        conn: Conn,
        found: Detail,
        limits: Window,
        ahead: Sequence[Draft] = (),
        known: Stretch | None = None,
    ) -> "Recent":
        """What is there, and `ahead` of being stored; what is `known` reaches back to the window's start."""
        recent = cls(conn, found, ahead, known)
        await recent._read(limits)
        return recent

    async def _read(self, limits: Window) -> None:
        limit = min(_CHUNK, (limits.max_messages or _CHUNK) + 1)
        stored = await self._beginning(limits, limit) if self._known is None else self._known
        is_last = self._known is not None or len(stored.entries) < limit
        read = stored.followed_by(self._ahead)
        self._pieces, self.system = read.pieces, read.system
        chunk = read.entries[::-1]
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
            if is_last:
                self.entries, self.is_whole = newest_first[::-1], True
                return
            chunk = await self._before(chunk[-1].seq)
            is_last = len(chunk) < _CHUNK

    async def _beginning(self, limits: Window, limit: int) -> Stretch:
        stretch = Stretch([], {}, [])
        if not self.found.last_seq:
            return stretch
        rows = await self.conn.rows(
            BEGINNING,
            **self.found.key,
            from_seq=self.found.window_start_seq,
            below_seq=self.found.last_seq + 1,
            limit=limit,
            room_tokens=limits.max_tokens - self._ahead.tokens,
        )
        rows.sort(key=lambda row: row["seq"])
        for row in rows:
            if row["role"] == "system":
                stretch.system.insert(0, _piece(row))
                continue
            stretch.entries.append(_entry(row))
            if row["content"] is not None:
                stretch.pieces[row["seq"]] = _piece(row)
        return stretch

    async def _before(self, seq: int) -> list[Entry]:
        """Up to a chunk of what comes before, newest first."""
        bounds = {"from_seq": self.found.window_start_seq, "below_seq": seq, "limit": _CHUNK}
        return [_entry(row) for row in await self.conn.rows(ENTRIES, **self.found.key, **bounds)]

    async def pieces(self, seqs: list[int]) -> list[Piece]:
        """The messages of these seqs, which are some of the entries', with their contents."""
        if any(seq not in self._pieces for seq in seqs):
            bounds = {"from_seq": seqs[0], "last_seq": self.found.last_seq}
            rows = await self.conn.rows(CONTENT, **self.found.key, **bounds)
            self._pieces |= {row["seq"]: _piece(row) for row in rows}
        # One that was there a moment ago may have been taken back.
        return [self._pieces[seq] for seq in seqs if seq in self._pieces]

    async def first_before(self, seq: int) -> int | None:
        """The first visible message's seq, if that is before this one."""
        if self._earliest is None:
            self._earliest = await self._first()
        return self._earliest if self._earliest is not None and self._earliest < seq else None

    async def _first(self) -> int | None:
        if self.is_whole and self.found.window_start_seq <= self.found.first_seq:
            return self.entries[0].seq if self.entries else None
        bounds = {"from_seq": self.found.first_seq, "below_seq": self.found.last_seq + 1}
        row = await self.conn.row(FIRST_VISIBLE, **self.found.key, **bounds)
        if row is not None:
            return int(row["seq"])
        return self._ahead.entries[0].seq if self._ahead.entries else None

    def from_window(self, start_seq: int) -> Stretch | None:
        """Everything from there on, if all of it has been read."""
        is_all = self.is_whole or (bool(self.entries) and self.entries[0].seq <= start_seq)
        entries = [entry for entry in self.entries if entry.seq >= start_seq]
        if not is_all or len(entries) > _CHUNK or any(entry.seq not in self._pieces for entry in entries):
            return None
        pieces = {entry.seq: self._pieces[entry.seq] for entry in entries}
        return Stretch(entries, pieces, self.system, self._earliest)


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
