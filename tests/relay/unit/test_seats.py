"""The pool by itself, several of them on one real database: seats given and given back, probes, what is read back."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from services.relay import accounts, first_accounts
from services.relay.account_use import AccountUse
from services.relay.errors import NoAccount, RelayError, UpstreamForbidden, UpstreamRateLimited
from services.relay.members import Seat
from services.relay.pool import Pool
from services.relay.sealing import Sealer, new_key
from services.relay.settings import RelaySettings
from services.relay.slots import LEASE_SECONDS, Slots
from services.relay.upstream.demo import DemoUpstream
from services.relay.verdicts import Verdict, of_failure
from shared.database import Database

FORBIDDEN = Verdict("forbidden", 1800.0, "upstream answered 403")
LIMITED = Verdict("rate_limited", 300.0, "upstream answered 429")


@pytest.fixture(scope="module")
def database_url(make_database: Callable[[], str]) -> str:
    return make_database()


@pytest_asyncio.fixture(loop_scope="session")
async def database(database_url: str) -> AsyncIterator[Database]:
    """Without any account, and with nothing left of earlier ones."""
    database = Database(database_url, schema="dev")
    await database.open()
    connection = await asyncpg.connect(database.url)
    await connection.execute("TRUNCATE dev.relay_accounts, dev.relay_slots, dev.relay_marks CASCADE")
    await connection.close()
    yield database
    await database.close()


@pytest_asyncio.fixture(loop_scope="session")
async def sql(database: Database) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database.url, server_settings={"search_path": "dev"})
    yield connection
    await connection.close()


@pytest_asyncio.fixture(loop_scope="session")
async def pools(database: Database) -> AsyncIterator[list[Pool]]:
    """Two relays' pools, both with the account `a`, made just now."""
    await add(database, "a")
    made = [Pool(database, Slots(database, name), lambda _: DemoUpstream()) for name in ("one", "two")]
    for pool in made:
        await pool.refresh()
    yield made
    for pool in made:
        await pool.stop(5)


@pytest.fixture
def pool(pools: list[Pool]) -> Pool:
    return pools[0]


async def add(database: Database, account_id: str, **columns: Any) -> None:
    usual: dict[str, Any] = {"provider": "anthropic", "base_url": "http://h", "secrets": None, "secrets_key_id": None}
    usual |= {"proxy_shown": None, "models": [], "priority": 0, "weight": 1.0, "max_concurrency": None}
    await accounts.add(database, account_id, {**usual, "name": account_id, **columns})


def seat(pool: Pool, *, wait_seconds: float = 0, tried: set[str] | None = None) -> Any:
    return pool.seat("m", prefers=None, tried=tried or set(), wait_seconds=wait_seconds)


async def limit(pools: list[Pool], sql: asyncpg.Connection, count: int | None) -> None:
    await sql.execute("UPDATE relay_accounts SET max_concurrency = $1", count)
    for pool in pools:
        await pool.refresh()


async def taken(sql: asyncpg.Connection) -> int:
    return int(await sql.fetchval("SELECT count(*) FROM relay_slots WHERE expires_at > now()"))


# ── slots ───────────────────────────────────────────────────────────────────────────────────────


async def test_never_more_than_there_are(pools: list[Pool], sql: asyncpg.Connection) -> None:
    """Over both pools, whatever the order; and all are used: nobody waits for a slot that is free."""
    await limit(pools, sql, 3)
    running = most = 0

    async def use(number: int) -> None:
        nonlocal running, most
        async with seat(pools[number % 2], wait_seconds=30):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01 * random.random())
            running -= 1

    await asyncio.gather(*(use(number) for number in range(60)))
    assert most == 3
    for pool in pools:
        await pool.written(5)
        assert pool.members["a"].in_flight == 0
    assert await taken(sql) == 0


async def test_a_slot_given_back_can_be_had_at_once(pools: list[Pool], pool: Pool, sql: asyncpg.Connection) -> None:
    """One request after the other never finds the only slot still taken by the one before."""
    await limit(pools, sql, 1)
    for _ in range(50):
        async with seat(pool):
            pass


async def test_one_slot_is_handed_on_without_pauses(pools: list[Pool], pool: Pool, sql: asyncpg.Connection) -> None:
    """Waiting for a place of this relay's own is ended by its coming free."""
    await limit(pools, sql, 1)

    async def use() -> None:
        async with seat(pool, wait_seconds=30):
            await asyncio.sleep(0)

    started = asyncio.get_running_loop().time()
    await asyncio.gather(*(use() for _ in range(60)))
    assert asyncio.get_running_loop().time() - started < 6  # with a pause of 0.2 s for each it would be 12


