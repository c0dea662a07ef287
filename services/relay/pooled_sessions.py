"""The rows of the session pool: which sessions are in it, in the order of collection, and which is the current one.

Its one invariant: whoever takes sessions in, switches or clears holds one row meanwhile, in whatever relay, so that
there are never more of them than there may be, and one at most is current.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.schema import relay_accounts
from services.relay.schema import relay_session_pool as table
from services.relay.schema import relay_session_pool_current as current
from shared.database import Conn
from shared.session_client import SessionKey

_NOW = func.statement_timestamp()
_SECOND: ColumnElement[Any] = literal_column("interval '1 second'")


@dataclass(frozen=True, slots=True)
class Entry:
    """A session of the pool. What is not known, or no longer there, is None; `switched_at` is the pool's."""

    user_id: str
    session_id: str
    account_id: str | None
    model: str | None
    cache_read_share: float | None
    collected_at: datetime
    last_used_at: datetime
    is_current: bool
    switched_at: datetime | None

    @property
    def key(self) -> SessionKey:
        return SessionKey(self.user_id, self.session_id)


@dataclass(frozen=True, slots=True)
class LastTurn:
    """What is told of a session's last turn; `at` is by the monotonic clock."""

    account_id: str | None
    model: str | None
    cache_read_share: float | None
    at: float


_is_current = and_(table.c.user_id == current.c.user_id, table.c.session_id == current.c.session_id)
_TOLD: Final[dict[str, sa.types.TypeEngine[Any]]] = {
    "user_id": sa.Text(),
    "session_id": sa.Text(),
    "account_id": sa.Text(),
    "model": sa.Text(),
    "cache_read_share": sa.Float(),
    "age_seconds": sa.Float(),
}
_told = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _TOLD.items()))
    .table_valued(*_TOLD, name="told")
    .render_derived()
)
# An account may have been deleted since.
_account = select(relay_accounts.c.id).where(relay_accounts.c.id == _told.c.account_id).scalar_subquery()
_last_turn = {"account_id": _account, "model": _told.c.model, "cache_read_share": _told.c.cache_read_share}
_used_at = _NOW - _told.c.age_seconds * _SECOND

LIST = (
    select(
        *(table.c[name] for name in Entry.__dataclass_fields__ if name in table.c),
        func.coalesce(_is_current, sa.false()).label("is_current"),
        current.c.switched_at,
    )
    .select_from(table.outerjoin(current, sa.true()))
    .order_by(table.c.position)
)
TOUCH = (
    sa.update(table)
    .where(table.c.user_id == _told.c.user_id, table.c.session_id == _told.c.session_id)
    .values(**_last_turn, last_used_at=func.greatest(table.c.last_used_at, _used_at))
    .returning(table.c.user_id, table.c.session_id)
)
ADD = (
    insert(table)
    .from_select(
        ["user_id", "session_id", *_last_turn, "collected_at", "last_used_at"],
        select(_told.c.user_id, _told.c.session_id, *_last_turn.values(), _used_at, _used_at),
    )
    .on_conflict_do_nothing(constraint="relay_session_pool_pkey")
    .returning(table.c.position)
)
COUNT = select(func.count()).select_from(table)
CLEAR = sa.delete(table).returning(table.c.position)
# The row is made when it is not there.
HOLD = (
    insert(current)
    .values(id=1)
    .on_conflict_do_update(constraint="relay_session_pool_current_pkey", set_={"switched_at": current.c.switched_at})
)
_first = select(table.c.user_id, table.c.session_id).order_by(table.c.position).limit(1).subquery("first")
BEGIN = (
    sa.update(current)
    .where(current.c.session_id.is_(None))
    .values(user_id=_first.c.user_id, session_id=_first.c.session_id)
)
SWITCH = sa.update(current).values(
    user_id=bindparam("to_user_id"), session_id=bindparam("to_session_id"), switched_at=_NOW
)
FORGET_SWITCHING = sa.update(current).values(switched_at=sa.null())


async def list_all(conn: Conn) -> list[Entry]:
    """In the order of collection."""
    return [Entry(**dict(row.items())) for row in await conn.rows(LIST)]


async def touch(conn: Conn, turns: Mapping[SessionKey, LastTurn]) -> set[SessionKey]:
    """Writes the last turns of those that are in the pool, and gives them."""
    return {SessionKey(row["user_id"], row["session_id"]) for row in await conn.rows(TOUCH, **_arrays(turns))}


async def add(conn: Conn, turns: Mapping[SessionKey, LastTurn], *, max_size: int) -> dict[SessionKey, int]:
    """Takes in, within a transaction, as many as there is room for; gives the pool's size after each."""
    await conn.rows(HOLD)
    size: int = await conn.value(COUNT)
    added: dict[SessionKey, int] = {}
    for session, turn in turns.items():
        if size < max_size and await conn.rows(ADD, **_arrays({session: turn})):
            size += 1
            added[session] = size
    if added:
        await conn.rows(BEGIN)
    return added


async def switch(conn: Conn, choose: Callable[[list[Entry]], Entry | None]) -> Entry | None:
    """Makes the one that `choose` takes of all current, within a transaction; None when it takes none."""
    await conn.rows(HOLD)
    entry = choose(await list_all(conn))
    if entry is not None and not entry.is_current:
        await conn.rows(SWITCH, to_user_id=entry.user_id, to_session_id=entry.session_id)
    return entry


async def clear(conn: Conn) -> int:
    """Takes all out, within a transaction, and says how many they were."""
    await conn.rows(HOLD)
    cleared = await conn.rows(CLEAR)
    await conn.rows(FORGET_SWITCHING)
    return len(cleared)


def _arrays(turns: Mapping[SessionKey, LastTurn]) -> dict[str, list[object]]:
    now = monotonic()
    rows = [
        (key.user_id, key.session_id, turn.account_id, turn.model, turn.cache_read_share, now - turn.at)
        for key, turn in turns.items()
    ]
    return {f"{name}_array": list(values) for name, values in zip(_TOLD, zip(*rows, strict=True), strict=True)}
