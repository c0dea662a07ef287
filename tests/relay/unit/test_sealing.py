"""Secrets at rest: what opens them and what does not, and changing the key."""

import asyncio
import base64
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import assume, given
from hypothesis import strategies as st

from services.relay import accounts
from services.relay.reseal import reseal
from services.relay.sealing import Sealer, Unsealable, new_key
from shared.database import Database
from tests.processes import ROOT

OLD, NEW = new_key("old"), new_key("new")
SECRETS = {"api_key": "sk-very-secret", "proxy_url": "http://u:hidden@h:1"}


# ── sealing ─────────────────────────────────────────────────────────────────────────────────────


@given(st.text(max_size=50), st.text(max_size=50), st.dictionaries(st.text(max_size=10), st.text(), max_size=4))
def test_what_is_sealed_opens_for_its_owner_alone(owner_id: str, other_id: str, secrets: dict[str, str]) -> None:
    assume(owner_id != other_id)
    sealer = Sealer([OLD])
    sealed = sealer.seal(owner_id, secrets)
    assert sealer.unseal(owner_id, sealed, "old") == secrets
    for other in (other_id, owner_id + "x"):
        with pytest.raises(Unsealable):
            sealer.unseal(other, sealed, "old")


def test_nothing_of_a_secret_can_be_seen() -> None:
    """Two seals of the same differ, and neither holds it in clear."""
    sealer = Sealer([OLD])
    sealed = {sealer.seal("a", SECRETS) for _ in range(20)}
    assert len(sealed) == 20
    assert len({each[:12] for each in sealed}) == 20
    assert not any(secret.encode() in each for each in sealed for secret in ("very-secret", "hidden", "api_key"))


def test_whatever_is_changed_it_does_not_open() -> None:
    """Any bit of it, any part missing, another key's id: Unsealable, which says nothing of what was there."""
    sealer = Sealer([OLD, NEW])
    sealed = sealer.seal("a", SECRETS)
    broken = [bytes([*sealed[:at], sealed[at] ^ 1, *sealed[at + 1 :]]) for at in range(len(sealed))]
    broken += [sealed[:length] for length in (0, 1, 11, 12, 13, len(sealed) - 1)] + [sealed + b"\0"]
    for each in broken:
        with pytest.raises(Unsealable) as caught:
            sealer.unseal("a", each, "old")
        assert "'old'" in str(caught.value)
        assert "secret" not in str(caught.value).replace("account's secrets", "")
    for key_id in ("new", "gone", ""):
        with pytest.raises(Unsealable, match=repr(key_id)):
            sealer.unseal("a", sealed, key_id)


def test_the_first_key_seals_and_all_open() -> None:
    sealed = Sealer([OLD]).seal("a", SECRETS)
    both = Sealer([NEW, OLD])
    assert both.key_id == "new"
    assert both.unseal("a", sealed, "old") == SECRETS
    again = both.seal("a", SECRETS)
    assert Sealer([NEW]).unseal("a", again, "new") == SECRETS
    with pytest.raises(Unsealable):
        Sealer([OLD]).unseal("a", again, "new")
    with pytest.raises(Unsealable):  # another key by the same name
        Sealer([new_key("new")]).unseal("a", again, "new")


def test_a_key_is_256_bits_and_never_the_same() -> None:
    made = [new_key("k") for _ in range(10)]
    assert len(set(made)) == 10
    assert {len(base64.b64decode(each.partition(":")[2])) for each in made} == {32}


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [""],
        ["k"],
        ["k:"],
        [":" + OLD.partition(":")[2]],
        ["k:not base64!"],
        ["k:ünïcode"],
        ["k:" + base64.b64encode(bytes(31)).decode()],
        ["k:" + base64.b64encode(bytes(33)).decode()],
        [OLD, OLD],
        [OLD, "k:x"],
    ],
)
def test_bad_keys_are_refused_by_the_settings_name(keys: list[str]) -> None:
    """And nothing of a key is in the message."""
    with pytest.raises(ValueError, match="RELAY_ENCRYPTION_KEYS") as caught:
        Sealer(keys)
    assert OLD.partition(":")[2] not in str(caught.value)


