"""What happens beside the request path for each session that was written to: its texts become searchable, its
figures are added to the sums.

Its one invariant: a session whose version is past its indexed_version has news, and they will be seen to: writers
do nothing for it, and a crash loses nothing. Any number of instances may run this; one works at a time.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, func, literal_column, or_, select, tuple_
from sqlalchemy.sql.elements import ColumnElement

from services.session_service import counting, indexing, words
from services.session_service.schema import ACTIVE, session_memories, session_messages
from services.session_service.schema import sessions as table
from services.session_service.sessions import NOW
from shared.canonical import chain
from shared.database import Conn, Database, Row

# A round is short: it holds a transaction, and whoever wrote last waits for it to be found.
SESSIONS_AT_ONCE: Final = 200
MESSAGES_AT_ONCE: Final = 200
ROUND_BYTES: Final = 256 * 2**10
# Longer than any statement may run: what was committed late is found again.
_OVERLAP: ColumnElement[Any] = literal_column("interval '1 minute'")

NEWS = (
    select(
        table.c.user_id,
        table.c.session_id,
        table.c.title,
        table.c.version,
        table.c.last_seq,
        table.c.rewinds,
        table.c.indexed_seq,
        table.c.indexed_at,
        table.c.counted_to,
        table.c.chain_count,
        table.c.chain_seq,
        table.c.chain_hash,
    )
    .where(
        table.c.indexed_version < table.c.version,
        tuple_(table.c.user_id, table.c.session_id)
        > tuple_(bindparam("after_user", type_=sa.Text), bindparam("after_session", type_=sa.Text)),
    )
    .order_by(table.c.user_id, table.c.session_id)
    .limit(SESSIONS_AT_ONCE)
)
_bytes = func.least(func.octet_length(session_messages.c.content), words.SEARCHED_BYTES)
_some = (
    select(
        session_messages.c.seq,
        func.left(session_messages.c.content, words.SEARCHED_BYTES).label("content"),
        (func.sum(_bytes).over(order_by=session_messages.c.seq) - _bytes).label("bytes_before"),
        session_messages.c.created_at,
        session_messages.c.tokens_used,
        session_messages.c.cost_usd,
        session_messages.c.superseded_at,
        session_messages.c.role,
        session_messages.c.canonical_hash,
    )
    .where(
        session_messages.c.user_id == bindparam("user_id"),
        session_messages.c.session_id == bindparam("session_id"),
        session_messages.c.seq > bindparam("indexed_seq", type_=sa.Integer),
    )
    .order_by(session_messages.c.seq)
    .limit(MESSAGES_AT_ONCE)
    .subquery("some")
)
MESSAGES = select(_some).where(_some.c.bytes_before < ROUND_BYTES).order_by(_some.c.seq)
SPOKEN = (
    select(session_messages.c.seq, session_messages.c.canonical_hash)
    .where(
        session_messages.c.user_id == bindparam("user_id"),
        session_messages.c.session_id == bindparam("session_id"),
        session_messages.c.seq <= bindparam("indexed_seq", type_=sa.Integer),
        session_messages.c.superseded_at.is_(None),
        session_messages.c.role != literal_column("'system'"),
    )
    .order_by(session_messages.c.seq)
)
_since = bindparam("indexed_at", type_=sa.TIMESTAMP(timezone=True))
MEMORIES = select(session_memories.c.memory_id, session_memories.c.content).where(
    session_memories.c.user_id == bindparam("user_id"),
    session_memories.c.session_id == bindparam("session_id"),
    or_(_since.is_(None), session_memories.c.updated_at > _since - _OVERLAP),
)

_MARKS: dict[str, sa.types.TypeEngine[Any]] = {
    "user_id": sa.Text(),
    "session_id": sa.Text(),
    "seq": sa.Integer(),
    "version": sa.BigInteger(),
    "rewinds": sa.Integer(),
    "counted_to": sa.TIMESTAMP(timezone=True),
    "chain_count": sa.Integer(),
    "chain_seq": sa.Integer(),
    "chain_hash": sa.LargeBinary(),
}
_done = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _MARKS.items()))
    .table_valued(*_MARKS, name="done")
    .render_derived()
)
# A session that someone is just writing to, or whose messages were taken back since they were read here, is left
# for the next round: writers never wait for this.
_held = (
    select(
        table.c.user_id,
        table.c.session_id,
        _done.c.seq,
        _done.c.version,
        _done.c.counted_to,
        _done.c.chain_count,
        _done.c.chain_seq,
        _done.c.chain_hash,
        (table.c.status == ACTIVE).label("is_active"),
        table.c.message_count,
        (table.c.total_tokens - table.c.superseded_tokens).label("tokens"),
        (table.c.total_cost - table.c.superseded_cost).label("cost"),
        table.c.counted,
        table.c.counted_active,
        table.c.counted_messages,
        table.c.counted_tokens,
        table.c.counted_cost,
    )
    .join(
        _done,
        and_(
            table.c.user_id == _done.c.user_id,
            table.c.session_id == _done.c.session_id,
            table.c.rewinds == _done.c.rewinds,
        ),
    )
    .with_for_update(of=table, skip_locked=True)
    .cte("held")
)
MARK = (
    sa.update(table)
    .add_cte(counting.add_totals(_held), counting.add_usage(_held))
    .where(table.c.user_id == _held.c.user_id, table.c.session_id == _held.c.session_id)
    .values(
        indexed_seq=_held.c.seq,
        indexed_version=_held.c.version,
        indexed_at=NOW,
        counted=sa.true(),
        counted_active=_held.c.is_active,
        counted_messages=_held.c.message_count,
        counted_tokens=_held.c.tokens,
        counted_cost=_held.c.cost,
        counted_to=_held.c.counted_to,
        chain_count=_held.c.chain_count,
        chain_seq=_held.c.chain_seq,
        chain_hash=_held.c.chain_hash,
    )
)


@dataclass(slots=True)
class _Session:
    """One session's news, as far as they were read."""

    row: Row
    seq: int
    version: int
    visible: list[Row] = field(default_factory=list)
    earlier: list[Row] = field(default_factory=list)
    """Of the messages looked at before those that a broken chain has to be put together from again."""

    @property
    def key(self) -> "Key":
        return self.row["user_id"], self.row["session_id"]

    @property
    def has_more(self) -> bool:
        return bool(self.seq < self.row["last_seq"])

    @property
    def counted_to(self) -> datetime | None:
        last: datetime | None = self.visible[-1]["created_at"] if self.visible else self.row["counted_to"]
        return last

    def mark(self) -> tuple[Any, ...]:
        return (*self.key, self.seq, self.version, self.row["rewinds"], self.counted_to, *self.chain())

    def chain(self) -> tuple[int, int, bytes]:
        """Count, last seq and hash of the visible conversation as far as it was read; as align.py needs them."""
        spoken = [*self.earlier, *(each for each in self.visible if each["role"] != "system")]
        hashed = chain(self.row["chain_hash"], (each["canonical_hash"] for each in spoken))
        last_seq = spoken[-1]["seq"] if spoken else self.row["chain_seq"]
        return self.row["chain_count"] + len(spoken), last_seq, hashed


