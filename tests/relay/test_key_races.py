"""Limits under races: two relays on one database, many requests at once, relays that die, a database that goes away."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from services.relay import keys
from services.relay.errors import KeyLimitReached, UnknownKey
from services.relay.key_limits import KeyLimits, Used
from services.relay.key_use import LEASE_SECONDS
from shared.database import Database
from shared.errors import DatabaseUnavailable
from tests.processes import Process, ServiceProcess
from tests.relay.calls import Json, error_of, start_relay, upstream_settings
from tests.relay.key_calls import PATH, Admin, Caller, open_db, open_http, seconds_until, use_row
from tests.session_service.calls import Db
from tests.upstream.client import TestUpstream

MODEL = "claude-sonnet-4-5"
LONG = "word " * 60


@pytest.fixture(scope="module")
def other_relay(
    database_url: str, session_service: ServiceProcess, upstream_process: TestUpstream, data_dir: Path
) -> Iterator[Process]:
    """A second relay on the database of the shared one; its last test kills it."""
    settings = upstream_settings(upstream_process.url) | {"RELAY_RETRY_WAIT_SECONDS": "0"}
    with start_relay(database_url, session_service.url, data_dir, settings) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def https(relay: Process, other_relay: Process) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client of each relay, without credentials."""
    async with AsyncExitStack() as opened:
        yield [await opened.enter_async_context(open_http(each)) for each in (relay, other_relay)]


@pytest.fixture
def admin(https: list[httpx.AsyncClient], data_dir: Path, relay: Process, upstream: TestUpstream) -> Admin:
    return Admin.of(https[0], data_dir)


@pytest_asyncio.fixture(loop_scope="session")
async def db(database_url: str) -> AsyncIterator[Db]:
    async with open_db(database_url) as db:
        yield db


async def check_nothing_reserved(db: Db, key_id: str) -> None:
    row = await use_row(db, key_id)
    left = await db.fetchval("SELECT count(*) FROM dev.relay_key_reservations WHERE key_id = $1", key_id)
    assert (row["in_flight"], row["reserved_tokens"], row["reserved_cost"], left) == (0, 0, 0, 0)


def most_at_once(upstream: TestUpstream) -> int:
    """How many requests ran at the upstream at the same time, at the most."""
    entries = upstream.requests(PATH)
    moments = [(entry["received_at"], 1) for entry in entries] + [(entry["ended_at"], -1) for entry in entries]
    running = most = 0
    for _, step in sorted(moments):
        running += step
        most = max(most, running)
    return most


# ── many at once ────────────────────────────────────────────────────────────────────────────────


async def test_never_more_than_the_limit_run_at_once(
    admin: Admin, https: list[httpx.AsyncClient], upstream: TestUpstream, db: Db
) -> None:
    """Of 50 streams at two relays, some of them cut by upstream and some left by their client, 5 at most run."""
    cut = {"text": LONG, "event_delay_ms": 2, "cut_after_events": 20, "match": {"model": "cut"}, "repeat": -1}
    upstream.script(cut, {"text": LONG, "event_delay_ms": 4, "repeat": -1})
    key = await admin.make(concurrencyLimit=5)
    refusals = 0

    async def run(number: int) -> None:
        nonlocal refusals
        caller = key.at(https[number % 2])
        ask = caller.leave if number % 5 == 0 else caller.stream_whole
        while True:
            answer = await ask(model="cut" if number % 7 == 0 else MODEL)
            status = answer if isinstance(answer, int) else answer.status_code
            if status == 200:
                return
            assert status == 429
            refusals += 1
            await asyncio.sleep(0.1)

    await asyncio.gather(*(run(number) for number in range(50)))
    assert len(upstream.requests(PATH)) == 50
    assert most_at_once(upstream) == 5
    assert refusals > 0

    async def is_over() -> bool:
        return bool((await use_row(db, key.id))["in_flight"] == 0)

    await seconds_until(is_over)  # a client that left does not wait for that
    await check_nothing_reserved(db, key.id)
    assert (await admin.key(key.id))["usage"]["requests"] == 50


