"""Sessions: their rows, their life from active to archived, and the lock that every writer takes first.

Its one invariant: an expired session is never served or written as active, whether or not the sweeper
has come by: every statement judges the status through `expired`.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import and_, bindparam, case, exists, func, literal_column, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.elements import ColumnElement

from services.session_service.schema import ACTIVE, session_memories
from services.session_service.schema import sessions as table
from shared import wire
from shared.database import Conn, Database, Row
from shared.errors import (
    InvalidTransition,
    SessionArchived,
    SessionNotActive,
    SessionNotFound,
    TurnInProgress,
    ValidationFailed,
    VersionMismatch,
)
from shared.json import equal

ENDED: ColumnElement[str] = literal_column("'ended'")
BY_USER: ColumnElement[str] = literal_column("'user'")
BY_EXPIRY: ColumnElement[str] = literal_column("'expired'")
TRANSITIONS = {"active": {"completed", "ended"}, "completed": {"archived", "ended"}}

# The clock is the database's, and the same throughout a statement, so that expiry and activity agree.
NOW: ColumnElement[datetime] = func.statement_timestamp()
# A writer that waited for the row's lock must not turn the clock back.
MOMENT: ColumnElement[datetime] = func.greatest(table.c.last_activity, NOW)
SECOND: ColumnElement[Any] = literal_column("interval '1 second'")

mine: ColumnElement[bool] = and_(table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id"))
# A session whose open turn still holds its lease does not expire.
lease_is_over: ColumnElement[bool] = func.coalesce(table.c.lease_expires_at <= NOW, literal_column("true"))
expired: ColumnElement[bool] = and_(table.c.status == ACTIVE, table.c.expires_at <= NOW, lease_is_over)
active: ColumnElement[bool] = and_(
    table.c.status == ACTIVE,
    func.coalesce(~and_(table.c.expires_at <= NOW, lease_is_over), literal_column("true")),
)
# What every activity sets; PUT and reads are none.
TOUCHED: dict[str, Any] = {
    "version": table.c.version + 1,
    "updated_at": NOW,
    "last_activity": MOMENT,
    "expires_at": MOMENT + table.c.idle_timeout_seconds * SECOND,
}
# Whoever holds the row's lock has judged the session already; time that passes meanwhile changes nothing of it.
IS_HELD: ColumnElement[bool] = bindparam("is_held", type_=sa.Boolean)

COLUMNS: tuple[ColumnElement[Any], ...] = (
    table.c.session_id,
    table.c.user_id,
    table.c.title,
    case((expired, ENDED), else_=table.c.status).label("status"),
    table.c.conversation_data,
    table.c.metadata,
    active.label("is_active"),
    table.c.message_count,
    table.c.total_tokens,
    table.c.total_cost,
    table.c.session_summary,
    table.c.summary_to_seq,
    table.c.summary_model,
    table.c.created_at,
    table.c.updated_at,
    table.c.last_activity,
    table.c.version,
    table.c.generation,
    table.c.idle_timeout_seconds,
    table.c.expires_at,
    case((expired, BY_EXPIRY), else_=table.c.ended_reason).label("ended_reason"),
    table.c.parent_session_id,
    table.c.parent_seq,
)
DETAILS = (
    expired.label("is_expired"),
    table.c.last_seq,
    table.c.first_seq,
    table.c.window_start_seq,
    table.c.latest_turn_id,
    # Seconds that an open turn still holds the session; 0 when its lease is over; null without one.
    case(
        (
            table.c.lease_expires_at.is_not(None),
            func.greatest(func.extract("epoch", table.c.lease_expires_at - NOW), 0),
        )
    ).label("lease_left_seconds"),
)

GET = select(*COLUMNS).where(mine)
LOOK = select(*COLUMNS, *DETAILS).where(mine)
# Keys never change, so that rows that refer to this one need not wait for it.
LOCK = LOOK.with_for_update(key_share=True)
EXPIRE = (
    sa.update(table)
    .where(mine, expired)
    .values(
        status=ENDED,
        ended_reason=BY_EXPIRY,
        updated_at=NOW,
        version=table.c.version + 1,
    )
    .returning(*COLUMNS, *DETAILS)
)


def from_values(values: dict[str, Any]) -> wire.Session:
    """The session that COLUMNS describe; takes what it needs out of `values`."""
    parent_id, parent_seq = values.pop("parent_session_id"), values.pop("parent_seq")
    parent = None if parent_id is None else wire.ForkParent.model_construct(session_id=parent_id, seq=parent_seq)
    if not values["session_summary"]:
        values |= {"summary_to_seq": None, "summary_model": None}
    return wire.Session.model_construct(**values, parent=parent)


def from_row(row: Row | None) -> wire.Session:
    """The session of a row; no row means that this user has no such session."""
    if row is None:
        raise SessionNotFound
    return from_values(dict(row.items()))


@dataclass(frozen=True, slots=True)
class IfVersion:
    """What If-Match names: a version, or None for any."""

    version: int | None

    def fits(self, session: wire.Session | None) -> bool:
        """Whether there is a session, and of this version where one is named."""
        return session is not None and self.version in {None, session.version}

    def require(self, session: wire.Session | None) -> None:
        """Raises VersionMismatch unless it fits."""
        if not self.fits(session):
            raise VersionMismatch(version=session.version if session else None)


@dataclass(frozen=True, slots=True)
class Detail:
    """A session with what the writers and readers of its parts need to know.

    `summary_to_seq` is the stored one: a range may be there without a summary.
    """

    session: wire.Session
    last_seq: int
    summary_to_seq: int | None
    first_seq: int
    window_start_seq: int
    latest_turn_id: str | None
    lease_left_seconds: float | None

    @property
    def key(self) -> dict[str, str]:
        return {"user_id": self.session.user_id, "session_id": self.session.session_id}

    @property
    def has_open_turn(self) -> bool:
        """Whether a turn is open, its lease running or run out."""
        return self.lease_left_seconds is not None

    def require_free(self) -> None:
        """Raises TurnInProgress while an open turn's lease runs."""
        if self.lease_left_seconds:
            raise TurnInProgress(retry_after_seconds=self.lease_left_seconds, turn_id=self.latest_turn_id)

    def require_active(self) -> None:
        if not self.session.is_active:
            raise SessionNotActive


