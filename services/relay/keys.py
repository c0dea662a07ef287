"""API keys: the rows. Whose sessions a key works on, what it may do and how much.

Its one invariant: of a key only its keyed hash is ever stored, held or compared.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.errors import KeyNotFound
from services.relay.schema import relay_api_keys as table
from services.relay.schema import relay_key_use as use
from shared.database import Conn, Row

ANONYMOUS_ID: Final = "anonymous"
KEY_PREFIX: Final = "cr_"
_PREFIX_CHARACTERS: Final = 11
_NOW = func.statement_timestamp()

Permission = Literal["messages", "chat", "conversations"]


USUAL: Final[dict[str, Any]] = {
    "description": "",
    "collect_session": False,
    "permissions": "all",
    "allowed_models": [],
    "is_active": True,
    "tags": [],
}
"""What a key has where nothing is said; other fields are None then."""


@dataclass(frozen=True, slots=True)
class Key:
    """A row without what is secret. Limits are None where there is none; times are UTC."""

    id: str
    user_id: str
    name: str
    prefix: str
    description: str
    collect_session: bool
    token_limit: int | None
    concurrency_limit: int | None
    rate_limit_window: int | None
    """Minutes."""
    rate_limit_requests: int | None
    daily_cost_limit: Decimal | None
    total_cost_limit: Decimal | None
    permissions: Literal["all"] | list[Permission]
    allowed_models: list[str]
    expires_at: datetime | None
    is_active: bool
    tags: list[str]
    created_at: datetime
    updated_at: datetime | None
    deleted_at: datetime | None

    @property
    def is_limited(self) -> bool:
        return any(
            (
                self.token_limit,
                self.concurrency_limit,
                self.rate_limit_requests,
                self.daily_cost_limit,
                self.total_cost_limit,
            )
        )

    def may(self, permission: Permission) -> bool:
        return self.permissions == "all" or permission in self.permissions

    def may_ask(self, model: str) -> bool:
        return not self.allowed_models or model in self.allowed_models


def anonymous(user_id: str) -> Key:
    """Stands for callers without a key, as one user; it is no row, and has no limits but this."""
    nothing: dict[str, Any] = dict.fromkeys(Key.__dataclass_fields__)
    given = {"id": ANONYMOUS_ID, "user_id": user_id, "name": user_id, "prefix": "", "created_at": datetime.now(UTC)}
    return Key(**{**nothing, **USUAL, **given, "permissions": ["chat", "conversations"]})


_COLUMNS: Final = tuple(table.c[name] for name in Key.__dataclass_fields__)
_this = table.c.id == bindparam("id")
_TIMES: Final = ("created_at", "updated_at", "deleted_at", "expires_at")
CHANGEABLE: Final = (
    *("name", "user_id", "description", "collect_session", "token_limit", "concurrency_limit"),
    *("rate_limit_window", "rate_limit_requests", "daily_cost_limit", "total_cost_limit"),
    *("permissions", "allowed_models", "expires_at", "is_active", "tags"),
)
_values = {name: bindparam(name, type_=table.c[name].type) for name in CHANGEABLE}

FIND = select(*_COLUMNS).where(table.c.key_hash == bindparam("key_hash"))
GET = select(*_COLUMNS).where(_this)
LOCK = GET.with_for_update()
ADD = (
    insert(table)
    .values(
        id=bindparam("id"),
        key_hash=bindparam("key_hash", type_=sa.LargeBinary),
        prefix=bindparam("prefix"),
        created_at=_NOW,
        updated_at=_NOW,
        **_values,
    )
    .on_conflict_do_nothing(constraint="relay_api_keys_key_hash_key")
    .returning(*_COLUMNS)
)
CHANGE = sa.update(table).where(_this).values(**_values, updated_at=_NOW).returning(*_COLUMNS)
DELETE = (
    sa.update(table)
    .where(_this)
    .values(deleted_at=func.coalesce(table.c.deleted_at, _NOW), updated_at=_NOW)
    .returning(*_COLUMNS)
)
RESTORE = sa.update(table).where(_this).values(deleted_at=sa.null(), updated_at=_NOW).returning(*_COLUMNS)

_search = bindparam("search", type_=sa.Text)
_tag = bindparam("tag", type_=sa.Text)
_active = bindparam("active", type_=sa.Boolean)
_listed: ColumnElement[bool] = and_(
    table.c.deleted_at.is_(None),
    or_(
        _search.is_(None),
        func.strpos(func.lower(table.c.name), func.lower(_search)) > 0,
        func.strpos(func.lower(table.c.description), func.lower(_search)) > 0,
        table.c.id == _search,
        func.starts_with(_search, table.c.prefix),
    ),
    or_(_tag.is_(None), table.c.tags.contains(func.to_jsonb(_tag))),
    or_(_active.is_(None), table.c.is_active == _active),
)
LIST = (
    select(*_COLUMNS)
    .where(_listed)
    .order_by(table.c.created_at, table.c.id)
    .limit(bindparam("limit", type_=sa.Integer))
    .offset(bindparam("offset", type_=sa.Integer))
)
COUNT = select(func.count()).select_from(table).where(_listed)

_today = func.timezone("UTC", _NOW).cast(sa.Date)
USE = select(
    use.c.key_id,
    *(use.c[name] for name in ("requests", "tokens", "cost", "last_used_at", "in_flight")),
    *(
        sa.case((use.c.day == _today, use.c[f"day_{name}"]), else_=0).label(f"day_{name}")
        for name in ("requests", "tokens", "cost")
    ),
).where(use.c.key_id == func.any(bindparam("ids", type_=ARRAY(sa.Text))))


def from_row(row: Row) -> Key:
    """The key. What was written by hand in a form that no call writes is read as what it can only mean."""
    values = dict(row.items())
    for name in _TIMES:
        if (moment := values[name]) is not None and moment.tzinfo is None:  # how the driver gives infinity
            values[name] = moment.replace(tzinfo=UTC)
    given = values["permissions"]
    values["permissions"] = USUAL["permissions"] if given is None else given if given == "all" else _as_list(given)
    for name in ("allowed_models", "tags"):
        values[name] = _as_list(values[name])
    return Key(**values)


def _as_list(value: Any) -> list[Any]:
    """A list as it is; anything else is the only thing in one, so that it allows nothing but itself."""
    return value if isinstance(value, list) else [] if value is None else [value]


def digest(pepper: str, secret: str) -> bytes:
    """The keyed hash by which a key is found."""
    return hmac.digest(pepper.encode(), secret.encode("utf-8", "surrogateescape"), hashlib.sha256)


async def find(conn: Conn, key_hash: bytes) -> Key | None:
    """The key with this hash, whatever its state."""
    row = await conn.row(FIND, key_hash=key_hash)
    return None if row is None else from_row(row)


async def add(conn: Conn, key_id: str, pepper: str, secret: str, values: Mapping[str, Any]) -> Key | None:
    """The new key; None when this very secret is stored already, whatever became of it since."""
    full = {name: USUAL.get(name) for name in CHANGEABLE} | dict(values)
    stored = {"key_hash": digest(pepper, secret), "prefix": secret[:_PREFIX_CHARACTERS]}
    row = await conn.row(ADD, id=key_id, **stored, **full)
    return None if row is None else from_row(row)


async def get(conn: Conn, key_id: str) -> Key:
    """A deleted one too; raises KeyNotFound."""
    return _found(await conn.row(GET, id=key_id))


async def lock(conn: Conn, key_id: str) -> Key:
    return _found(await conn.row(LOCK, id=key_id))


async def change(conn: Conn, key: Key, changes: Mapping[str, Any]) -> Key:
    """Changes the columns that are given of a key that is locked."""
    values = {name: getattr(key, name) for name in CHANGEABLE} | dict(changes)
    return _found(await conn.row(CHANGE, id=key.id, **values))


async def delete(conn: Conn, key_id: str) -> Key:
    """It is refused from now on; everything else stays."""
    return _found(await conn.row(DELETE, id=key_id))


async def restore(conn: Conn, key_id: str) -> Key:
    return _found(await conn.row(RESTORE, id=key_id))


async def list_some(
    conn: Conn, *, search: str | None, tag: str | None, is_active: bool | None, limit: int, offset: int
) -> tuple[list[Key], int]:
    """Keys that are not deleted, the oldest first, and how many there are in all."""
    wanted = {"search": search, "tag": tag, "active": is_active}
    rows = await conn.rows(LIST, **wanted, limit=limit, offset=offset)
    return [from_row(row) for row in rows], await conn.value(COUNT, **wanted)


async def uses(conn: Conn, ids: list[str]) -> dict[str, dict[str, Any]]:
    """What these keys have used, by their ids; none for keys that were never used."""
    return {row["key_id"]: dict(row.items()) for row in await conn.rows(USE, ids=ids)}


def _found(row: Row | None) -> Key:
    if row is None:
        raise KeyNotFound
    return from_row(row)
