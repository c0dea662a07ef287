"""Statements that compare the record with itself, for fsck.

Its one invariant: each compares within one statement, and so within one snapshot: a writer meanwhile disturbs nothing.
"""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import and_, bindparam, exists, func, literal_column, or_, select, tuple_
from sqlalchemy.dialects.postgresql import array

from services.session_service.schema import OPEN, session_messages, session_totals, session_turns, usage_buckets
from services.session_service.schema import sessions as table

PAGE: Final = 1_000

_key = (table.c.user_id, table.c.session_id)
_page = (
    select(*_key)
    .where(tuple_(*_key) > tuple_(bindparam("after_user", type_=sa.Text), bindparam("after_session", type_=sa.Text)))
    .order_by(*_key)
    .limit(PAGE)
    .subquery("page")
)
_superseded = session_messages.c.superseded_at.is_not(None)


def _sum(column: Any, *conditions: Any) -> Any:
    return func.coalesce(func.sum(column).filter(*conditions) if conditions else func.sum(column), 0)


_rows = (
    select(
        _page.c.user_id,
        _page.c.session_id,
        func.count(session_messages.c.seq).label("rows"),
        func.count(session_messages.c.seq).filter(~_superseded).label("message_count"),
        func.coalesce(func.min(session_messages.c.seq), 1).label("first"),
        func.coalesce(func.max(session_messages.c.seq), 0).label("last_seq"),
        _sum(session_messages.c.tokens_used).label("total_tokens"),
        _sum(session_messages.c.cost_usd).label("total_cost"),
        _sum(session_messages.c.tokens_used, _superseded).label("superseded_tokens"),
        _sum(session_messages.c.cost_usd, _superseded).label("superseded_cost"),
    )
    .select_from(
        _page.outerjoin(
            session_messages,
            and_(session_messages.c.user_id == _page.c.user_id, session_messages.c.session_id == _page.c.session_id),
        )
    )
    .group_by(_page.c.user_id, _page.c.session_id)
    .subquery("counted")
)
COUNTERS = ("message_count", "last_seq", "total_tokens", "total_cost", "superseded_tokens", "superseded_cost")
_open = (
    select(session_turns.c.turn_id)
    .where(
        session_turns.c.user_id == table.c.user_id,
        session_turns.c.session_id == table.c.session_id,
        session_turns.c.status == OPEN,
    )
    .limit(1)
    .scalar_subquery()
)
CHECK = (
    select(
        *_key,
        *(table.c[name].label(name) for name in COUNTERS),
        *(_rows.c[name].label(f"counted_{name}") for name in COUNTERS),
        _rows.c.rows,
        _rows.c.first,
        table.c.lease_expires_at,
        table.c.latest_turn_id,
        _open.label("open_turn_id"),
    )
    .select_from(_rows.join(table, and_(table.c.user_id == _rows.c.user_id, table.c.session_id == _rows.c.session_id)))
    .order_by(*_key)
)
_turn_of_message = exists().where(
    session_turns.c.user_id == session_messages.c.user_id,
    session_turns.c.session_id == session_messages.c.session_id,
    session_turns.c.turn_id == session_messages.c.turn_id,
)


def _lacks(seq: Any) -> Any:
    """Whether the turn says that it has a message of this seq, and there is none."""
    found = exists().where(
        session_messages.c.user_id == session_turns.c.user_id,
        session_messages.c.session_id == session_turns.c.session_id,
        session_messages.c.seq == seq,
    )
    return and_(seq.is_not(None), ~found)


ORPHAN_MESSAGES = (
    select(session_messages.c.user_id, session_messages.c.session_id, session_messages.c.seq)
    .where(session_messages.c.turn_id.is_not(None), ~_turn_of_message)
    .limit(PAGE)
)
ORPHAN_TURNS = (
    select(session_turns.c.user_id, session_turns.c.session_id, session_turns.c.turn_id)
    .where(or_(*(_lacks(session_turns.c[f"{end}_to_seq"]) for end in ("input", "output"))))
    .limit(PAGE)
)