Key = tuple[str, str]
FIRST: Final[Key] = ("", "")


class Round(NamedTuple):
    """What a round came to: the session that the next one goes on after, None where no other is left; and whether
    these sessions have more news than a round may see to."""

    last: Key | None
    is_behind: bool


async def see_to_news(database: Database, after: Key) -> Round:
    """Sees to some of what is new, of the sessions after this one.

    Sessions take turns, so that one with a great deal of news does not keep the others waiting.
    """

    async def work(conn: Conn) -> Round:
        if not await conn.value(counting.TRY_LOCK):
            return Round(None, is_behind=False)
        found = await conn.rows(NEWS, after_user=after[0], after_session=after[1])
        texts: list[indexing.Text] = []
        read: list[_Session] = []
        for row in found:
            read.append(await _read(conn, row, texts))
            if len(texts) >= MESSAGES_AT_ONCE or sum(len(each.text) for each in texts) >= ROUND_BYTES:
                break  # the others are news still
        await indexing.put(conn, texts)
        if read:
            columns = zip(*(each.mark() for each in read), strict=True)
            arrays = {f"{name}_array": list(values) for name, values in zip(_MARKS, columns, strict=True)}
            usage = counting.Usage()
            for each in read:
                usage.add(*each.key, each.row["counted_to"], each.visible)
            # Last, and one statement: from here to the commit whoever writes to these sessions has to wait.
            await conn.rows(MARK, **arrays, **usage.parameters())
        is_last = len(read) == len(found) < SESSIONS_AT_ONCE
        return Round(None if is_last else read[-1].key, any(each.has_more for each in read))

    return await database.transact(work)


async def _read(conn: Conn, row: Row, texts: list[indexing.Text]) -> _Session:
    """The session's news; its new texts are added to `texts`."""
    key = {"user_id": row["user_id"], "session_id": row["session_id"]}
    news = _Session(row, row["indexed_seq"], row["version"])
    if row["title"] is not None:
        texts.append(indexing.Text(*news.key, 0, "", row["title"]))
    if row["last_seq"] > news.seq:
        messages = await conn.rows(MESSAGES, **key, indexed_seq=news.seq)
        texts += [indexing.Text(*news.key, each["seq"], "", each["content"]) for each in messages]
        news.visible = [each for each in messages if each["superseded_at"] is None]
        news.seq = messages[-1]["seq"] if messages else news.seq
        if news.has_more:
            news.version -= 1  # and so it stays news
    if row["chain_seq"] == 0 and row["indexed_seq"] > 0:
        news.earlier = await conn.rows(SPOKEN, **key, indexed_seq=row["indexed_seq"])
    memories = await conn.rows(MEMORIES, **key, indexed_at=row["indexed_at"])
    texts += [indexing.Text(*news.key, 0, memory["memory_id"], memory["content"]) for memory in memories]
    return news
