"""Which account a session was served by last, because its prompt cache there is warm.

Its one invariant: an affinity is a preference; losing one, or reading an old one, costs a cache hit and nothing else.
"""

from collections import OrderedDict
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ARRAY, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.schema import relay_accounts
from services.relay.schema import relay_affinities as table
from shared.database import Database
from shared.errors import DatabaseUnavailable
from shared.session_client import SessionKey

_REMEMBERED: Final = 50_000
_AT_ONCE: Final = 1000
# The longest that providers keep a prompt cache is an hour.
_KEPT: ColumnElement[Any] = literal_column("interval '1 day'")
_NOW = func.statement_timestamp()
_COLUMNS: Final = ("user_id", "session_id", "account_id")
_new = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(sa.Text)) for name in _COLUMNS))
    .table_valued(*_COLUMNS, name="new")
    .render_derived()
)
_put = insert(table).from_select(
    [*_COLUMNS, "used_at"],
    select(*(_new.c[name] for name in _COLUMNS), _NOW).join(relay_accounts, relay_accounts.c.id == _new.c.account_id),
)
PUT = _put.on_conflict_do_update(
    index_elements=["user_id", "session_id"],
    set_={"account_id": _put.excluded.account_id, "used_at": _put.excluded.used_at},
)
GET = select(table.c.account_id).where(
    table.c.user_id == bindparam("user_id"), table.c.session_id == bindparam("session_id")
)
FORGET = sa.delete(table).where(table.c.used_at < _NOW - _KEPT)


class Affinity:
    """The affinities, those used lately at hand."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: OrderedDict[SessionKey, str | None] = OrderedDict()
        self._unsaved: dict[SessionKey, str] = {}

    async def of(self, key: SessionKey) -> str | None:
        """The id of the session's account; asks the database for a session that this relay has not seen lately."""
        if key not in self._known:
            try:
                account_id = await self._database.value(GET, user_id=key.user_id, session_id=key.session_id)
            except DatabaseUnavailable:
                return None
            self._remember(key, account_id)
        return self._known[key]

    def note(self, key: SessionKey, account_id: str) -> None:
        """The session was just served by this account."""
        if self._known.get(key) != account_id:
            self._unsaved[key] = account_id
        self._remember(key, account_id)

    def _remember(self, key: SessionKey, account_id: str | None) -> None:
        self._known[key] = account_id
        self._known.move_to_end(key)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    async def save(self) -> None:
        """Writes what is new; raises DatabaseUnavailable, and tries again the next time."""
        while self._unsaved:
            some = dict(list(self._unsaved.items())[:_AT_ONCE])
            arrays = {
                "user_id_array": [key.user_id for key in some],
                "session_id_array": [key.session_id for key in some],
                "account_id_array": list(some.values()),
            }
            await self._database.rows(PUT, **arrays)
            for key, account_id in some.items():
                if self._unsaved.get(key) == account_id:
                    del self._unsaved[key]

    async def forget(self) -> None:
        """Deletes those that no prompt cache can still be warm for."""
        await self._database.rows(FORGET)
