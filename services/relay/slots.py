"""Places that all relays share: of n slots of an owner, each is taken by one relay at a time.

Its one invariant: a slot is one row, and whoever takes it changes that row: never more than n are taken. A relay
that is gone stops renewing, and its slots are free again after LEASE_SECONDS.
"""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.schema import relay_slots as table
from shared.database import Conn

LEASE_SECONDS: Final = 30
RENEW_SECONDS: Final = 10
_NOW = func.statement_timestamp()
_LEASE: ColumnElement[Any] = literal_column(f"interval '{LEASE_SECONDS} seconds'")
_KEY: dict[str, sa.types.TypeEngine[Any]] = {"kind": sa.Text(), "owner_id": sa.Text(), "slot": sa.Integer()}
_owned = (table.c.kind == bindparam("kind"), table.c.owner_id == bindparam("owner_id"))
_free = (
    select(table.c.slot)
    .where(*_owned, table.c.slot <= bindparam("count", type_=sa.Integer), table.c.expires_at <= _NOW)
    .order_by(table.c.slot)
    .limit(1)
    .with_for_update(skip_locked=True)
    .scalar_subquery()
)
MAKE = (
    insert(table)
    .from_select(
        ["kind", "owner_id", "slot", "expires_at"],
        select(
            bindparam("kind", type_=sa.Text),
            bindparam("owner_id", type_=sa.Text),
            func.generate_series(1, bindparam("count", type_=sa.Integer)),
            literal_column("'-infinity'::timestamptz"),
        ),
    )
    .on_conflict_do_nothing()
)
TAKE = (
    sa.update(table)
    .where(*_owned, table.c.slot == _free)
    .values(relay_id=bindparam("relay_id", type_=sa.Text), expires_at=_NOW + _LEASE)
    .returning(table.c.slot)
)
FREE = (
    sa.update(table)
    .where(
        *_owned,
        table.c.slot == bindparam("slot", type_=sa.Integer),
        table.c.relay_id == bindparam("relay_id", type_=sa.Text),
    )
    .values(relay_id=sa.null(), expires_at=literal_column("'-infinity'::timestamptz"))
)
_mine = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _KEY.items()))
    .table_valued(*_KEY, name="mine")
    .render_derived()
)
RENEW = (
    sa.update(table)
    .where(
        *(table.c[name] == _mine.c[name] for name in _KEY),
        table.c.relay_id == bindparam("relay_id", type_=sa.Text),
    )
    .values(expires_at=_NOW + _LEASE)
)


class Slots:
    """The slots that one relay holds. What it does not know to hold it does not renew, so none is lost for long."""

    def __init__(self, conn: Conn, relay_id: str) -> None:
        self._conn = conn
        self._relay_id = relay_id
        self._held: set[tuple[str, str, int]] = set()
        self._made: dict[tuple[str, str], int] = {}

    async def take(self, kind: str, owner_id: str, count: int) -> int | None:
        """A slot of 1 … count, held until it is given to `free`; None when all are taken."""
        owner = {"kind": kind, "owner_id": owner_id}
        if self._made.get((kind, owner_id), 0) < count:
            await self._conn.rows(MAKE, **owner, count=count)
            self._made[kind, owner_id] = count
        slot: int | None = await self._conn.value(TAKE, **owner, count=count, relay_id=self._relay_id)
        if slot is not None:
            self._held.add((kind, owner_id, slot))
        return slot

    async def free(self, kind: str, owner_id: str, slot: int) -> None:
        self._held.discard((kind, owner_id, slot))
        await self._conn.rows(FREE, kind=kind, owner_id=owner_id, slot=slot, relay_id=self._relay_id)

    async def renew(self) -> None:
        """Keeps all that are held for another LEASE_SECONDS."""
        if self._held:
            columns = zip(*self._held, strict=True)
            arrays = {f"{name}_array": list(values) for name, values in zip(_KEY, columns, strict=True)}
            await self._conn.rows(RENEW, relay_id=self._relay_id, **arrays)
