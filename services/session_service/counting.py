"""Sums that would be too slow to make when asked for: totals of users, and usage by hour, day and month.

Its one invariant: session_totals and usage_buckets hold exactly what the counted_* columns of the sessions say was
added; whatever changes a counted message takes it out again in the same transaction. The user '' stands for all.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, case, func, literal_column, or_, select
from sqlalchemy.dialects.postgresql import TIMESTAMP, array, insert
from sqlalchemy.sql.elements import ColumnElement

from services.session_service.schema import session_messages, session_totals, usage_buckets
from services.session_service.schema import sessions as table
from shared.database import Conn

BUCKETS: Final = ("hour", "day", "month")
ALL: Final = ""
_UTC: ColumnElement[str] = literal_column("'UTC'")
_time = TIMESTAMP(timezone=True)


def start_of(bucket: str, moment: datetime) -> datetime:
    """The beginning of the UTC hour, day or month that a time lies in."""
    start = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if bucket == "hour":
        return start
    return start.replace(hour=0) if bucket == "day" else start.replace(hour=0, day=1)


# ── adding ──────────────────────────────────────────────────────────────────────────────────────


_BUCKET: Final[dict[str, sa.types.TypeEngine[Any]]] = {
    "user_id": sa.Text(),
    "session_id": sa.Text(),
    "bucket": sa.Text(),
    "start": _time,
    "messages": sa.BigInteger(),
    "tokens": sa.BigInteger(),
    "cost": sa.Numeric(),
    "active_sessions": sa.BigInteger(),
}
_SUMS: Final = ("messages", "tokens", "cost", "active_sessions")


@dataclass(slots=True)
class Usage:
    """What a round of counting adds to usage_buckets: a row for each bucket of each session."""

    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def add(self, user_id: str, session_id: str, counted_to: datetime | None, messages: Iterable[Any]) -> None:
        """Adds a session's messages (created_at, tokens_used, cost_usd), in order, after those up to `counted_to`.

        In the order of time a session is new to a bucket exactly when its message before was in an earlier one.
        """
        for hour, found in groupby(messages, key=lambda row: start_of("hour", row["created_at"])):
            together = list(found)
            sums = (
                len(together),
                sum(row["tokens_used"] for row in together),
                sum((row["cost_usd"] for row in together), Decimal(0)),
            )
            for bucket in BUCKETS:
                start = start_of(bucket, hour)
                is_new = counted_to is None or start_of(bucket, counted_to) < start
                self.rows.append((user_id, session_id, bucket, start, *sums, int(is_new)))
            counted_to = hour

    def parameters(self) -> dict[str, list[Any]]:
        columns = list(zip(*self.rows, strict=True)) or [()] * len(_BUCKET)
        return {f"usage_{name}": list(values) for name, values in zip(_BUCKET, columns, strict=True)}


def add_usage(held: sa.CTE) -> sa.CTE:
    """The part of a statement that adds a Usage's `parameters` to usage_buckets, of those sessions that are `held`."""
    new = (
        func.unnest(*(bindparam(f"usage_{name}", type_=ARRAY(kind)) for name, kind in _BUCKET.items()))
        .table_valued(*_BUCKET, name="usage")
        .render_derived()
    )
    scopes = _scopes_of(new)
    sums = [func.sum(new.c[name]) for name in _SUMS]
    added = (
        select(scopes.c.scope, new.c.bucket, new.c.start, *sums)
        .select_from(
            new.join(held, and_(held.c.user_id == new.c.user_id, held.c.session_id == new.c.session_id)).join(
                scopes, sa.true()
            )
        )
        .group_by(scopes.c.scope, new.c.bucket, new.c.start)
        .order_by(scopes.c.scope, new.c.bucket, new.c.start)
    )
    upsert = insert(usage_buckets).from_select(["user_id", "bucket", "start", *_SUMS], added)
    return upsert.on_conflict_do_update(
        index_elements=["user_id", "bucket", "start"],
        set_={name: usage_buckets.c[name] + upsert.excluded[name] for name in _SUMS},
    ).cte("used")


def _scopes_of(rows: Any) -> Any:
    """The users that figures count for: their own, and all."""
    both = func.unnest(array([rows.c.user_id, literal_column("''")]))
    return both.table_valued("scope", name="scopes").render_derived()


def add_totals(held: sa.CTE) -> sa.CTE:
    """The part of a statement that adds to session_totals how the `held` sessions differ from what was counted.

    `held` has each session's figures now and, under the names of the counted_* columns, those that were counted.
    """
    differences = {
        "sessions": case((held.c.counted, 0), else_=1),
        "active": held.c.is_active.cast(sa.Integer) - held.c.counted_active.cast(sa.Integer),
        "messages": held.c.message_count - held.c.counted_messages,
        "tokens": held.c.tokens - held.c.counted_tokens,
        "cost": held.c.cost - held.c.counted_cost,
    }
    scopes = _scopes_of(held)
    sums = [func.sum(each).label(name) for name, each in differences.items()]
    added = select(scopes.c.scope, *sums).select_from(held.join(scopes, sa.true())).group_by(scopes.c.scope)
    upsert = insert(session_totals).from_select(["user_id", *differences], added)
    return upsert.on_conflict_do_update(
        index_elements=["user_id"],
        set_={name: session_totals.c[name] + upsert.excluded[name] for name in differences},
    ).cte("added")


# ── taking out ──────────────────────────────────────────────────────────────────────────────────

