"""The events of conversations: numbered rows, written under the lock of the conversation's row.

Its one invariant: numbers have no gaps and no twins, and a row is there before any with a higher number can be seen.
So whoever has read up to a number misses nothing by reading on from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, func, select
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert
from uuid_utils import uuid7

from services.relay import conversations
from services.relay.conversation_schema import relay_conversation_events as table
from services.relay.conversation_schema import relay_conversations
from services.relay.conversations import Conversation, ExecutionStatus, SandboxStatus, this
from services.relay.errors import ConversationNotFound
from shared.database import Conn, Row
from shared.session_client import SessionKey

Kind = Literal["message", "state", "error", "other"]
Source = Literal["agent", "user", "environment"]

_NOW = func.statement_timestamp()


@dataclass(frozen=True, slots=True)
class NewEvent:
    """What is to be written. `created_at` None: now. `is_pending`: a message that is not in the session yet."""

    kind: Kind
    source: Source
    payload: dict[str, Any]
    id: str = field(default_factory=lambda: str(uuid7()))
    created_at: datetime | None = None
    is_pending: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """A row; of a message the id is that of the session's message."""

    seq: int
    id: str
    kind: Kind
    source: Source
    payload: dict[str, Any]
    is_pending: bool
    superseded_at: datetime | None
    created_at: datetime


_COLUMNS: Final = tuple(table.c[name] for name in Event.__dataclass_fields__)
_of = table.c.conversation_id == bindparam("id")
_moment = TIMESTAMP(timezone=True)

TAKE_NUMBERS = (
    sa.update(relay_conversations)
    .where(this)
    .values(next_seq=relay_conversations.c.next_seq + bindparam("count", type_=sa.BigInteger), updated_at=_NOW)
    .returning(relay_conversations.c.next_seq)
)
_row_types: dict[str, sa.types.TypeEngine[Any]] = {
    "seq": sa.BigInteger(),
    "event_id": sa.Text(),
    "kind": sa.Text(),
    "source": sa.Text(),
    "payload": table.c.payload.type,
    "created_at": _moment,
    "is_pending": sa.Boolean(),
}
_rows = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _row_types.items()))
    .table_valued(*_row_types, name="told")
    .render_derived()
)
INSERT = insert(table).from_select(
    ["conversation_id", "seq", "id", "kind", "source", "payload", "created_at", "is_pending"],
    select(
        bindparam("id", type_=sa.Text),
        _rows.c.seq,
        _rows.c.event_id,
        _rows.c.kind,
        _rows.c.source,
        _rows.c.payload,
        func.coalesce(_rows.c.created_at, _NOW),
        _rows.c.is_pending,
    ),
)
_seq = table.c.seq
LIST = (
    select(*_COLUMNS)
    .where(_of, _seq >= bindparam("from_seq", type_=sa.BigInteger), _seq <= bindparam("to_seq", type_=sa.BigInteger))
    .limit(bindparam("limit", type_=sa.Integer))
)
_visible = table.c.superseded_at.is_(None)
LISTS = {
    (newest_first, visible): (LIST.where(_visible) if visible else LIST).order_by(_seq.desc() if newest_first else _seq)
    for newest_first in (False, True)
    for visible in (False, True)
}
COUNT = select(func.count()).select_from(table).where(_of, _visible)
SEQ_OF = select(_seq).where(_of, table.c.id == bindparam("event_id"))
PENDING = select(*_COLUMNS).where(_of, table.c.is_pending).order_by(_seq)
KNOWN = select(table.c.id, table.c.is_pending).where(
    _of, table.c.id == func.any(bindparam("event_ids", type_=ARRAY(sa.Text)))
)
ARRIVED = (
    sa.update(table)
    .where(_of, table.c.id == func.any(bindparam("event_ids", type_=ARRAY(sa.Text))))
    .values(is_pending=False)
)
SUPERSEDE = (
    sa.update(table)
    .where(
        _of,
        table.c.kind == "message",
        sa.not_(table.c.is_pending),
        _visible,
        table.c.id == func.any(bindparam("event_ids", type_=ARRAY(sa.Text))),
    )
    .values(superseded_at=_NOW)
    .returning(table.c.id)
)
SUPERSEDE_ONE = (
    sa.update(table).where(_of, table.c.id == bindparam("event_id")).values(is_pending=False, superseded_at=_NOW)
)
WAIT_NO_MORE = sa.update(table).where(_of, table.c.is_pending).values(is_pending=False)
WAITED_FOR = (
    select(relay_conversations.c.user_id, relay_conversations.c.session_id)
    .join(table, table.c.conversation_id == relay_conversations.c.id)
    .where(table.c.is_pending, relay_conversations.c.run_id.is_(None))
    .distinct()
)
_EVERYTHING: Final = 2**62