async def get(conn: Conn, user_id: str, session_id: str) -> wire.Session:
    return from_row(await conn.row(GET, user_id=user_id, session_id=session_id))


async def lock(conn: Conn, user_id: str, session_id: str, if_match: IfVersion | None = None) -> Detail:
    """The session, held against every other writer until the transaction ends; an expiry due is carried out.

    Raises SessionNotFound, or VersionMismatch by `if_match`.
    """
    row = await conn.row(LOCK, user_id=user_id, session_id=session_id)
    detail = detail_of(row)
    if if_match is not None:
        if_match.require(detail.session)
    if row is not None and row["is_expired"]:
        detail = detail_of(await conn.row(EXPIRE, user_id=user_id, session_id=session_id) or row)
    return detail


async def look(conn: Conn, user_id: str, session_id: str) -> Detail:
    """As `lock`, holding and changing nothing."""
    return detail_of(await conn.row(LOOK, user_id=user_id, session_id=session_id))


def unmade(user_id: str, session_id: str) -> Detail:
    """A session that is not there yet, as its first messages will find it."""
    known: dict[str, Any] = {"user_id": user_id, "session_id": session_id, "session_summary": ""}
    return Detail(
        session=wire.Session.model_construct(**known),
        last_seq=0,
        summary_to_seq=None,
        first_seq=1,
        window_start_seq=1,
        latest_turn_id=None,
        lease_left_seconds=None,
    )


def detail_of(row: Row | None) -> Detail:
    if row is None:
        raise SessionNotFound
    values = dict(row.items())
    values.pop("is_expired")
    left = values.pop("lease_left_seconds")
    details = {column.name: values.pop(column.name) for column in DETAILS[1:-1]}
    return Detail(
        summary_to_seq=values["summary_to_seq"],
        session=from_values(values),
        **details,
        lease_left_seconds=None if left is None else float(left),
    )


# ── update, end, summary ────────────────────────────────────────────────────────────────────────