_from_seq = bindparam("from_seq", type_=sa.Integer)
_to_seq = bindparam("to_seq", type_=sa.Integer)
_mine = and_(
    session_messages.c.user_id == bindparam("user_id"), session_messages.c.session_id == bindparam("session_id")
)
_counted = and_(
    _mine,
    session_messages.c.superseded_at.is_(None),
    session_messages.c.seq
    <= select(table.c.indexed_seq)
    .where(table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id"))
    .scalar_subquery(),
)
_neighbours = {
    "before": select(session_messages.c.created_at)
    .where(_counted, session_messages.c.seq < _from_seq)
    .order_by(session_messages.c.seq.desc())
    .limit(1)
    .scalar_subquery(),
    "after": select(session_messages.c.created_at)
    .where(_counted, session_messages.c.seq > _to_seq)
    .order_by(session_messages.c.seq)
    .limit(1)
    .scalar_subquery(),
}
_kinds = (
    func.unnest(literal_column("ARRAY['hour', 'day', 'month']", ARRAY(sa.Text)))
    .table_valued("bucket", name="kinds")
    .render_derived()
)
_start = func.date_trunc(_kinds.c.bucket, session_messages.c.created_at, _UTC)
_gone = (
    select(
        _kinds.c.bucket,
        _start.label("start"),
        func.count().label("messages"),
        func.sum(session_messages.c.tokens_used).label("tokens"),
        func.sum(session_messages.c.cost_usd).label("cost"),
    )
    .select_from(session_messages.join(_kinds, sa.true()))
    .where(_counted, session_messages.c.seq.between(_from_seq, _to_seq))
    .group_by(_kinds.c.bucket, _start)
    .subquery("gone")
)
# In the order of time only a neighbour can still be in the same bucket.
_stays = or_(*(func.date_trunc(_gone.c.bucket, neighbour, _UTC) == _gone.c.start for neighbour in _neighbours.values()))
TAKE_OUT = (
    sa.update(usage_buckets)
    .where(
        or_(usage_buckets.c.user_id == bindparam("user_id"), usage_buckets.c.user_id == literal_column("''")),
        usage_buckets.c.bucket == _gone.c.bucket,
        usage_buckets.c.start == _gone.c.start,
    )
    .values(
        messages=usage_buckets.c.messages - _gone.c.messages,
        tokens=usage_buckets.c.tokens - _gone.c.tokens,
        cost=usage_buckets.c.cost - _gone.c.cost,
        active_sessions=usage_buckets.c.active_sessions
        - case((func.coalesce(_stays, literal_column("false")), 0), else_=1),
    )
)
# A message after the ones taken out was counted last, and stays so.
COUNTED_TO = case((_neighbours["after"].is_not(None), table.c.counted_to), else_=_neighbours["before"])


async def take_out(conn: Conn, key: dict[str, str], *, from_seq: int, to_seq: int) -> None:
    """Takes the visible messages in from_seq…to_seq out of usage; the caller holds the session's lock."""
    await conn.rows(TAKE_OUT, **key, from_seq=from_seq, to_seq=to_seq)


# ── a user who goes ─────────────────────────────────────────────────────────────────────────────

_this = and_(table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id"))
_leaving = (
    select(table.c.counted_active, table.c.counted_messages, table.c.counted_tokens, table.c.counted_cost)
    .where(_this, table.c.counted)
    .subquery("leaving")
)
FORGET_SESSION = (
    sa.update(session_totals)
    .where(or_(session_totals.c.user_id == bindparam("user_id"), session_totals.c.user_id == literal_column("''")))
    .values(
        sessions=session_totals.c.sessions - 1,
        active=session_totals.c.active - _leaving.c.counted_active.cast(sa.Integer),
        messages=session_totals.c.messages - _leaving.c.counted_messages,
        tokens=session_totals.c.tokens - _leaving.c.counted_tokens,
        cost=session_totals.c.cost - _leaving.c.counted_cost,
    )
    .where(_leaving.c.counted_messages.is_not(None))
)
_theirs = (
    sa.delete(usage_buckets)
    .where(usage_buckets.c.user_id == bindparam("user_id"))
    .returning(usage_buckets.c.bucket, usage_buckets.c.start, *(usage_buckets.c[name] for name in _SUMS))
    .cte("theirs")
)
_everyones: sa.Alias[Any] = usage_buckets.alias("everyones")  # type: ignore[assignment]
FORGET_USAGE = (
    sa.update(_everyones)
    .where(
        _everyones.c.user_id == literal_column("''"),
        _everyones.c.bucket == _theirs.c.bucket,
        _everyones.c.start == _theirs.c.start,
    )
    .values({name: _everyones.c[name] - _theirs.c[name] for name in _SUMS})
)
# Whoever adds to the sums holds it until the end of the transaction.
_LOCK: ColumnElement[Any] = literal_column(str(0x6E657773))
TRY_LOCK = select(func.pg_try_advisory_xact_lock(_LOCK))
LOCK = select(func.pg_advisory_xact_lock(_LOCK))
COUNTED_ONE = select(table.c.session_id).where(table.c.user_id == bindparam("user_id"), table.c.counted).limit(1)
FORGET_TOTALS = sa.delete(session_totals).where(session_totals.c.user_id == bindparam("user_id"))


async def forget_session(conn: Conn, key: dict[str, str]) -> None:
    """Takes a session, which is about to be deleted, out of the totals."""
    await conn.rows(FORGET_SESSION, **key)


async def forget_user(conn: Conn, user_id: str) -> bool:
    """Takes a user, whose sessions are gone, out of all sums; false where a new session has been added to them."""
    await conn.rows(LOCK)
    if await conn.row(COUNTED_ONE, user_id=user_id) is not None:
        return False
    await conn.rows(FORGET_USAGE, user_id=user_id)
    await conn.rows(FORGET_TOTALS, user_id=user_id)
    return True