async def test_cancelled_at_any_moment_no_slot_is_lost(pools: list[Pool], pool: Pool, sql: asyncpg.Connection) -> None:
    """A client may hang up in the very moment in which its request gets a slot."""
    await limit(pools, sql, 1000)

    async def use() -> None:
        async with seat(pool):
            await asyncio.sleep(0.001)

    for number in range(200):
        task = asyncio.create_task(use())
        await asyncio.sleep(0.002 * (number / 200))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await pool.written(5)
    assert await taken(sql) == 0
    assert pool.members["a"].in_flight == 0


async def test_a_slot_is_held_as_long_as_its_relay_renews_it(
    pools: list[Pool], pool: Pool, sql: asyncpg.Connection
) -> None:
    """For LEASE_SECONDS at most after its relay is gone; a slot that runs out is no harm to who holds it."""
    await limit(pools, sql, 1)
    async with seat(pool):
        left = await sql.fetchval("SELECT extract(epoch FROM expires_at - now()) FROM relay_slots WHERE slot = 1")
        assert LEASE_SECONDS - 5 < left <= LEASE_SECONDS == 30
        await sql.execute("UPDATE relay_slots SET expires_at = now() + interval '1 second' WHERE slot = 1")
        await pool.slots.renew()
        left = await sql.fetchval("SELECT extract(epoch FROM expires_at - now()) FROM relay_slots WHERE slot = 1")
        assert left > LEASE_SECONDS - 5
        with pytest.raises(NoAccount):
            async with seat(pools[1]):
                pass
        await sql.execute("UPDATE relay_slots SET expires_at = now() - interval '1 second' WHERE slot = 1")
        pools[1].members["a"].full_until = 0.0
        async with seat(pools[1]):
            await pool.slots.renew()
            assert await sql.fetchval("SELECT relay_id FROM relay_slots WHERE slot = 1") == "two"
        await pools[1].written(5)
        await pool.slots.renew()  # what it has lost it does not take back
        assert await taken(sql) == 0
    await pool.written(5)
    assert await taken(sql) == 0


@asynccontextmanager
async def frozen(database: Database, sql: asyncpg.Connection) -> AsyncIterator[Pool]:
    """A pool that knows the accounts, and whose database answers nothing any more."""
    away = Database(database.url, schema="dev", timeout_seconds=0.2)
    await away.open()
    pool = Pool(away, Slots(away, "one"), lambda _: DemoUpstream())
    await pool.refresh()
    try:
        async with sql.transaction():
            await sql.execute("LOCK TABLE relay_slots, relay_accounts IN ACCESS EXCLUSIVE MODE")
            yield pool
    finally:
        await pool.stop(5)
        await away.close()


async def test_without_the_database_each_relay_keeps_its_limit(database: Database, sql: asyncpg.Connection) -> None:
    """What was known goes on being used."""
    await add(database, "a", max_concurrency=2)
    async with frozen(database, sql) as pool, seat(pool), seat(pool):
        with pytest.raises(NoAccount):
            async with seat(pool):
                pass


async def test_without_the_database_each_relay_probes_once(database: Database, sql: asyncpg.Connection) -> None:
    """And what befalls the account is told when the database is back, with the time that is left by then."""
    await add(database, "a")
    await sql.execute("UPDATE relay_accounts SET failures_in_row = 1")
    async with frozen(database, sql) as pool:
        async with seat(pool) as mine:
            with pytest.raises(NoAccount):
                async with seat(pool):
                    pass
            pool.failed(mine, LIMITED)
            told_at = asyncio.get_running_loop().time()
        await asyncio.sleep(1)
    row = await sql.fetchrow("SELECT extract(epoch FROM cooldown_until - now()) AS seconds FROM relay_accounts")
    assert row is not None
    assert 200 < row["seconds"] <= 300.5 - (asyncio.get_running_loop().time() - told_at)


# ── probes ──────────────────────────────────────────────────────────────────────────────────────


async def half_open(pools: list[Pool], sql: asyncpg.Connection) -> None:
    """The account has failed, and its rest is over."""
    await sql.execute("UPDATE relay_accounts SET failures_in_row = 1, cooldown_until = now() - interval '1 second'")
    for pool in pools:
        await pool.refresh()