# ── sums made beside the request path ───────────────────────────────────────────────────────────

_scopes = (
    func.unnest(array([table.c.user_id, literal_column("''")])).table_valued("scope", name="scopes").render_derived()
)
_counted = (
    select(
        _scopes.c.scope,
        func.count().label("sessions"),
        func.count().filter(table.c.counted_active).label("active"),
        func.sum(table.c.counted_messages).label("messages"),
        func.sum(table.c.counted_tokens).label("tokens"),
        func.sum(table.c.counted_cost).label("cost"),
    )
    .select_from(table.join(_scopes, sa.true()))
    .where(table.c.counted)
    .group_by(_scopes.c.scope)
    .subquery("counted")
)
_TOTALS = ("sessions", "active", "messages", "tokens", "cost")
TOTALS = (
    select(func.coalesce(session_totals.c.user_id, _counted.c.scope).label("user_id"))
    .select_from(session_totals.outerjoin(_counted, _counted.c.scope == session_totals.c.user_id, full=True))
    .where(
        or_(
            *(
                func.coalesce(session_totals.c[name], 0) != func.coalesce(_counted.c[name], literal_column("0"))
                for name in _TOTALS
            )
        )
    )
    .limit(PAGE)
)
_day = func.date_trunc(literal_column("'day'"), session_messages.c.created_at, literal_column("'UTC'"))
_message_scopes = (
    func.unnest(array([session_messages.c.user_id, literal_column("''")]))
    .table_valued("scope", name="scopes")
    .render_derived()
)
_days = (
    select(
        _message_scopes.c.scope,
        _day.label("start"),
        func.count().label("messages"),
        func.sum(session_messages.c.tokens_used).label("tokens"),
        func.sum(session_messages.c.cost_usd).label("cost"),
        func.count(sa.distinct(tuple_(session_messages.c.user_id, session_messages.c.session_id))).label(
            "active_sessions"
        ),
    )
    .select_from(
        session_messages.join(
            table,
            and_(
                table.c.user_id == session_messages.c.user_id,
                table.c.session_id == session_messages.c.session_id,
                session_messages.c.seq <= table.c.indexed_seq,
            ),
        ).join(_message_scopes, sa.true())
    )
    .where(session_messages.c.superseded_at.is_(None))
    .group_by(_message_scopes.c.scope, _day)
    .subquery("days")
)
_stored_days = select(usage_buckets).where(usage_buckets.c.bucket == literal_column("'day'")).subquery("stored")
USAGE = (
    select(
        func.coalesce(_stored_days.c.user_id, _days.c.scope).label("user_id"),
        func.coalesce(_stored_days.c.start, _days.c.start).label("start"),
    )
    .select_from(
        _stored_days.outerjoin(
            _days, and_(_days.c.scope == _stored_days.c.user_id, _days.c.start == _stored_days.c.start), full=True
        )
    )
    .where(
        or_(
            *(
                func.coalesce(_stored_days.c[name], 0) != func.coalesce(_days.c[name], literal_column("0"))
                for name in ("messages", "tokens", "cost", "active_sessions")
            )
        )
    )
    .limit(PAGE)
)

_this = and_(table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id"))
RECOUNT = (
    sa.update(table)
    .where(_this)
    .values(
        version=table.c.version + 1,
        **{name: bindparam(f"new_{name}", type_=table.c[name].type) for name in COUNTERS},
    )
)
RELEASE = sa.update(table).where(_this).values(lease_expires_at=sa.null(), version=table.c.version + 1)
CLOSE = (
    sa.update(session_turns)
    .where(
        session_turns.c.user_id == bindparam("user_id"),
        session_turns.c.session_id == bindparam("session_id"),
        session_turns.c.status == OPEN,
    )
    .values(status=literal_column("'expired'"), closed_at=func.statement_timestamp())
)