COST = 0.015015  # of 5 tokens in and 1000 out, which is what a relay expects of "Hello" and max_tokens 1000
EXACT: list[Json] = [
    {"rateLimitWindow": 5, "rateLimitRequests": 11},
    {"tokenLimit": 10 * 1005 + 500},
    {"tokenLimit": 10 * 1005 + 500, "rateLimitWindow": 5},
    {"dailyCostLimit": 10.5 * COST},
    {"totalCostLimit": 10.5 * COST},
]


@pytest.mark.parametrize("fields", EXACT)
async def test_no_request_more_than_the_limit_allows(
    admin: Admin, https: list[httpx.AsyncClient], upstream: TestUpstream, db: Db, fields: Json
) -> None:
    """Where requests come to what was expected of them, 40 at once exceed the limit by the last one at most."""
    upstream.script({"delay_ms": 50, "usage": {"input_tokens": 5, "output_tokens": 1000}, "repeat": -1})
    key = await admin.make(**fields)
    limit = list(fields)[-1] if "tokenLimit" not in fields else "tokenLimit"
    callers = [key.at(https[number % 2]) for number in range(40)]
    answers = await asyncio.gather(*(caller.ask(model=MODEL, max_tokens=1000) for caller in callers))
    served = [answer for answer in answers if answer.status_code == 200]
    for answer in answers:
        if answer not in served:
            assert error_of(answer, 429, "rate_limit_error") == f"The API key has reached its {limit}"
            assert int(answer.headers["retry-after"]) >= 1
    assert len(served) == len(upstream.requests(PATH)) == 11
    assert await admin.used(key.id) == (11, 11 * 1005, round(11 * COST, 6))
    await check_nothing_reserved(db, key.id)
    assert (await key.ask(model=MODEL)).status_code == 429


@pytest.mark.parametrize("limit", ["dailyCostLimit", "totalCostLimit"])
async def test_costs_exceed_their_limit_by_what_was_in_flight_at_most(
    admin: Admin, https: list[httpx.AsyncClient], upstream: TestUpstream, db: Db, limit: str
) -> None:
    """Where each answer costs much more than anybody could expect."""
    usage = {"input_tokens": 1000, "cache_read_input_tokens": 100_000, "output_tokens": 20_000}  # $ 0.333
    upstream.script({"text": LONG, "delay_ms": 20, "usage": usage, "repeat": -1})
    cost, most = 0.333, 4
    key = await admin.make(**{limit: 3}, concurrencyLimit=most)
    reached = 0

    async def run(caller: Caller) -> None:
        nonlocal reached
        while True:
            answer = await caller.stream_whole(model=MODEL)
            if answer.status_code == 429:
                message = error_of(answer, 429, "rate_limit_error")
                if limit in message and int(answer.headers["retry-after"]) > 1:
                    reached += 1
                    return
                await asyncio.sleep(0.05)

    await asyncio.gather(*(run(key.at(https[number % 2])) for number in range(12)))
    assert reached == 12
    requests, _, total = await admin.used(key.id)
    assert requests == len(upstream.requests(PATH))
    assert 3 <= total < 3 + most * cost
    assert most_at_once(upstream) <= most
    await check_nothing_reserved(db, key.id)


# ── one relay's own, by itself ──────────────────────────────────────────────────────────────────


@asynccontextmanager
async def limits_of(url: str) -> AsyncIterator[tuple[KeyLimits, Database]]:
    database = Database(url, schema="dev", pool_size=4)
    await database.open()
    try:
        yield KeyLimits(database), database
    finally:
        await database.close()


async def key_of(database: Database, caller: Caller) -> keys.Key:
    return await keys.get(database, caller.id)


async def lease_ends_in(db: Db, key_id: str) -> list[float]:
    """Seconds, of each reservation."""
    left = "extract(epoch FROM expires_at - now())::float"
    rows = await db.fetch(f"SELECT {left} FROM dev.relay_key_reservations WHERE key_id = $1 ORDER BY id", key_id)
    return [row[0] for row in rows]


