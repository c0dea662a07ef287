"""Conversations: the rows. A live run of the V1 or V0 API, bound to a stored session.

Its one invariant: a conversation is run by one relay at most: by the one that has put its `run_id` into the row, and
renews it. Statuses change under the row's lock, and each change is an event (events.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.conversation_schema import relay_conversations as table
from services.relay.conversation_schema import relay_feedback
from services.relay.errors import ConversationNotFound
from shared.database import Conn, Row
from shared.session_client import SessionKey

Api = Literal["V0", "V1"]
SandboxStatus = Literal["STARTING", "RUNNING", "PAUSED", "ERROR", "MISSING"]
ExecutionStatus = Literal["idle", "running", "paused", "waiting_for_confirmation", "finished", "error", "stuck"]

_NOW = func.statement_timestamp()
_SECOND: ColumnElement[Any] = literal_column("interval '1 second'")
NO_TITLE: Final = "Conversation {}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row. `title` is None until there is one; `run_id` names the run that goes on; times are UTC."""

    id: str
    user_id: str
    api: Api
    session_id: str
    key_id: str
    sandbox_id: str
    runtime_nonce: bytes
    title: str | None
    llm_model: str | None
    instructions: str | None
    selected_repository: str | None
    selected_branch: str | None
    git_provider: str | None
    trigger: str | None
    pr_number: list[int]
    parent_id: str | None
    sandbox_status: SandboxStatus
    execution_status: ExecutionStatus
    run_id: str | None
    wants_run: bool
    wants_pause: bool
    next_seq: int
    logged_version: int
    logged_seq: int
    logged_count: int
    created_at: datetime
    updated_at: datetime

    @property
    def session(self) -> SessionKey:
        return SessionKey(self.user_id, self.session_id)

    @property
    def shown_title(self) -> str:
        return self.title or NO_TITLE.format(self.id)

    @property
    def is_running(self) -> bool:
        return self.run_id is not None


# ── statements ──────────────────────────────────────────────────────────────────────────────────

NAMES: Final = tuple(Conversation.__dataclass_fields__)
COLUMNS: Final = tuple(table.c[name] for name in NAMES)
this = table.c.id == bindparam("id")
own = table.c.user_id == bindparam("user_id")

GET = select(*COLUMNS).where(this)
LOCK = GET.with_for_update()
BY_KEY = select(*COLUMNS).where(table.c.runtime_key_hash == bindparam("key_hash", type_=sa.LargeBinary))
BY_SESSIONS = select(*COLUMNS).where(
    sa.tuple_(table.c.user_id, table.c.session_id).in_(
        select(
            func.unnest(bindparam("user_ids", type_=ARRAY(sa.Text))),
            func.unnest(bindparam("session_ids", type_=ARRAY(sa.Text))),
        )
    )
)
_given: Final = (
    *("id", "user_id", "api", "session_id", "key_id", "sandbox_id", "title", "llm_model", "instructions"),
    *("selected_repository", "selected_branch", "git_provider", "trigger", "pr_number", "parent_id"),
)
CREATE = (
    insert(table)
    .values(
        **{name: bindparam(name, type_=table.c[name].type) for name in (*_given, "runtime_nonce", "runtime_key_hash")},
        sandbox_status="STARTING",
        execution_status="idle",
        created_at=_NOW,
        updated_at=_NOW,
    )
    .returning(*COLUMNS)
)
RENAME = sa.update(table).where(this).values(title=bindparam("title"), updated_at=_NOW).returning(table.c.id)
NAME = RENAME.where(table.c.title.is_(None))
DROP = sa.delete(table).where(this)
# V0 has no tasks that tell whether somebody still works on a start; none takes so long.
DROP_STALE = (
    sa.delete(table)
    .where(
        table.c.api == "V0",
        literal_column("sandbox_status = 'STARTING'"),
        table.c.created_at < _NOW - bindparam("seconds", type_=sa.Float) * _SECOND,
    )
    .returning(table.c.id)
)
DELETE = sa.delete(table).where(this, own).returning(table.c.id)