async def held(pool: Pool, taken: list[Seat], let_go: asyncio.Event, *, wait_seconds: float = 30) -> None:
    """Takes a seat, and keeps it until it is let go; that worked."""
    async with seat(pool, wait_seconds=wait_seconds) as mine:
        taken.append(mine)
        await let_go.wait()
        pool.worked(mine)


async def test_one_probe_of_all_relays(pools: list[Pool], sql: asyncpg.Connection) -> None:
    """Until it is known what came of it; then everybody goes."""
    await half_open(pools, sql)
    taken: list[Seat] = []
    let_go = asyncio.Event()
    tasks = [asyncio.create_task(held(pools[number % 2], taken, let_go)) for number in range(8)]
    await asyncio.sleep(1)
    assert len(taken) == 1
    let_go.set()
    await asyncio.gather(*tasks)
    assert len(taken) == 8


async def test_a_probe_that_comes_to_nothing_makes_room_for_the_next(
    pools: list[Pool], sql: asyncpg.Connection
) -> None:
    """Its client has gone before there was an answer: the other relay's request probes at once."""
    await half_open(pools, sql)
    taken: list[Seat] = []
    first = asyncio.create_task(held(pools[0], taken, asyncio.Event()))
    while not taken:
        await asyncio.sleep(0.01)
    let_go = asyncio.Event()
    let_go.set()
    second = asyncio.create_task(held(pools[1], taken, let_go))
    await asyncio.sleep(0.3)
    assert len(taken) == 1
    first.cancel()
    await asyncio.wait_for(second, 5)


async def test_a_probe_that_fails_makes_the_rest_longer(pools: list[Pool], pool: Pool, sql: asyncpg.Connection) -> None:
    await half_open(pools, sql)
    async with seat(pool) as mine:
        pool.failed(mine, of_failure("connect: x"))
    await pool.written(5)
    row = await sql.fetchrow("SELECT failures_in_row, probe_until FROM relay_accounts")
    assert row is not None
    assert (row["failures_in_row"], row["probe_until"]) == (2, None)
    with pytest.raises(NoAccount):  # the other one has not heard of it, but it asks
        async with seat(pools[1]):
            pass
    for each in pools:
        await each.refresh()
        with pytest.raises(NoAccount) as caught:
            async with seat(each):
                pass
        assert 0.5 < (caught.value.retry_after_seconds or 0) <= 1.0


async def test_who_does_not_wait_is_told_while_a_probe_runs(
    pools: list[Pool], pool: Pool, sql: asyncpg.Connection
) -> None:
    await half_open(pools, sql)
    async with seat(pool):
        for each in pools:
            with pytest.raises(NoAccount):
                async with seat(each):
                    pass


# ── resting ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("first", "second", "reason", "least"),
    [
        (LIMITED, of_failure("x"), "rate_limited", 290),
        (LIMITED, Verdict("rate_limited", 5.0, "x"), "rate_limited", 290),
        (Verdict("rate_limited", 5.0, "x"), LIMITED, "rate_limited", 290),
        (LIMITED, FORBIDDEN, "forbidden", 1790),
        (FORBIDDEN, LIMITED, "forbidden", 1790),
        (of_failure("x"), LIMITED, "rate_limited", 290),
    ],
)
async def test_a_rest_is_never_shortened(
    pools: list[Pool], pool: Pool, sql: asyncpg.Connection, first: Verdict, second: Verdict, reason: str, least: float
) -> None:
    """Of two requests that began before either was answered, the longer rest counts, here and in the row."""
    async with seat(pool) as one, seat(pool) as other:
        pool.failed(one, first)
        pool.failed(other, second)
    obstacle = pool.members["a"].obstacle(asyncio.get_running_loop().time())
    assert obstacle is not None
    assert obstacle[0] == reason
    await pool.written(5)
    row = await sql.fetchrow(
        "SELECT cooldown_reason, extract(epoch FROM cooldown_until - now()) AS seconds FROM relay_accounts"
    )
    assert row is not None
    assert row["cooldown_reason"] == reason
    assert least < row["seconds"] <= 1800
    await pools[1].refresh()
    assert pools[1].members["a"].reason == reason


async def test_failures_of_one_moment_count_once(pools: list[Pool], pool: Pool, sql: asyncpg.Connection) -> None:
    """Ten requests that break together are one outage, not ten in a row."""
    seats = [seat(pool) for _ in range(10)]
    entered = [await each.__aenter__() for each in seats]
    for mine in entered:
        pool.failed(mine, of_failure("connect: x"))
    for each in seats:
        await each.__aexit__(None, None, None)
    await pool.written(5)
    assert pool.members["a"].failures == 10
    assert await sql.fetchval("SELECT failures_in_row FROM relay_accounts") == 1