async def pass_by(db: Db, key_id: str, seconds: float) -> None:
    """As if so many seconds had passed for the key's reservations."""
    moved = "expires_at = expires_at - $2 * interval '1 second'"
    await db.execute(f"UPDATE dev.relay_key_reservations SET {moved} WHERE key_id = $1", key_id, float(seconds))


async def test_a_reservation_lasts_as_long_as_its_relay_renews_it(admin: Admin, db: Db, database_url: str) -> None:
    caller = await admin.make(concurrencyLimit=1)
    async with limits_of(database_url) as (gone, database), limits_of(database_url) as (alive, _):
        key = await key_of(database, caller)
        held = await alive.reserve(key, 10, Decimal(1))
        assert 20 < (await lease_ends_in(db, key.id))[0] <= LEASE_SECONDS == 30
        for _ in range(3):
            await pass_by(db, key.id, 20)
            await alive.renew()
            await gone.give_back()
        assert 20 < (await lease_ends_in(db, key.id))[0] <= 30
        with pytest.raises(KeyLimitReached):
            await gone.reserve(key, 10, Decimal(1))
        await alive.settle(held, Used(1, 7, Decimal("0.5")))
        await alive.renew()
        await gone.reserve(key, 10, Decimal(1))
        await pass_by(db, key.id, 31)
        await alive.give_back()
        await check_nothing_reserved(db, key.id)
        row = await use_row(db, key.id)
        assert (row["requests"], row["tokens"], row["cost"]) == (1, 7, Decimal("0.5"))


async def test_a_reservation_ends_once(admin: Admin, db: Db, database_url: str) -> None:
    """Whoever ends it: what was used is added, what was reserved is given back, and never twice."""
    caller = await admin.make(concurrencyLimit=3)
    async with limits_of(database_url) as (limits, database), limits_of(database_url) as (other, _):
        key = await key_of(database, caller)
        late, stays = await limits.reserve(key, 10, Decimal(1)), await other.reserve(key, 5, Decimal(2))
        await pass_by(db, key.id, 31)
        await other.renew()
        await asyncio.gather(limits.give_back(), other.give_back())
        row = await use_row(db, key.id)
        assert (row["in_flight"], row["reserved_tokens"], row["reserved_cost"]) == (1, 5, 2)
        await limits.settle(late, Used(1, 30, Decimal(3)))
        await limits.renew()
        row = await use_row(db, key.id)
        assert (row["in_flight"], row["reserved_tokens"], row["reserved_cost"]) == (1, 5, 2)
        assert (row["requests"], row["tokens"], row["cost"]) == (1, 30, 3)
        await db.execute("UPDATE dev.relay_key_use SET in_flight = 0, reserved_cost = 0 WHERE key_id = $1", key.id)
        await other.settle(stays, Used())  # set anew by hand meanwhile
        await check_nothing_reserved(db, key.id)


async def test_an_operator_may_delete_what_is_known_of_a_keys_use(admin: Admin, db: Db, database_url: str) -> None:
    """It begins anew; a key that is deleted altogether is unknown."""
    caller = await admin.make(concurrencyLimit=3)
    async with limits_of(database_url) as (limits, database):
        key = await key_of(database, caller)
        held = await limits.reserve(key, 10, Decimal(1))
        await db.execute("DELETE FROM dev.relay_key_use WHERE key_id = $1", key.id)
        again = await limits.reserve(key, 5, Decimal(1))
        await limits.settle(held, Used(1, 7, Decimal(1)))
        await limits.settle(again, Used(1, 7, Decimal(1)))
        await check_nothing_reserved(db, key.id)
        assert (await use_row(db, key.id))["requests"] == 2
        free = await limits.reserve(await key_of(database, await admin.make()), 0, Decimal(0))
        for _ in range(2):
            await limits.settle(free, Used(1, 7, Decimal(1)))
            await limits.save()
            assert (await use_row(db, free.key.id))["requests"] == 1
            await db.execute("DELETE FROM dev.relay_key_use WHERE key_id = $1", free.key.id)
        await db.execute("DELETE FROM dev.relay_api_keys WHERE id = ANY($1)", [key.id, free.key.id])
        with pytest.raises(UnknownKey):
            await limits.reserve(key, 5, Decimal(1))
        await limits.settle(free, Used(1, 7, Decimal(1)))
        await limits.save()