def from_row(row: Row) -> Event:
    return Event(*(row[name] for name in Event.__dataclass_fields__))


async def append(conn: Conn, conversation_id: str, new: Sequence[NewEvent]) -> None:
    """Writes the events in order. To be called in a transaction; locks the conversation's row until that ends."""
    if not new:
        return
    next_seq = await conn.value(TAKE_NUMBERS, id=conversation_id, count=len(new))
    if next_seq is None:
        raise ConversationNotFound
    columns: dict[str, list[Any]] = {
        "seq": list(range(next_seq - len(new), next_seq)),
        "event_id": [each.id for each in new],
        **{name: [getattr(each, name) for each in new] for name in _row_types if name not in {"seq", "event_id"}},
    }
    await conn.rows(INSERT, id=conversation_id, **{f"{name}_array": values for name, values in columns.items()})


async def list_some(
    conn: Conn,
    conversation_id: str,
    *,
    from_seq: int = 0,
    to_seq: int | None = None,
    newest_first: bool = False,
    visible: bool = False,
    limit: int,
) -> list[Event]:
    """Events by number; `visible`: without messages that were taken back."""
    rows = await conn.rows(
        LISTS[newest_first, visible],
        id=conversation_id,
        from_seq=from_seq,
        to_seq=_EVERYTHING if to_seq is None else to_seq,
        limit=limit,
    )
    return [from_row(row) for row in rows]


async def count(conn: Conn, conversation_id: str) -> int:
    found: int = await conn.value(COUNT, id=conversation_id)
    return found


async def seq_of(conn: Conn, conversation_id: str, event_id: str) -> int | None:
    """The number of the event with this id."""
    seq: int | None = await conn.value(SEQ_OF, id=conversation_id, event_id=event_id)
    return seq


async def pending(conn: Conn, conversation_id: str) -> list[Event]:
    """The messages that wait for the session to be free, in order."""
    return [from_row(row) for row in await conn.rows(PENDING, id=conversation_id)]


async def supersede(conn: Conn, conversation_id: str, event_id: str) -> None:
    """A message was taken back in the session."""
    await conn.rows(SUPERSEDE_ONE, id=conversation_id, event_id=event_id)


async def wait_no_more(conn: Conn, conversation_id: str) -> None:
    """The session has ended: what waited for it was said, and stays unanswered."""
    await conn.rows(WAIT_NO_MORE, id=conversation_id)


async def sessions_waited_for(conn: Conn) -> set[SessionKey]:
    """The sessions that messages wait for though their conversations do not run."""
    return {SessionKey(row["user_id"], row["session_id"]) for row in await conn.rows(WAITED_FOR)}


# ── statuses ────────────────────────────────────────────────────────────────────────────────────


def of_status(status: str) -> NewEvent:
    return NewEvent("state", "environment", {"key": "execution_status", "value": status})


def of_error(code: str, detail: str) -> NewEvent:
    return NewEvent("error", "environment", {"code": code, "detail": detail})


async def set_execution_status(conn: Conn, row: Conversation, status: ExecutionStatus) -> None:
    """Changes the status of a conversation that is locked, and says so; no change is no event."""
    if row.execution_status != status:
        await conn.rows(conversations.SET["execution_status"], id=row.id, value=status)
        await append(conn, row.id, [of_status(status)])


async def set_sandbox_status(conn: Conn, row: Conversation, status: SandboxStatus) -> None:
    """As `set_execution_status`, for the sandbox; once that runs, the execution status that it had counts again."""
    if row.sandbox_status != status:
        await conn.rows(conversations.SET["sandbox_status"], id=row.id, value=status)
        payload = {"key": "sandbox_status", "value": status}
        await append(conn, row.id, [NewEvent("state", "environment", payload)])


async def begin_run(conn: Conn, row: Conversation, run_id: str, *, lease_seconds: float) -> None:
    """Puts a run into a row that is locked, and says that it runs."""
    await conn.rows(conversations.BEGIN_RUN, id=row.id, run_id=run_id, lease_seconds=lease_seconds)
    await append(conn, row.id, [of_status("running")])


async def end_run(conn: Conn, row: Conversation, status: ExecutionStatus, *also: NewEvent) -> None:
    """Takes the run out of a row that is locked, and says how it ended; `also` comes before that."""
    await conn.rows(conversations.END_RUN, id=row.id, status=status)
    await append(conn, row.id, [*also, of_status(status)])
