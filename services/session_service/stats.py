"""Figures over many sessions: totals, and usage over time.

Its one invariant: only visible messages are counted.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final, Literal, get_args

import sqlalchemy as sa
from sqlalchemy import Select, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.sql.elements import ColumnElement

from services.session_service.counting import ALL, start_of
from services.session_service.schema import session_messages, session_totals, usage_buckets
from services.session_service.schema import sessions as table
from services.session_service.sessions import active, expired
from shared import wire
from shared.database import Conn, Database, Row
from shared.errors import ValidationFailed

Bucket = Literal["hour", "day", "month"]
MAX_BUCKETS: Final = 10_000
_SHORTEST: Final = {"hour": timedelta(hours=1), "day": timedelta(days=1), "month": timedelta(days=28)}

LIVE_SESSIONS: Final = 2_000
"""Up to so many sessions are added up when asked for; of more, the sums made beside the request path are given."""
LIVE_MESSAGES: Final = 20_000

LIVE = select(
    func.count().label("sessions"),
    func.count().filter(active).label("active"),
    func.coalesce(func.sum(table.c.message_count), 0).label("messages"),
    func.coalesce(func.sum(table.c.total_tokens - table.c.superseded_tokens), 0).label("tokens"),
    func.coalesce(func.sum(table.c.total_cost - table.c.superseded_cost), 0).label("cost"),
).select_from(table)
LIVE_OF_USER = LIVE.where(table.c.user_id == bindparam("user_id"))
SUMS = select(session_totals).where(session_totals.c.user_id == bindparam("user_id"))
# Their time is over, and the sweeper has not come by yet.
OVERDUE = select(func.count()).select_from(table).where(expired)
OVERDUE_OF_USER = OVERDUE.where(table.c.user_id == bindparam("user_id"))


async def totals(conn: Conn, user_id: str | None = None) -> wire.Stats:
    """Totals of all users, or of one."""
    scope = {} if user_id is None else {"user_id": user_id}
    row = await conn.row(SUMS, user_id=user_id or ALL)
    if row is None or row["sessions"] <= LIVE_SESSIONS:
        row = await conn.row(LIVE_OF_USER if scope else LIVE, **scope)
        overdue = 0
    else:
        overdue = await conn.value(OVERDUE_OF_USER if scope else OVERDUE, **scope)
    values = dict(row.items()) if row else {}
    sessions, messages = int(values["sessions"]), int(values["messages"])
    return wire.Stats(
        total_sessions=sessions,
        active_sessions=int(values["active"]) - overdue,
        total_messages=messages,
        total_tokens=int(values["tokens"]),
        total_cost=float(values["cost"]),
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


LIVE_USAGE: dict[tuple[Bucket, bool], Select[Any]] = {
    (bucket, of_user): _usage(bucket, of_user=of_user) for bucket in get_args(Bucket) for of_user in (False, True)
}
USAGE = (
    select(usage_buckets.c.start, *(usage_buckets.c[name] for name in _FIGURES))
    .where(
        usage_buckets.c.user_id == bindparam("user_id"),
        usage_buckets.c.bucket == bindparam("bucket"),
        usage_buckets.c.start >= _from,
        usage_buckets.c.start < _to,
    )
    .order_by(usage_buckets.c.start)
)
MESSAGES = select(session_totals.c.messages).where(session_totals.c.user_id == bindparam("user_id"))


async def usage(
    conn: Conn, bucket: Bucket, since: datetime, until: datetime, user_id: str | None, *, now: datetime
) -> wire.Usage:
    """Visible messages with since ≤ created_at < until, by UTC hour, day or month; empty buckets included.

    `now` is when it was asked: of a bucket that goes on then, all that there is was asked for.
    """
    if (until - since) / _SHORTEST[bucket] > MAX_BUCKETS:
        raise ValidationFailed.at("query", "from", msg=f"More than {MAX_BUCKETS} buckets")
    if (await conn.value(MESSAGES, user_id=user_id or ALL) or 0) <= LIVE_MESSAGES:
        found = await _live(conn, bucket, since, until, user_id)
        return wire.Usage(bucket=bucket, items=found)
    items = {start: _empty(start) for start in _starts(bucket, since, until)}
    rows = await conn.rows(USAGE, user_id=user_id or ALL, bucket=bucket, since=min(items), until=until)
    items |= {row["start"]: _item(row) for row in rows}
    # A bucket that is asked for in part cannot come from a sum over all of it.
    for edge_from, edge_to in parts(bucket, since, until, now):
        items |= {item.start: item for item in await _live(conn, bucket, edge_from, edge_to, user_id)}
    return wire.Usage(bucket=bucket, items=[items[start] for start in sorted(items)])


async def _live(
    conn: Conn, bucket: Bucket, since: datetime, until: datetime, user_id: str | None
) -> list[wire.UsageBucket]:
    of_user = {} if user_id is None else {"user_id": user_id}
    rows = await conn.rows(LIVE_USAGE[bucket, bool(of_user)], since=since, until=until, **of_user)
    return [_item(row) for row in rows]


def _item(row: Row) -> wire.UsageBucket:
    return wire.UsageBucket(
        start=row["start"],
        messages=row["messages"],
        tokens=int(row["tokens"]),
        cost=float(row["cost"]),
        active_sessions=row["active_sessions"],
    )


def _empty(start: datetime) -> wire.UsageBucket:
    return wire.UsageBucket(start=start, messages=0, tokens=0, cost=0.0, active_sessions=0)


def _next(bucket: Bucket, start: datetime) -> datetime:
    if bucket == "month":
        return start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
    return start + _SHORTEST[bucket]


def _starts(bucket: Bucket, since: datetime, until: datetime) -> Iterator[datetime]:
    start = start_of(bucket, since)
    while start < until:
        yield start
        start = _next(bucket, start)


def parts(bucket: Bucket, since: datetime, until: datetime, now: datetime) -> list[tuple[datetime, datetime]]:
    """The first and the last bucket, where they are asked for in part; of what is still to come there is no part."""
    first, last = start_of(bucket, since), start_of(bucket, until)
    edges = []
    if since != first:
        edges.append((since, min(until, _next(bucket, first))))
    if until != last and until < now and (since == first or last != first):
        edges.append((max(since, last), until))
    return edges