async def test_while_the_database_is_away(admin: Admin, db: Db, database_url: str) -> None:
    """A limited key is not let in unseen; what was used is written once the database is back."""
    limited, free = await admin.make(totalCostLimit=100), await admin.make()
    async with limits_of(database_url) as (limits, database):
        held = [await limits.reserve(await key_of(database, each), 10, Decimal(1)) for each in (limited, free)]
        await database.close()
        with pytest.raises(DatabaseUnavailable):
            await limits.reserve(held[0].key, 10, Decimal(1))
        for reservation in held:
            await limits.settle(reservation, Used(1, 7, Decimal(2)))
        with pytest.raises(DatabaseUnavailable):
            await limits.save()
        saving = asyncio.create_task(limits.keep_saving())
        await asyncio.sleep(0.1)
        await database.open()

        async def is_saved() -> bool:
            return all([(await admin.key(each.id))["usage"]["cost"] == 2 for each in (limited, free)])

        await seconds_until(is_saved)
        saving.cancel()
        row = await use_row(db, limited.id)
        assert (row["in_flight"], row["reserved_cost"]) == (1, 1)
        await pass_by(db, limited.id, 31)
        await limits.give_back()
        await check_nothing_reserved(db, limited.id)
        assert [(await admin.used(each.id))[:2] for each in (limited, free)] == [(1, 7)] * 2


async def test_a_slow_database_does_not_hold_an_answer_back(admin: Admin, db: Db, database_url: str) -> None:
    """What was used is put in place as soon as it can be, once."""
    caller = await admin.make(concurrencyLimit=3)
    async with limits_of(database_url) as (limits, database):
        held = await limits.reserve(await key_of(database, caller), 10, Decimal(1))
        async with db.transaction():
            await db.execute("SELECT 1 FROM dev.relay_key_use WHERE key_id = $1 FOR UPDATE", caller.id)
            async with asyncio.timeout(6):  # the database itself would give up after ten seconds
                await limits.settle(held, Used(1, 7, Decimal(2)))
            saving = asyncio.create_task(limits.save())
        await saving
        await check_nothing_reserved(db, caller.id)
    assert await admin.used(caller.id) == (1, 7, 2)


# ── a relay that dies ───────────────────────────────────────────────────────────────────────────


async def test_what_a_killed_relay_had_reserved_comes_back(
    admin: Admin, https: list[httpx.AsyncClient], other_relay: Process, upstream: TestUpstream, db: Db
) -> None:
    """Once its leases have run out, by whichever relay is left."""
    upstream.script({"text": LONG, "event_delay_ms": 50, "match": {"contains": "slow"}, "repeat": -1})
    key = await admin.make(concurrencyLimit=2, totalCostLimit=1000)
    doomed = [asyncio.create_task(key.at(https[1]).stream_whole("slow", model=MODEL)) for _ in range(2)]
    await upstream.until(lambda state: state["running"] == 2)
    other_relay.kill()
    results = await asyncio.gather(*doomed, return_exceptions=True)
    assert all(isinstance(each, httpx.HTTPError) for each in results)
    row = await use_row(db, key.id)
    assert row["in_flight"] == 2
    assert row["reserved_cost"] > 0
    assert all(0 < seconds <= LEASE_SECONDS for seconds in await lease_ends_in(db, key.id))
    assert (await key.ask(model=MODEL)).status_code == 429
    await pass_by(db, key.id, LEASE_SECONDS)

    async def is_served() -> bool:
        return (await key.ask(model=MODEL)).status_code == 200

    await seconds_until(is_served, at_most=20, between=0.1)
    await check_nothing_reserved(db, key.id)
    assert (await admin.used(key.id))[0] == 1