# ── changing the key ────────────────────────────────────────────────────────────────────────────


@pytest_asyncio.fixture(loop_scope="session")
async def database(make_database: Callable[[], str]) -> AsyncIterator[Database]:
    """With the accounts a and b sealed under the old key, c under a lost one, and d without secrets."""
    database = Database(make_database(), schema="dev")
    await database.open()
    for account_id, key in (("a", OLD), ("b", OLD), ("c", new_key("lost")), ("d", None)):
        sealer = Sealer([key]) if key else None
        columns: dict[str, Any] = {"name": account_id, "provider": "demo", "base_url": "", "models": []}
        columns |= {"priority": 0, "weight": 1.0, "max_concurrency": None, "proxy_shown": None}
        columns["secrets"] = sealer.seal(account_id, SECRETS) if sealer else None
        columns["secrets_key_id"] = sealer.key_id if sealer else None
        await accounts.add(database, account_id, columns)
    yield database
    await database.close()


async def test_rotating_the_key(database: Database, tmp_path: Path) -> None:
    """All that can be opened is sealed anew, in place; what cannot is told and left; a second run does nothing."""
    before = {each.id: each for each in await accounts.list_all(database)}
    environment = {
        "ENVIRONMENT": "production",
        "DATABASE_URL": database.url,
        "RELAY_ENCRYPTION_KEYS": f"{NEW}, {OLD}",
        "RELAY_ADMIN_TOKEN": "t",
        "RELAY_KEY_PEPPER": "p",
        "SESSION_SERVICE_TOKENS": "s",
        "DATA_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "services.relay.reseal"]

    def run(**settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment | settings,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    done = await asyncio.to_thread(run)
    assert done.returncode == 1
    assert done.stdout == "2 sealed anew with key 'new'\n"
    assert done.stderr == "reseal: c: encryption key 'lost' is not in RELAY_ENCRYPTION_KEYS\n"
    after = {each.id: each for each in await accounts.list_all(database)}
    only_new = Sealer([NEW])
    for account_id in ("a", "b"):
        assert after[account_id].secrets_key_id == "new"
        assert only_new.secrets_of(after[account_id]) == SECRETS
    for account_id in ("c", "d"):
        assert after[account_id].secrets == before[account_id].secrets
        assert after[account_id].secrets_key_id == before[account_id].secrets_key_id
    for secret in (*SECRETS.values(), OLD.partition(":")[2], NEW.partition(":")[2]):
        assert secret not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())

    connection = await asyncpg.connect(database.url)
    await connection.execute("DELETE FROM dev.relay_accounts WHERE id = 'c'")
    await connection.close()
    again = await asyncio.to_thread(run, RELAY_ENCRYPTION_KEYS=NEW)
    assert (again.returncode, again.stdout, again.stderr) == (0, "0 sealed anew with key 'new'\n", "")
    away = await asyncio.to_thread(run, DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert (away.returncode, away.stdout) == (1, "")
    assert away.stderr.endswith("reseal: the database cannot be reached\n")


async def test_resealing_is_all_or_nothing(database: Database) -> None:
    """It may break off at any account: then all of them are still under the old key."""
    other = Database(database.url, schema="dev")
    connection = await asyncpg.connect(database.url, server_settings={"search_path": "dev"})
    try:
        await connection.execute("""
            CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'broken off'; END $$;
            CREATE TRIGGER fail BEFORE UPDATE ON relay_accounts FOR EACH ROW WHEN (OLD.id = 'b')
            EXECUTE FUNCTION fail()
        """)
        with pytest.raises(asyncpg.RaiseError):
            await reseal(other, Sealer([NEW, OLD]))
        sealed = await connection.fetch("SELECT id FROM relay_accounts WHERE secrets_key_id = 'new'")
        assert sealed == []
        await connection.execute("DROP TRIGGER fail ON relay_accounts")
        assert (await reseal(other, Sealer([NEW, OLD])))[0] == 2
    finally:
        await connection.close()
