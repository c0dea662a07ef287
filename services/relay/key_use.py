"""The statements that keep to a key's limits: each decides or changes everything in one, on one row.

Its one invariant: whoever waits for the row decides by what it holds then, because every condition is a part of the
statement that changes it.
"""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, case, func, literal_column, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.schema import relay_api_keys
from services.relay.schema import relay_key_reservations as reservations
from services.relay.schema import relay_key_use as table

LEASE_SECONDS: Final = 30
CONCURRENCY: Final = "concurrencyLimit"

_NOW = func.statement_timestamp()
_TODAY = func.timezone("UTC", _NOW).cast(sa.Date)
_LEASE: ColumnElement[Any] = literal_column(f"interval '{LEASE_SECONDS} seconds'")
_MINUTE: ColumnElement[Any] = literal_column("interval '1 minute'")
_COST = sa.Numeric(18, 6)


def _limit(name: str, kind: Any) -> Any:
    return bindparam(name, type_=kind)


_this = table.c.key_id == bindparam("key_id", type_=sa.Text)
_window = _limit("rate_limit_window", sa.Integer)
_in_window = and_(table.c.window_started_at.is_not(None), table.c.window_started_at > _NOW - _window * _MINUTE)
_window_requests = case((_in_window, table.c.window_requests), else_=0)
_window_tokens = case((_in_window, table.c.window_tokens), else_=0)
_day_cost = case((table.c.day == _TODAY, table.c.day_cost), else_=0)
_token_limit, _request_limit = _limit("token_limit", sa.BigInteger), _limit("rate_limit_requests", sa.Integer)
_used_tokens = case((_window.is_(None), table.c.tokens), else_=_window_tokens)
_concurrency, _daily, _total = (
    _limit("concurrency_limit", sa.Integer),
    _limit("daily_cost_limit", _COST),
    _limit("total_cost_limit", _COST),
)


def _below(limit: Any, used: Any) -> ColumnElement[bool]:
    return or_(limit.is_(None), used < limit)


FREE: dict[str, ColumnElement[bool]] = {
    CONCURRENCY: _below(_concurrency, table.c.in_flight),
    "rateLimitRequests": _below(_request_limit, _window_requests),
    "tokenLimit": _below(_token_limit, _used_tokens + table.c.reserved_tokens),
    "dailyCostLimit": _below(_daily, _day_cost + table.c.reserved_cost),
    "totalCostLimit": _below(_total, table.c.cost + table.c.reserved_cost),
}
_SPENT: dict[str, ColumnElement[bool]] = {
    "tokenLimit": _used_tokens >= _token_limit,
    "dailyCostLimit": _day_cost >= _daily,
    "totalCostLimit": table.c.cost >= _total,
}
"""Reached even if nothing were reserved; null where there is no limit."""
_tokens, _cost = bindparam("reserved_tokens", type_=sa.BigInteger), bindparam("reserved_cost", type_=_COST)

MAKE = (
    insert(table)
    .from_select(["key_id"], select(relay_api_keys.c.id).where(relay_api_keys.c.id == bindparam("key_id")))
    .on_conflict_do_nothing()
)
_let_in = (
    sa.update(table)
    .where(_this, *FREE.values())
    .values(
        in_flight=table.c.in_flight + 1,
        reserved_tokens=table.c.reserved_tokens + _tokens,
        reserved_cost=table.c.reserved_cost + _cost,
        window_started_at=case((_in_window, table.c.window_started_at), else_=_NOW),
        window_requests=_window_requests + 1,
        window_tokens=_window_tokens,
    )
    .returning(table.c.key_id)
    .cte("let_in")
)
RESERVE = (
    insert(reservations)
    .from_select(
        ["id", "key_id", "tokens", "cost", "expires_at"],
        select(bindparam("id", type_=sa.Text), _let_in.c.key_id, _tokens, _cost, _NOW + _LEASE),
    )
    .returning(reservations.c.id)
)
WHY = select(
    *(free.label(name) for name, free in FREE.items()),
    *(spent.label(f"{name}_spent") for name, spent in _SPENT.items()),
    func.extract("epoch", table.c.window_started_at + _window * _MINUTE - _NOW).cast(sa.Float).label("window_left"),
).where(_this)
RENEW = (
    sa.update(reservations)
    .where(reservations.c.id == func.any(bindparam("ids", type_=ARRAY(sa.Text))))
    .values(expires_at=_NOW + _LEASE)
)
_ended = (
    sa.delete(reservations)
    .where(reservations.c.id == bindparam("id", type_=sa.Text))
    .returning(reservations.c.tokens, reservations.c.cost)
    .cte("ended")
)
_ended_sum = select(
    func.count().label("count"),
    func.coalesce(func.sum(_ended.c.tokens), 0).label("tokens"),
    func.coalesce(func.sum(_ended.c.cost), 0).label("cost"),
).subquery("ended_sum")
_used = {
    "requests": bindparam("requests", type_=sa.BigInteger),
    "tokens": bindparam("tokens", type_=sa.BigInteger),
    "cost": bindparam("cost", type_=_COST),
}


def _added() -> dict[str, Any]:
    """What was used, added to all sums; the window's tokens count in whatever window there is now."""
    return {
        **{name: table.c[name] + used for name, used in _used.items()},
        "day": _TODAY,
        **{
            f"day_{name}": case((table.c.day == _TODAY, table.c[f"day_{name}"]), else_=0) + used
            for name, used in _used.items()
        },
        "window_tokens": table.c.window_tokens + _used["tokens"],
        "last_used_at": func.greatest(table.c.last_used_at, _NOW),
    }


def _without(ended: Any) -> dict[str, Any]:
    """What is reserved without what has ended; never below 0, should someone have set it anew by hand."""
    return {
        "in_flight": func.greatest(table.c.in_flight - ended.c.count, 0),
        "reserved_tokens": func.greatest(table.c.reserved_tokens - ended.c.tokens, 0),
        "reserved_cost": func.greatest(table.c.reserved_cost - ended.c.cost, 0),
    }


SETTLE = sa.update(table).where(_this).values(**_without(_ended_sum), **_added())
USE = sa.update(table).where(_this).values(**_added()).returning(table.c.key_id)
_gone = (
    sa.delete(reservations)
    .where(
        reservations.c.id.in_(
            select(reservations.c.id).where(reservations.c.expires_at <= _NOW).with_for_update(skip_locked=True)
        )
    )
    .returning(reservations.c.key_id, reservations.c.tokens, reservations.c.cost)
    .cte("gone")
)
_gone_sum = (
    select(
        _gone.c.key_id,
        func.count().label("count"),
        func.sum(_gone.c.tokens).label("tokens"),
        func.sum(_gone.c.cost).label("cost"),
    )
    .group_by(_gone.c.key_id)
    .subquery("gone_sum")
)
GIVE_BACK = (
    sa.update(table)
    .where(table.c.key_id == _gone_sum.c.key_id)
    .values(**_without(_gone_sum))
    .returning(table.c.key_id, _gone_sum.c.count)
)