UPDATE = (
    sa.update(table)
    .where(mine)
    .values(
        title=bindparam("title", type_=sa.Text),
        metadata=bindparam("metadata", type_=JSONB),
        conversation_data=bindparam("conversation_data", type_=JSONB),
        session_summary=bindparam("session_summary", type_=sa.Text),
        summary_to_seq=bindparam("summary_to_seq", type_=sa.Integer),
        summary_model=bindparam("summary_model", type_=sa.Text),
        status=bindparam("status", type_=sa.Text),
        ended_reason=bindparam("ended_reason", type_=sa.Text),
        idle_timeout_seconds=bindparam("idle_timeout_seconds", type_=sa.Integer),
        expires_at=table.c.last_activity + bindparam("idle_timeout_seconds", type_=sa.Integer) * SECOND,
        updated_at=NOW,
        version=table.c.version + 1,
    )
    .returning(*COLUMNS)
)

END = (
    sa.update(table).where(mine).values(status=ENDED, ended_reason=BY_USER, updated_at=NOW, version=table.c.version + 1)
)

_memories_of = and_(session_memories.c.user_id == table.c.user_id, session_memories.c.session_id == table.c.session_id)
GET_SUMMARY = select(*COLUMNS, exists().where(_memories_of).label("has_memory")).where(mine)


async def update(
    database: Database, user_id: str, session_id: str, change: wire.UpdateSession, if_match: IfVersion | None = None
) -> wire.Session:
    """The session with what `change` names replaced; the same session where that changes nothing.

    Raises VersionMismatch, SessionArchived, InvalidTransition, or ValidationFailed for a summary beyond the last
    message.
    """

    async def work(conn: Conn) -> wire.Session:
        locked = await lock(conn, user_id, session_id, if_match)
        new = _changed(locked, change)
        if new is None:
            return locked.session
        return from_row(await conn.row(UPDATE, **locked.key, **new))

    return await database.transact(work)


def _changed(locked: Detail, change: wire.UpdateSession) -> dict[str, Any] | None:
    """Every column's new value, or None when nothing would change."""
    session = locked.session
    names = ("title", "metadata", "conversation_data", "session_summary", "summary_model", "status")
    old: dict[str, Any] = {name: getattr(session, name) for name in (*names, "idle_timeout_seconds")}
    old |= {"summary_to_seq": locked.summary_to_seq, "ended_reason": session.ended_reason}
    new = old | change.model_dump(exclude_none=True)
    if change.session_summary not in {None, session.session_summary}:
        new["summary_to_seq"] = locked.last_seq if change.summary_to_seq is None else change.summary_to_seq
        new["summary_model"] = change.summary_model
    if not new["session_summary"]:
        new["summary_model"] = None
    if equal(new, old):
        return None
    if session.status == "archived":
        raise SessionArchived
    if (new["summary_to_seq"] or 0) > locked.last_seq:
        raise ValidationFailed.at("body", "summary_to_seq", msg=f"The last message has seq {locked.last_seq}")
    if new["status"] != session.status:
        if new["status"] not in TRANSITIONS.get(session.status, ()):
            raise InvalidTransition(f"A session cannot go from {session.status} to {new['status']}")
        if new["status"] == "ended":
            new["ended_reason"] = "user"
    return new


async def end(database: Database, user_id: str, session_id: str, if_match: IfVersion | None = None) -> None:
    """Ends an active or completed session; an ended one stays as it is.

    Raises VersionMismatch, or SessionArchived for an archived one.
    """

    async def work(conn: Conn) -> None:
        session = (await lock(conn, user_id, session_id, if_match)).session
        if session.status == "archived":
            raise SessionArchived
        if session.status != "ended":
            await conn.rows(END, user_id=user_id, session_id=session_id)

    await database.transact(work)


async def get_summary(conn: Conn, user_id: str, session_id: str) -> wire.SessionSummary:
    row = await conn.row(GET_SUMMARY, user_id=user_id, session_id=session_id)
    if row is None:
        raise SessionNotFound
    return wire.SessionSummary.model_construct(**{name: row[name] for name in wire.SessionSummary.model_fields})
