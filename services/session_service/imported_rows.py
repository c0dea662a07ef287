"""The rows of an imported session.

Its one invariant: seqs are 1…n in the order of the file, and the session's counters are computed from its rows.
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, func, insert, select
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.dialects.postgresql import insert as insert_or
from uuid_utils import uuid7

from services.session_service import messages, sessions
from services.session_service.drafts import ARRAYS, JSON_ARRAYS
from services.session_service.imported import Header, Memory, Message, Turn
from services.session_service.schema import session_memories, session_messages, session_turns
from services.session_service.schema import sessions as table
from services.session_service.sessions import SECOND
from shared.database import Conn
from shared.errors import ValidationFailed


@dataclass(frozen=True, slots=True)
class Target:
    """Where the import goes."""

    user_id: str
    session_id: str

    @property
    def key(self) -> dict[str, str]:
        return {"user_id": self.user_id, "session_id": self.session_id}


_time = TIMESTAMP(timezone=True)
_SESSION_FIELDS: dict[str, sa.types.TypeEngine[Any]] = {
    "title": sa.Text(),
    "status": sa.Text(),
    "metadata": JSONB(),
    "conversation_data": JSONB(),
    "session_summary": sa.Text(),
    "created_at": _time,
    "updated_at": _time,
    "last_activity": _time,
    "version": sa.BigInteger(),
    "generation": sa.Integer(),
    "idle_timeout_seconds": sa.Integer(),
    "ended_reason": sa.Text(),
    "summary_to_seq": sa.Integer(),
    "summary_model": sa.Text(),
    "first_seq": sa.Integer(),
    "window_start_seq": sa.Integer(),
    "parent_session_id": sa.Text(),
    "parent_seq": sa.Integer(),
}
CREATE = (
    insert_or(table)
    .values(
        user_id=bindparam("user_id"),
        session_id=bindparam("session_id"),
        expires_at=bindparam("last_activity", type_=_time)
        + bindparam("idle_timeout_seconds", type_=sa.Integer) * SECOND,
        **{name: bindparam(name, type_=kind) for name, kind in _SESSION_FIELDS.items()},
    )
    .on_conflict_do_nothing(index_elements=["user_id", "session_id"])
    .returning(table.c.session_id)
)

_PLACES: dict[str, sa.types.TypeEngine[Any]] = {
    "seq": sa.Integer(),
    "turn_id": sa.Text(),
    "created_at": _time,
    "superseded_at": _time,
}
_columns = {**ARRAYS, **_PLACES}
_rows = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _columns.items()))
    .table_valued(*_columns, name="imported")
    .render_derived()
)
MESSAGES = insert(session_messages).from_select(
    ["user_id", "session_id", *_columns],
    select(
        bindparam("user_id"),
        bindparam("session_id"),
        *(_rows.c[name].cast(JSON_ARRAYS[name]) if name in JSON_ARRAYS else _rows.c[name] for name in _columns),
    ).select_from(_rows),
)
TAKEN = select(session_messages.c.message_id).where(
    session_messages.c.user_id == bindparam("user_id"),
    # Of this very session: then the file itself has the id twice, and the constraint will say so.
    session_messages.c.session_id != bindparam("session_id"),
    session_messages.c.message_id == func.any(bindparam("message_ids", type_=ARRAY(sa.Text))),
)
MEMORY = insert(session_memories).values(
    user_id=bindparam("user_id"),
    session_id=bindparam("session_id"),
    memory_id=bindparam("memory_id"),
    memory_type=bindparam("memory_type"),
    content=bindparam("content"),
    metadata=bindparam("metadata", type_=JSONB),
    created_at=bindparam("created_at", type_=_time),
    updated_at=bindparam("updated_at", type_=_time),
)
_json = JSONB(none_as_null=True)
_TURN_FIELDS: dict[str, sa.types.TypeEngine[Any]] = {
    **{name: sa.Text() for name in ("turn_id", "status", "lease_token", "stop_reason", "model")},
    **{name: sa.Integer() for name in ("input_from_seq", "input_to_seq", "output_from_seq", "output_to_seq")},
    **dict.fromkeys(("usage", "upstream", "error"), _json),
    "lease_expires_at": _time,
    "opened_at": _time,
    "closed_at": _time,
    "cost_usd": sa.Numeric(),
}
TURN = insert(session_turns).values(
    user_id=bindparam("user_id"),
    session_id=bindparam("session_id"),
    lease_seconds=sa.literal_column("600"),
    **{name: bindparam(name, type_=kind) for name, kind in _TURN_FIELDS.items()},
)

_sums = (
    select(
        func.count().filter(session_messages.c.superseded_at.is_(None)).label("visible"),
        func.coalesce(func.max(session_messages.c.seq), 0).label("last_seq"),
        *(
            func.coalesce(func.sum(column).filter(condition), 0).label(name)
            for name, column, condition in (
                ("tokens", session_messages.c.tokens_used, sa.true()),
                ("cost", session_messages.c.cost_usd, sa.true()),
                ("superseded_tokens", session_messages.c.tokens_used, session_messages.c.superseded_at.is_not(None)),
                ("superseded_cost", session_messages.c.cost_usd, session_messages.c.superseded_at.is_not(None)),
            )
        ),
    )
    .where(messages.mine)
    .subquery("sums")
)
SETTLE = (
    sa.update(table)
    .where(sessions.mine)
    .values(
        message_count=_sums.c.visible,
        last_seq=_sums.c.last_seq,
        total_tokens=_sums.c.tokens,
        total_cost=_sums.c.cost,
        superseded_tokens=_sums.c.superseded_tokens,
        superseded_cost=_sums.c.superseded_cost,
    )
)


async def create(conn: Conn, target: Target, header: Header) -> bool:
    """Whether the session was made; it is there already where not."""
    values = {**header.session.model_dump(), **header.model_dump(exclude={"session", "format", "format_version"})}
    parent = header.session.parent
    values |= {"parent_session_id": parent and parent.session_id, "parent_seq": parent and parent.seq}
    fields = {name: values[name] for name in _SESSION_FIELDS}
    return await conn.row(CREATE, **target.key, **fields) is not None


async def _store_messages(conn: Conn, target: Target, models: list[Message], before: int) -> None:
    if [model.seq for model in models] != list(range(before + 1, before + len(models) + 1)):
        raise ValidationFailed.at("body", "seq", msg=f"The messages after {before} are not numbered 1, 2, 3 …")
    drafts = [model.draft() for model in models]
    message_ids = [draft.message_id for draft in drafts]
    taken = {row[0] for row in await conn.rows(TAKEN, **target.key, message_ids=message_ids)}
    arrays = {f"{name}_array": [draft.parameter(name) for draft in drafts] for name in ARRAYS}
    arrays["message_id_array"] = [str(uuid7()) if each in taken else each for each in message_ids]
    arrays |= {f"{name}_array": [getattr(model, name) for model in models] for name in _PLACES}
    await conn.rows(MESSAGES, **target.key, **arrays)


async def _store_memories(conn: Conn, target: Target, models: list[Memory], _before: int) -> None:
    for model in models:
        await conn.rows(MEMORY, **target.key, **{**model.model_dump(), "metadata": model.metadata or {}})


async def _store_turns(conn: Conn, target: Target, models: list[Turn], _before: int) -> None:
    for model in models:
        values = {**model.model_dump(), "lease_token": secrets.token_urlsafe(24)}
        if model.status == "open":
            # Whoever held it does not hold this copy.
            values |= {"status": "expired", "closed_at": model.opened_at}
        await conn.rows(TURN, **target.key, **values)


Store = Callable[[Conn, Target, list[Any], int], Awaitable[None]]
STORE: dict[str, Store] = {"messages": _store_messages, "memories": _store_memories, "turns": _store_turns}


async def settle(conn: Conn, target: Target, header: Header, counts: dict[str, int], last_seq_of_turns: int) -> None:
    """Computes the session's counters from its rows; raises ValidationFailed for what points past its messages."""
    last_seq = counts["messages"]
    for name, seq, most in (
        ("summary_to_seq", header.summary_to_seq or 0, last_seq),
        ("first_seq", header.first_seq, last_seq + 1),
        ("window_start_seq", header.window_start_seq, last_seq + 1),
        ("output_to_seq", last_seq_of_turns, last_seq),
    ):
        if seq > most:
            raise ValidationFailed.at("body", name, msg=f"The last message has seq {last_seq}")
    await conn.rows(SETTLE, **target.key)
