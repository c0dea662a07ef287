"""How much each account is used: counted in this relay, told to the table beside the requests.

Its one invariant: the figures of a relay are in a row of its own, so relays never wait for each other; what a relay
that is gone has told is kept.
"""

import asyncio
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.members import Member
from services.relay.pool import Pool
from services.relay.schema import relay_account_use as table
from services.relay.schema import relay_accounts
from shared.database import Conn, Database

_GONE: ColumnElement[Any] = literal_column("interval '1 minute'")
_TOLD_AGAIN_TICKS: Final = 3
_ALL: Final = ""
_NOW = func.statement_timestamp()
_COLUMNS: dict[str, sa.types.TypeEngine[Any]] = {
    "account_id": sa.Text(),
    "in_flight": sa.Integer(),
    "requests": sa.BigInteger(),
    "failures": sa.BigInteger(),
}
_new = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _COLUMNS.items()))
    .table_valued(*_COLUMNS, name="new")
    .render_derived()
)
_told = insert(table).from_select(
    ["relay_id", *_COLUMNS, "last_used_at", "updated_at"],
    select(
        bindparam("relay_id", type_=sa.Text),
        *(_new.c[name] for name in _COLUMNS),
        sa.case((_new.c.requests > 0, _NOW)),
        _NOW,
    ).join(relay_accounts, relay_accounts.c.id == _new.c.account_id),
)
TELL = _told.on_conflict_do_update(
    index_elements=["account_id", "relay_id"],
    set_={
        "in_flight": _told.excluded.in_flight,
        "requests": table.c.requests + _told.excluded.requests,
        "failures": table.c.failures + _told.excluded.failures,
        "last_used_at": func.greatest(table.c.last_used_at, _told.excluded.last_used_at),
        "updated_at": _told.excluded.updated_at,
    },
)
TAKE_GONE = (
    sa.delete(table)
    .where(table.c.relay_id != _ALL, table.c.updated_at < _NOW - _GONE)
    .returning(table.c.account_id, table.c.requests, table.c.failures, table.c.last_used_at)
)
_gone = TAKE_GONE.cte("gone")
_kept = insert(table).from_select(
    ["account_id", "relay_id", "in_flight", "requests", "failures", "last_used_at", "updated_at"],
    select(
        _gone.c.account_id,
        sa.literal(_ALL, sa.Text).label("relay_id"),
        sa.literal(0, sa.Integer).label("in_flight"),
        func.sum(_gone.c.requests),
        func.sum(_gone.c.failures),
        func.max(_gone.c.last_used_at),
        _NOW,
    ).group_by(_gone.c.account_id),
)
KEEP_GONE = _kept.on_conflict_do_update(
    index_elements=["account_id", "relay_id"],
    set_={
        "requests": table.c.requests + _kept.excluded.requests,
        "failures": table.c.failures + _kept.excluded.failures,
        "last_used_at": func.greatest(table.c.last_used_at, _kept.excluded.last_used_at),
    },
)


class AccountUse:
    """What this relay has to tell."""

    def __init__(self, database: Database, pool: Pool, relay_id: str) -> None:
        self._database = database
        self._pool = pool
        self._relay_id = relay_id
        self._told: dict[Member, tuple[int, int, int]] = {}
        self._telling = asyncio.Lock()
        self._ticks = 0

    async def tell(self) -> None:
        """Writes what is new, and now and then what still runs; raises DatabaseUnavailable."""
        async with self._telling:  # what two tell at once would be told twice
            await self._tell()

    async def _tell(self) -> None:
        self._ticks += 1
        again = self._ticks % _TOLD_AGAIN_TICKS == 0
        rows = []
        figures: dict[Member, tuple[int, int, int]] = {}
        for account_id, member in self._pool.members.items():
            figures[member] = now = (member.in_flight, member.requests, member.failures)
            before = self._told.get(member, (0, 0, 0))
            if now != before or (again and member.in_flight):
                rows.append((account_id, now[0], now[1] - before[1], now[2] - before[2]))
        if rows:
            columns = zip(*rows, strict=True)
            arrays = {f"{name}_array": list(values) for name, values in zip(_COLUMNS, columns, strict=True)}
            await self._database.rows(TELL, relay_id=self._relay_id, **arrays)
        self._told = figures


async def keep_gone(conn: Conn) -> None:
    """Adds up what relays that are gone have told."""
    await conn.rows(KEEP_GONE)