# One of a user's conversations at a time takes or gives up a place among those that run.
LOCK_USER = select(func.pg_advisory_xact_lock(func.hashtextextended(bindparam("user_id", type_=sa.Text), 7101)))
_holds_place: ColumnElement[bool] = literal_column("sandbox_status IN ('STARTING', 'RUNNING')")
PLACES = (
    select(table.c.id, table.c.run_id, table.c.sandbox_status)
    .where(own, _holds_place, table.c.id != bindparam("id"))
    .order_by(table.c.updated_at, table.c.id)
)
SET = {
    name: sa.update(table).where(this).values({name: bindparam("value", type_=table.c[name].type), "updated_at": _NOW})
    for name in ("sandbox_status", "execution_status", "wants_run")
}
# What was asked for before is over with it; what is asked for after it comes after it.
ASK_PAUSE = sa.update(table).where(this).values(wants_pause=True, wants_run=False)

_lease = _NOW + bindparam("lease_seconds", type_=sa.Float) * _SECOND
BEGIN_RUN = (
    sa.update(table)
    .where(this)
    .values(
        run_id=bindparam("run_id"),
        run_expires_at=_lease,
        execution_status="running",
        wants_run=False,
        wants_pause=False,
        updated_at=_NOW,
    )
)
RENEW_RUN = (
    sa.update(table)
    .where(this, table.c.run_id == bindparam("run_id"))
    .values(run_expires_at=_lease)
    .returning(table.c.wants_pause, table.c.execution_status)
)
END_RUN = (
    sa.update(table)
    .where(this)
    .values(
        run_id=sa.null(),
        run_expires_at=sa.null(),
        execution_status=bindparam("status"),
        wants_run=False,
        wants_pause=False,
        updated_at=_NOW,
    )
)
LOGGED = (
    sa.update(table)
    .where(this)
    .values(
        logged_version=bindparam("version", type_=sa.BigInteger),
        logged_seq=bindparam("seq", type_=sa.Integer),
        logged_count=bindparam("count", type_=sa.Integer),
    )
)
STRANDED = select(table.c.id, table.c.run_id, table.c.run_expires_at).where(
    table.c.run_id.is_not(None), table.c.run_expires_at < _NOW
)


FEEDBACK = insert(relay_feedback).values(
    id=bindparam("id"),
    conversation_id=bindparam("conversation_id"),
    body=bindparam("body", type_=relay_feedback.c.body.type),
    created_at=_NOW,
)


def from_row(row: Row) -> Conversation:
    return Conversation(*(row[name] for name in NAMES))


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


async def find(conn: Conn, conversation_id: str) -> Conversation | None:
    row = await conn.row(GET, id=conversation_id)
    return None if row is None else from_row(row)


async def lock(conn: Conn, conversation_id: str) -> Conversation:
    """The row, locked until the transaction ends; raises ConversationNotFound."""
    row = await conn.row(LOCK, id=conversation_id)
    if row is None:
        raise ConversationNotFound
    return from_row(row)


async def by_key_hash(conn: Conn, key_hash: bytes) -> Conversation | None:
    row = await conn.row(BY_KEY, key_hash=key_hash)
    return None if row is None else from_row(row)


async def by_sessions(conn: Conn, keys: Sequence[SessionKey]) -> list[Conversation]:
    user_ids, session_ids = [key.user_id for key in keys], [key.session_id for key in keys]
    return [from_row(row) for row in await conn.rows(BY_SESSIONS, user_ids=user_ids, session_ids=session_ids)]


# ── writing ─────────────────────────────────────────────────────────────────────────────────────


async def create(conn: Conn, values: dict[str, Any], *, nonce: bytes, key_hash: bytes) -> Conversation:
    """A new one that is starting; `values` are the columns that its maker gives."""
    full = dict.fromkeys(_given) | {"pr_number": []} | values
    row = await conn.row(CREATE, **full, runtime_nonce=nonce, runtime_key_hash=key_hash)
    assert row is not None  # noqa: S101 - an insert returns its row
    return from_row(row)


async def rename(conn: Conn, conversation_id: str, title: str) -> bool:
    return bool(await conn.rows(RENAME, id=conversation_id, title=title))


async def name(conn: Conn, conversation_id: str, title: str) -> bool:
    """Gives it a title, unless it has one."""
    return bool(await conn.rows(NAME, id=conversation_id, title=title))


async def delete(conn: Conn, user_id: str, conversation_id: str) -> bool:
    """Removes it with its events. Its session stays."""
    return bool(await conn.rows(DELETE, id=conversation_id, user_id=user_id))


async def keep_feedback(conn: Conn, feedback_id: str, conversation_id: str, body: dict[str, Any]) -> None:
    await conn.rows(FEEDBACK, id=feedback_id, conversation_id=conversation_id, body=body)
