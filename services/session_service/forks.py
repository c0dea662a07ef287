"""Forks: a new session that begins with the visible messages of another.

Its one invariant: a fork spends nothing: tokens and cost of its copies are 0, their places are 1…n.
"""

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, case, func, insert, literal_column, select
from sqlalchemy.dialects.postgresql import insert as insert_or
from sqlalchemy.sql.elements import ColumnElement
from uuid_utils import uuid7

from services.session_service import sessions
from services.session_service.messages import mine
from services.session_service.schema import session_messages as messages
from services.session_service.schema import sessions as table
from services.session_service.sessions import NOW, SECOND, Detail
from shared import wire
from shared.database import Conn, Writer
from shared.errors import SessionExists, ValidationFailed

_new_id = bindparam("new_session_id", type_=sa.Text)
_at_seq = bindparam("at_seq", type_=sa.Integer)
_count = bindparam("count", type_=sa.Integer)
_ZERO: ColumnElement[int] = literal_column("0")

CREATE = (
    insert_or(table)
    .from_select(
        [
            *("user_id", "session_id", "title", "metadata", "conversation_data", "session_summary"),
            *("summary_to_seq", "summary_model", "message_count", "last_seq", "idle_timeout_seconds"),
            *("parent_session_id", "parent_seq"),
            *("created_at", "updated_at", "last_activity", "expires_at"),
        ],
        select(
            table.c.user_id,
            _new_id,
            func.coalesce(bindparam("title", type_=sa.Text), table.c.title),
            table.c.metadata,
            table.c.conversation_data,
            bindparam("summary", type_=sa.Text),
            bindparam("summary_to_seq", type_=sa.Integer),
            case((bindparam("summary", type_=sa.Text) != "", table.c.summary_model)),
            _count,
            _count,
            table.c.idle_timeout_seconds,
            table.c.session_id,
            _at_seq,
            NOW,
            NOW,
            NOW,
            NOW + table.c.idle_timeout_seconds * SECOND,
        ).where(sessions.mine),
    )
    .on_conflict_do_nothing(index_elements=["user_id", "session_id"])
    .returning(*sessions.COLUMNS)
)

_visible = (mine, messages.c.superseded_at.is_(None), messages.c.seq <= _at_seq)
COUNT = select(func.count()).select_from(messages).where(*_visible)

_kept = (
    *("role", "message_type", "content", "content_blocks", "native", "metadata", "context_tokens"),
    *("context_tokens_reported", "begins_window", "canonical_hash", "created_at"),
)
_place = func.row_number().over(order_by=messages.c.seq)
_originals = (
    select(_place.label("place"), messages.c.user_id, *(messages.c[name] for name in _kept)).where(*_visible).subquery()
)
_ids = (
    func.unnest(bindparam("message_ids", type_=ARRAY(sa.Text)))
    .table_valued("message_id", with_ordinality="place", name="ids")
    .render_derived()
)
COPY = insert(messages).from_select(
    ["user_id", "session_id", "seq", "message_id", "tokens_used", "cost_usd", *_kept],
    select(
        _originals.c.user_id,
        _new_id,
        _originals.c.place,
        _ids.c.message_id,
        _ZERO,
        _ZERO,
        *(_originals.c[name] for name in _kept),
    ).select_from(_originals.join(_ids, _ids.c.place == _originals.c.place)),
)


async def fork(writer: Writer, user_id: str, session_id: str, wanted: wire.Fork) -> wire.Session:
    """The new session. Raises SessionNotFound, SessionExists, or ValidationFailed for a seq past the last."""
    new_session_id = wanted.session_id or str(uuid7())

    async def work(conn: Conn) -> wire.Session:
        # Held, so that no rewind changes what is visible between counting and copying.
        held = await sessions.lock(conn, user_id, session_id)
        at_seq = held.last_seq if wanted.at_seq is None else wanted.at_seq
        if at_seq > held.last_seq:
            raise ValidationFailed.at("body", "at_seq", msg=f"The last message has seq {held.last_seq}")
        count = await conn.value(COUNT, **held.key, at_seq=at_seq)
        summary, summary_to_seq = await _summary(conn, held, at_seq)
        row = await conn.row(
            CREATE,
            **held.key,
            new_session_id=new_session_id,
            title=wanted.title,
            summary=summary,
            summary_to_seq=summary_to_seq,
            count=count,
            at_seq=at_seq,
        )
        if row is None:
            raise SessionExists
        message_ids = [str(uuid7()) for _ in range(count)]
        await conn.rows(COPY, **held.key, new_session_id=new_session_id, at_seq=at_seq, message_ids=message_ids)
        return sessions.from_row(row)

    return await writer.transact(work)


async def _summary(conn: Conn, held: Detail, at_seq: int) -> tuple[str, int | None]:
    """The summary and the seq in the fork that it reaches to; none when it tells of more than the fork has."""
    to_seq = held.summary_to_seq
    if to_seq is None:
        return "", None
    told = await conn.value(COUNT, **held.key, at_seq=to_seq)
    if told > await conn.value(COUNT, **held.key, at_seq=min(at_seq, to_seq)):
        return "", None
    return held.session.session_summary, told
