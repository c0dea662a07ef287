"""Accounts: the ways to a model, as the table holds them; pool.py chooses among them.

Its one invariant: an account's secrets leave this file sealed, or for the pool alone; what is shown of an account
is what `shown` shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import bindparam, case, func, literal_column, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.errors import AccountExists, AccountNotFound
from services.relay.schema import relay_account_use as use
from services.relay.schema import relay_accounts as table
from shared.database import Conn, Database, Row, Violation

Reason = Literal["disabled", "forbidden", "rate_limited", "failing", "full", "unreadable"]
"""Why an account is not eligible: by an admin, by upstream's words, until its limit is over, after failures, because
all its slots are taken, because its secrets cannot be opened."""

DEMO_MODEL: Final = "demo"
BY_ADMIN: Final = "disabled by an administrator"
NOW: Final = func.statement_timestamp()
_SECOND: ColumnElement[Any] = literal_column("interval '1 second'")
# A relay that has told nothing for so long is gone, and so are its requests.
_USE_LAPSES: ColumnElement[Any] = literal_column("interval '10 seconds'")


@dataclass(frozen=True, slots=True)
class Account:
    """A row. `cooling_seconds` is what was left of its cooldown when the row was read."""

    id: str
    name: str
    provider: Literal["anthropic", "demo"]
    base_url: str
    secrets: bytes | None = field(repr=False)
    secrets_key_id: str | None
    proxy_shown: str | None
    models: list[str] | dict[str, str]
    priority: int
    weight: float
    max_concurrency: int | None
    enabled: bool
    disabled_reason: str | None
    cooldown_until: datetime | None
    cooldown_reason: Reason | None
    cooling_seconds: float
    failures_in_row: int
    last_error: str | None
    created_at: datetime
    updated_at: datetime

    def serves(self, model: str) -> bool:
        if self.provider == "demo":
            return True
        return not self.models or model in self.models

    def upstream_model(self, model: str) -> str:
        """The name by which upstream knows the model."""
        return self.models.get(model, model) if isinstance(self.models, Mapping) else model


@dataclass(frozen=True, slots=True)
class Use:
    """What all relays together have to tell of an account."""

    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    last_used_at: datetime | None = None


_cooling = func.coalesce(func.extract("epoch", table.c.cooldown_until - NOW), 0)
_COLUMNS: tuple[ColumnElement[Any], ...] = tuple(
    func.greatest(_cooling, 0).cast(sa.Float).label(name) if name == "cooling_seconds" else table.c[name]
    for name in Account.__dataclass_fields__
)
_this = table.c.id == bindparam("id")
CHANGEABLE: Final = (
    *("name", "provider", "base_url", "secrets", "secrets_key_id", "proxy_shown"),
    *("models", "priority", "weight", "max_concurrency"),
)
_values = {name: bindparam(name, type_=table.c[name].type) for name in CHANGEABLE}
_enabled = bindparam("enabled", type_=sa.Boolean)

LIST = select(*_COLUMNS).order_by(table.c.created_at, table.c.id)
GET = select(*_COLUMNS).where(_this)
LOCK = GET.with_for_update()
LOCK_ALL = select(*_COLUMNS).order_by(table.c.id).with_for_update()
PUT_SECRETS = sa.update(table).where(_this).values(secrets=_values["secrets"], secrets_key_id=_values["secrets_key_id"])
ADD = (
    insert(table)
    .values(
        id=bindparam("id"),
        **_values,
        enabled=_enabled,
        disabled_reason=case((_enabled, None), else_=BY_ADMIN),
        created_at=NOW,
        updated_at=NOW,
    )
    .returning(*_COLUMNS)
)
CHANGE = sa.update(table).where(_this).values(**_values, updated_at=NOW).returning(*_COLUMNS)
ENABLE = (
    sa.update(table)
    .where(_this)
    .values(
        enabled=True,
        disabled_reason=None,
        cooldown_until=None,
        cooldown_reason=None,
        failures_in_row=0,
        probe_until=None,
        updated_at=NOW,
    )
    .returning(*_COLUMNS)
)
DISABLE = (
    sa.update(table)
    .where(_this)
    .values(enabled=False, disabled_reason=bindparam("reason", type_=sa.Text), updated_at=NOW)
    .returning(*_COLUMNS)
)
DELETE = sa.delete(table).where(_this).returning(*_COLUMNS)

_until = NOW + bindparam("seconds", type_=sa.Float) * _SECOND
_error = bindparam("error", type_=sa.Text)
# A cooldown is never shortened; the reason is that of the longest.
COOL = (
    sa.update(table)
    .where(_this)
    .values(
        cooldown_until=func.greatest(table.c.cooldown_until, _until),
        cooldown_reason=case(
            (table.c.cooldown_until > _until, table.c.cooldown_reason), else_=bindparam("reason", type_=sa.Text)
        ),
        failures_in_row=table.c.failures_in_row + bindparam("failed", type_=sa.Integer),
        probe_until=None,
        last_error=_error,
    )
)
GIVE_UP = sa.update(table).where(_this).values(enabled=False, disabled_reason=_error, last_error=_error)
WORKED = sa.update(table).where(_this, table.c.failures_in_row > 0).values(failures_in_row=0, probe_until=None)
# A relay may not have heard yet that the account rests again.
CLAIM_PROBE = (
    sa.update(table)
    .where(
        _this,
        table.c.enabled,
        func.coalesce(table.c.cooldown_until, NOW) <= NOW,
        func.coalesce(table.c.probe_until, NOW) <= NOW,
    )
    .values(probe_until=NOW + bindparam("seconds", type_=sa.Float) * _SECOND)
    .returning(table.c.id)
)
END_PROBE = sa.update(table).where(_this, table.c.probe_until.is_not(None)).values(probe_until=None)

USE = select(
    use.c.account_id,
    func.coalesce(func.sum(use.c.in_flight).filter(use.c.updated_at > NOW - _USE_LAPSES), 0).label("in_flight"),
    func.sum(use.c.requests).label("requests"),
    func.sum(use.c.failures).label("failures"),
    func.max(use.c.last_used_at).label("last_used_at"),
).group_by(use.c.account_id)


def from_row(row: Row) -> Account:
    return Account(**dict(row.items()))


async def list_all(conn: Conn) -> list[Account]:
    """All accounts, the oldest first."""
    return [from_row(row) for row in await conn.rows(LIST)]


async def lock_all(conn: Conn) -> list[Account]:
    """All accounts, held until the transaction ends."""
    return [from_row(row) for row in await conn.rows(LOCK_ALL)]


async def put_secrets(conn: Conn, account_id: str, secrets: bytes, key_id: str) -> None:
    await conn.rows(PUT_SECRETS, id=account_id, secrets=secrets, secrets_key_id=key_id)


async def get(conn: Conn, account_id: str) -> Account:
    return _found(await conn.row(GET, id=account_id))


async def add(conn: Conn, account_id: str, values: Mapping[str, Any], *, enabled: bool = True) -> Account:
    """The new account; `values` has all the changeable columns. Raises AccountExists."""
    try:
        row = await conn.row(ADD, id=account_id, enabled=enabled, **values)
    except Violation as violation:
        raise AccountExists from violation
    return _found(row)


async def change(database: Database, account_id: str, changes: Mapping[str, Any], *, enabled: bool | None) -> Account:
    """Changes the columns that are given, and whether it is enabled; raises AccountNotFound.

    Enabling one that is enabled ends its cooldown; disabling one that is disabled leaves the reason as it is.
    """

    async def work(conn: Conn) -> Account:
        account = _found(await conn.row(LOCK, id=account_id))
        if changes:
            values = {name: getattr(account, name) for name in CHANGEABLE} | dict(changes)
            account = _found(await conn.row(CHANGE, id=account_id, **values))
        if enabled or (account.enabled and enabled is False):
            account = await (enable(conn, account_id) if enabled else disable(conn, account_id))
        return account

    return await database.transact(work)


async def enable(conn: Conn, account_id: str) -> Account:
    """Makes it eligible at once: what disabled or cooled it is over."""
    return _found(await conn.row(ENABLE, id=account_id))


async def disable(conn: Conn, account_id: str) -> Account:
    return _found(await conn.row(DISABLE, id=account_id, reason=BY_ADMIN))


async def delete(conn: Conn, account_id: str) -> Account:
    return _found(await conn.row(DELETE, id=account_id))


async def uses(conn: Conn) -> dict[str, Use]:
    """What is told of each account's use, by its id."""
    return {
        row["account_id"]: Use(row["in_flight"], int(row["requests"]), int(row["failures"]), row["last_used_at"])
        for row in await conn.rows(USE)
    }


def _found(row: Row | None) -> Account:
    if row is None:
        raise AccountNotFound
    return from_row(row)
