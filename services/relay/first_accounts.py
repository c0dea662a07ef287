"""The accounts that are there without any admin call: the one that the settings name, and in development the demo.

Its one invariant: the demo account is made once; deleted, it does not come back. The settings' account follows them.
"""

from typing import Any, Final

from sqlalchemy import ARRAY, Text, bindparam, func, select
from sqlalchemy.dialects.postgresql import insert

from services.relay import accounts
from services.relay.errors import AccountExists
from services.relay.schema import metadata, relay_marks
from services.relay.sealing import Sealer, Unsealable
from services.relay.settings import RelaySettings
from shared.database import Conn, Database

SETTINGS_ID: Final = "anthropic"
DEMO_ID: Final = "demo"
MARK = (
    insert(relay_marks)
    .values(name=bindparam("name"), made_at=accounts.NOW)
    .on_conflict_do_nothing()
    .returning(relay_marks.c.name)
)
_name = func.unnest(bindparam("names", type_=ARRAY(Text))).column_valued("name")
EXIST = select(func.bool_and(func.to_regclass(_name).is_not(None)))
_USUAL: Final[dict[str, Any]] = {
    "base_url": "",
    "secrets": None,
    "secrets_key_id": None,
    "proxy_shown": None,
    "models": [],
    "priority": 0,
    "weight": 1.0,
    "max_concurrency": None,
}


async def tables_exist(conn: Conn, schema: str) -> bool:
    """Whether the migrations have made all the relay's tables."""
    return bool(await conn.value(EXIST, names=[f"{schema}.{name}" for name in metadata.tables]))


async def make(database: Database, settings: RelaySettings, sealer: Sealer) -> None:
    """Makes those that are missing; raises DatabaseUnavailable."""
    if settings.relay_upstream_url:
        await _follow_settings(database, settings, sealer)
    if settings.is_development:
        await database.transact(_make_demo)


async def _follow_settings(database: Database, settings: RelaySettings, sealer: Sealer) -> None:
    secrets = {"api_key": settings.relay_upstream_api_key.get_secret_value()}
    found = {account.id: account for account in await accounts.list_all(database)}.get(SETTINGS_ID)
    if found is not None:
        try:
            known = sealer.secrets_of(found)
        except Unsealable:
            known = {}  # what the settings say is readable
        secrets = known | secrets
        if (found.base_url, known) == (settings.relay_upstream_url, secrets):
            return
    values = {
        "base_url": settings.relay_upstream_url,
        "secrets": sealer.seal(SETTINGS_ID, secrets),
        "secrets_key_id": sealer.key_id,
    }
    if found is not None:
        await accounts.change(database, SETTINGS_ID, values, enabled=None)
        return
    try:
        await accounts.add(
            database, SETTINGS_ID, {**_USUAL, **values, "name": "from the settings", "provider": "anthropic"}
        )
    except AccountExists:
        return  # another relay was quicker


async def _make_demo(conn: Conn) -> None:
    if await conn.row(MARK, name="demo_account") is None:
        return
    if any(account.provider == "demo" or account.id == DEMO_ID for account in await accounts.list_all(conn)):
        return
    await accounts.add(conn, DEMO_ID, {**_USUAL, "name": "demo", "provider": "demo"})