@pytest.mark.parametrize(
    ("verdicts", "expected", "seconds"),
    [
        ([FORBIDDEN, FORBIDDEN], UpstreamForbidden, 1800),
        ([LIMITED, LIMITED], UpstreamRateLimited, 300),
        ([LIMITED, Verdict("rate_limited", 40.0, "x")], UpstreamRateLimited, 40),
        ([LIMITED, FORBIDDEN], UpstreamRateLimited, 300),
        ([LIMITED, Verdict("disabled", None, "x")], UpstreamRateLimited, 300),
        ([Verdict("disabled", None, "x"), FORBIDDEN], UpstreamForbidden, 1800),
        ([LIMITED, Verdict("failing", 20.0, "x")], NoAccount, 20),
        ([FORBIDDEN, Verdict("failing", 20.0, "x")], NoAccount, 20),
    ],
)
async def test_why_there_is_no_account(
    database: Database, pool: Pool, verdicts: list[Verdict], expected: type[RelayError], seconds: float
) -> None:
    """By the causes of all of them, with the time of the first to be eligible again."""
    await add(database, "b")
    await pool.refresh()
    for verdict in verdicts:
        async with seat(pool) as mine:
            pool.failed(mine, verdict)
    with pytest.raises(expected) as caught:
        async with seat(pool):
            pass
    assert type(caught.value) is expected
    assert seconds - 5 < (caught.value.retry_after_seconds or 0) <= seconds


# ── what is read back ───────────────────────────────────────────────────────────────────────────


async def test_an_older_reading_never_replaces_a_newer_one(
    pool: Pool, database: Database, sql: asyncpg.Connection
) -> None:
    """After an administrator has been told that an account is disabled, no reading begun before brings it back."""
    for _ in range(30):
        readings = [asyncio.create_task(pool.refresh()) for _ in range(5)]
        await asyncio.sleep(0)
        await accounts.disable(database, "a")
        await pool.refresh()
        assert not pool.members["a"].enabled
        await asyncio.gather(*readings)
        assert not pool.members["a"].enabled
        await accounts.enable(database, "a")
        await pool.refresh()


async def test_what_changed_while_something_was_told_is_read(pool: Pool, sql: asyncpg.Connection) -> None:
    """A reading that meets a write of this relay's own is not lost: nobody may notify again."""
    async with seat(pool) as mine:
        await sql.execute("UPDATE relay_accounts SET enabled = false, disabled_reason = 'by hand'")
        async with sql.transaction():
            await sql.execute("SELECT 1 FROM relay_accounts FOR UPDATE")
            pool.failed(mine, LIMITED)  # its row is locked
            await pool.refresh()
            assert pool.members["a"].enabled
    for _ in range(2):  # the write, and the reading after it
        await pool.written(5)
    assert not pool.members["a"].enabled


async def test_figures_are_told_once_however_many_tell(pool: Pool, database: Database) -> None:
    """Administrators' calls and the relay's own rounds tell at the same time."""
    use = AccountUse(database, pool, "one")
    for _ in range(5):
        async with seat(pool):
            pass
        await asyncio.gather(*(use.tell() for _ in range(5)))
    assert (await accounts.uses(database))["a"].requests == 5


# ── first accounts ──────────────────────────────────────────────────────────────────────────────


async def test_a_taken_demo_id_is_left_alone(database: Database) -> None:
    """An operator may have called an account of their own so; the relay starts all the same."""
    await add(database, "demo", name="mine")
    sealer = Sealer([new_key("k")])
    for _ in range(2):
        await first_accounts.make(database, RelaySettings(), sealer)
        assert [(each.id, each.name) for each in await accounts.list_all(database)] == [("demo", "mine")]


async def test_many_relays_that_start_at_once_make_one_of_each(database: Database) -> None:
    settings = RelaySettings.model_validate({"relay_upstream_url": "http://h", "relay_upstream_api_key": "k"})
    sealer = Sealer([new_key("k")])
    await asyncio.gather(*(first_accounts.make(database, settings, sealer) for _ in range(8)))
    assert [each.id for each in sorted(await accounts.list_all(database), key=lambda each: each.id)] == [
        "anthropic",
        "demo",
    ]
