"""Figures over many sessions: totals, and usage over time.

Its one invariant: only visible messages are counted.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final, Literal, get_args

import sqlalchemy as sa
from sqlalchemy import Select, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.sql.elements import ColumnElement

from services.session_service.schema import session_messages
from services.session_service.schema import sessions as table
from services.session_service.sessions import active
from shared import wire
from shared.database import Conn, Database
from shared.errors import ValidationFailed

Bucket = Literal["hour", "day", "month"]
MAX_BUCKETS: Final = 10_000
_SHORTEST: Final = {"hour": timedelta(hours=1), "day": timedelta(days=1), "month": timedelta(days=28)}

TOTALS = select(
    func.count().label("total_sessions"),
    func.count().filter(active).label("active_sessions"),
    func.coalesce(func.sum(table.c.message_count), 0).label("total_messages"),
    func.coalesce(func.sum(table.c.total_tokens - table.c.superseded_tokens), 0).label("total_tokens"),
    func.coalesce(func.sum(table.c.total_cost - table.c.superseded_cost), 0).label("total_cost"),
).select_from(table)
TOTALS_OF_USER = TOTALS.where(table.c.user_id == bindparam("user_id"))


async def totals(conn: Conn, user_id: str | None = None) -> wire.Stats:
    """Totals of all users, or of one."""
    row = await (conn.row(TOTALS) if user_id is None else conn.row(TOTALS_OF_USER, user_id=user_id))
    values = dict(row.items()) if row else {}
    sessions, messages = int(values["total_sessions"]), int(values["total_messages"])
    return wire.Stats(
        total_sessions=sessions,
        active_sessions=int(values["active_sessions"]),
        total_messages=messages,
        total_tokens=int(values["total_tokens"]),
        total_cost=float(values["total_cost"]),
        average_messages_per_session=round(messages / sessions, 1) if sessions else 0.0,
    )


class Cached:
    """The totals of all users, at most `max_age_seconds` old; many callers at once cost one query."""

    def __init__(self, database: Database, max_age_seconds: float) -> None:
        self._load: Callable[[], Awaitable[wire.Stats]] = lambda: totals(database)
        self._max_age_seconds = max_age_seconds
        self._lock = asyncio.Lock()
        self._value: wire.Stats | None = None
        self._loaded_at = 0.0

    async def get(self) -> wire.Stats:
        async with self._lock:
            if self._value is None or monotonic() - self._loaded_at > self._max_age_seconds:
                started_at = monotonic()
                self._value, self._loaded_at = await self._load(), started_at
            return self._value


# ── usage over time ─────────────────────────────────────────────────────────────────────────────

_from, _to = bindparam("since", type_=TIMESTAMP(timezone=True)), bindparam("until", type_=TIMESTAMP(timezone=True))


_FIGURES: Final = ("messages", "tokens", "cost", "active_sessions")


def _usage(bucket: Bucket, *, of_user: bool) -> Select[Any]:
    unit: ColumnElement[str] = literal_column(f"'{bucket}'")
    step: ColumnElement[Any] = literal_column(f"interval '1 {bucket}'")
    trunc = func.date_trunc(unit, session_messages.c.created_at, literal_column("'UTC'"))
    counted = select(
        trunc.label("start"),
        func.count().label("messages"),
        func.sum(session_messages.c.tokens_used).label("tokens"),
        func.sum(session_messages.c.cost_usd).label("cost"),
        func.count(sa.distinct(sa.tuple_(session_messages.c.user_id, session_messages.c.session_id))).label(
            "active_sessions"
        ),
    ).where(
        session_messages.c.created_at >= _from,
        session_messages.c.created_at < _to,
        session_messages.c.superseded_at.is_(None),
    )
    if of_user:
        counted = counted.where(session_messages.c.user_id == bindparam("user_id"))
    per_bucket = counted.group_by(trunc).subquery()
    utc: ColumnElement[str] = literal_column("'UTC'")
    series = func.generate_series(
        func.date_trunc(unit, func.timezone(utc, _from)),
        func.timezone(utc, _to) - literal_column("interval '1 microsecond'"),
        step,
    )
    buckets = select(func.timezone(utc, series).label("start")).subquery("buckets")
    figures = [func.coalesce(per_bucket.c[name], 0).label(name) for name in _FIGURES]
    return (
        select(buckets.c.start, *figures)
        .select_from(buckets.outerjoin(per_bucket, per_bucket.c.start == buckets.c.start))
        .order_by(buckets.c.start)
    )


USAGE: dict[tuple[Bucket, bool], Select[Any]] = {
    (bucket, of_user): _usage(bucket, of_user=of_user) for bucket in get_args(Bucket) for of_user in (False, True)
}


async def usage(conn: Conn, bucket: Bucket, since: datetime, until: datetime, user_id: str | None) -> wire.Usage:
    """Visible messages with since ≤ created_at < until, by UTC hour, day or month; empty buckets included."""
    if (until - since) / _SHORTEST[bucket] > MAX_BUCKETS:
        raise ValidationFailed.at("query", "from", msg=f"More than {MAX_BUCKETS} buckets")
    of_user = {} if user_id is None else {"user_id": user_id}
    rows = await conn.rows(USAGE[bucket, bool(of_user)], since=since, until=until, **of_user)
    items = [
        wire.UsageBucket(
            start=row["start"],
            messages=row["messages"],
            tokens=int(row["tokens"]),
            cost=float(row["cost"]),
            active_sessions=row["active_sessions"],
        )
        for row in rows
    ]
    return wire.Usage(bucket=bucket, items=items)
