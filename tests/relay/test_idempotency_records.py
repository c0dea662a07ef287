"""Records of requests with an Idempotency-Key: one try at a time, taken over when its relay is gone, fenced after."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from services.relay.errors import InvalidRequest
from services.relay.idempotency import Earlier, Idempotency, Replay, Try, header_of, request_hash
from shared import embedded_postgres
from shared.database import Database
from shared.errors import DatabaseUnavailable, IdempotencyInProgress, IdempotencyKeyReused
from tests.conftest import migrate

HASH = request_hash({"model": "m", "messages": []}, "named:s")
OTHER_HASH = request_hash({"model": "n", "messages": []}, "named:s")
HEADERS = {"content-type": "application/json", "x-session-id": "s%C3%A9"}
MESSAGE = '{"id":"msg_1","content":[{"type":"text","text":"é \\ud800"}]}'.encode()
SHORT_SECONDS = 0.6


@pytest.fixture(scope="module")
def url(make_database: Callable[[], str]) -> str:
    return make_database()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def databases(url: str) -> AsyncIterator[list[Database]]:
    """Two pools, as two relays have them."""
    opened = [Database(url, schema="dev", pool_size=8) for _ in range(2)]
    async with AsyncExitStack() as stack:
        for database in opened:
            await database.open()
            stack.push_async_callback(database.close)
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sql(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@pytest.fixture
def relay_a(databases: list[Database]) -> Idempotency:
    return Idempotency(databases[0])


@pytest.fixture
def hasty(databases: list[Database]) -> Idempotency:
    """A relay whose leases are short."""
    return Idempotency(databases[1], lease_seconds=SHORT_SECONDS)


@pytest.fixture
def key() -> str:
    return f"key-{uuid.uuid4().hex}"


async def a_try(records: Idempotency, key: str, hash_: bytes = HASH) -> Try:
    begun = await records.begin("u", key, hash_)
    assert isinstance(begun, Try)
    return begun


async def is_running(records: Idempotency, key: str, hash_: bytes = HASH) -> bool:
    try:
        await records.begin("u", key, hash_)
    except IdempotencyInProgress as error:
        return error.headers() == {"retry-after": "1"}
    return False


# ── what a try comes to ─────────────────────────────────────────────────────────────────────────


async def test_a_completed_answer_is_given_again(relay_a: Idempotency, hasty: Idempotency, key: str) -> None:
    running = await a_try(relay_a, key)
    assert running.earlier is None
    assert await is_running(hasty, key)
    assert await relay_a.completed(running, HEADERS, MESSAGE)
    for _ in range(3):
        assert await hasty.begin("u", key, HASH) == Replay(HEADERS, MESSAGE, 200)
    await relay_a.failed(running)  # it has ended: nothing changes any more
    assert not await relay_a.completed(running, {}, b"{}")
    assert await hasty.begin("u", key, HASH) == Replay(HEADERS, MESSAGE)


async def test_another_body_under_the_same_key(relay_a: Idempotency, key: str) -> None:
    running = await a_try(relay_a, key)
    with pytest.raises(IdempotencyKeyReused):
        await relay_a.begin("u", key, OTHER_HASH)
    await relay_a.failed(running)
    with pytest.raises(IdempotencyKeyReused):
        await relay_a.begin("u", key, OTHER_HASH)
    assert await relay_a.completed(await a_try(relay_a, key), HEADERS, MESSAGE)
    with pytest.raises(IdempotencyKeyReused):
        await relay_a.begin("u", key, OTHER_HASH)


async def test_keys_of_other_users_and_other_keys_are_their_own(relay_a: Idempotency, key: str) -> None:
    await a_try(relay_a, key)
    assert isinstance(await relay_a.begin("other", key, OTHER_HASH), Try)
    assert isinstance(await relay_a.begin("u", key.upper(), OTHER_HASH), Try)


async def test_a_failed_try_is_run_again_at_once_and_its_place_is_known(relay_a: Idempotency, key: str) -> None:
    first = await a_try(relay_a, key)
    await relay_a.failed(first)
    second = await a_try(relay_a, key)
    assert second.earlier is None  # the first had opened no turn
    await relay_a.opening(second, "s", "turn-2")
    await relay_a.failed(second)
    third = await a_try(relay_a, key)
    assert third.earlier == Earlier("s", "turn-2")
    await relay_a.failed(third)  # before it opened a turn of its own
    fourth = await a_try(relay_a, key)
    assert fourth.earlier == Earlier("s", "turn-2")
    await relay_a.opening(fourth, "s", "turn-4")
    await relay_a.failed(fourth)
    # Nobody knows yet whether turn-4 was ever opened: if not, turn-2 is still there.
    fifth = await a_try(relay_a, key)
    assert fifth.earlier == Earlier("s", "turn-4", ("turn-2",))
    for number in range(30):
        await relay_a.opening(fifth, "s", f"turn-{number}")
        await relay_a.failed(fifth)
        fifth = await a_try(relay_a, key)
    assert fifth.earlier is not None
    assert (fifth.earlier.turn_id, len(fifth.earlier.before)) == ("turn-29", 19)


# ── leases ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_lease_that_ran_out_is_taken_over_and_the_old_try_is_fenced(
    relay_a: Idempotency, hasty: Idempotency, key: str
) -> None:
    dead = await a_try(hasty, key)
    await hasty.opening(dead, "s", "turn-1")
    assert await is_running(relay_a, key)
    with pytest.raises(IdempotencyKeyReused):
        await relay_a.begin("u", key, OTHER_HASH)
    await asyncio.sleep(SHORT_SECONDS * 1.5)
    with pytest.raises(IdempotencyKeyReused):
        await relay_a.begin("u", key, OTHER_HASH)
    taken = await a_try(relay_a, key)
    assert taken.earlier == Earlier("s", "turn-1")
    assert taken.token != dead.token
    # The old one was not dead after all: it changes nothing.
    with pytest.raises(IdempotencyInProgress):
        await hasty.opening(dead, "s", "turn-x")
    await hasty.failed(dead)
    assert not await hasty.completed(dead, HEADERS, b'"of the old try"')
    assert await is_running(relay_a, key)
    assert await relay_a.completed(taken, HEADERS, MESSAGE)
    assert not await hasty.completed(dead, HEADERS, b'"of the old try"')
    assert await hasty.begin("u", key, HASH) == Replay(HEADERS, MESSAGE)


async def test_a_lease_is_renewed_while_it_is_kept(relay_a: Idempotency, hasty: Idempotency, key: str) -> None:
    running = await a_try(hasty, key)
    async with hasty.kept(running):
        await asyncio.sleep(SHORT_SECONDS * 4)
        assert await is_running(relay_a, key)
        assert await hasty.completed(running, HEADERS, MESSAGE)
        await asyncio.sleep(SHORT_SECONDS)
    assert await relay_a.begin("u", key, HASH) == Replay(HEADERS, MESSAGE)


async def test_a_lease_is_no_longer_renewed_afterwards(relay_a: Idempotency, hasty: Idempotency, key: str) -> None:
    running = await a_try(hasty, key)
    with suppress(LookupError):
        async with hasty.kept(running):
            await asyncio.sleep(SHORT_SECONDS)
            raise LookupError
    await asyncio.sleep(SHORT_SECONDS * 1.5)
    assert isinstance(await relay_a.begin("u", key, HASH), Try)


async def test_a_lease_that_ran_out_goes_on_when_nobody_took_over(
    relay_a: Idempotency, hasty: Idempotency, key: str
) -> None:
    running = await a_try(hasty, key)
    await asyncio.sleep(SHORT_SECONDS * 1.5)
    await hasty.opening(running, "s", "turn-1")
    assert await is_running(relay_a, key)
    await asyncio.sleep(SHORT_SECONDS * 1.5)
    assert await hasty.completed(running, HEADERS, MESSAGE)
    assert await relay_a.begin("u", key, HASH) == Replay(HEADERS, MESSAGE)


async def test_renewing_stops_when_the_key_was_taken_over(relay_a: Idempotency, hasty: Idempotency, key: str) -> None:
    running = await a_try(hasty, key)
    await asyncio.sleep(SHORT_SECONDS * 1.5)
    taken = await a_try(relay_a, key)
    async with hasty.kept(running):
        await asyncio.sleep(SHORT_SECONDS * 2)
    assert await relay_a.completed(taken, HEADERS, MESSAGE)


# ── at once ─────────────────────────────────────────────────────────────────────────────────────


async def one_of(databases: list[Database], key: str, lease_seconds: float = 30) -> Try:
    """The one try that twenty callers on two pools get; the others hear that it runs."""
    relays = [Idempotency(database, lease_seconds=lease_seconds) for database in databases]
    calls = [relays[number % 2].begin("u", key, HASH) for number in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    [won] = [each for each in results if isinstance(each, Try)]
    assert sum(isinstance(each, IdempotencyInProgress) for each in results) == 19
    return won


async def test_of_twenty_at_once_one_runs(databases: list[Database], key: str) -> None:
    relay = Idempotency(databases[0])
    first = await one_of(databases, key)
    await relay.opening(first, "s", "turn-1")
    await relay.failed(first)
    second = await one_of(databases, key, SHORT_SECONDS)
    assert second.earlier == Earlier("s", "turn-1")
    await asyncio.sleep(SHORT_SECONDS * 1.5)
    third = await one_of(databases, key)
    assert await relay.completed(third, HEADERS, MESSAGE)
    replays = await asyncio.gather(*(Idempotency(databases[n % 2]).begin("u", key, HASH) for n in range(20)))
    assert replays == [Replay(HEADERS, MESSAGE)] * 20


async def test_tries_that_fail_under_a_crowd_never_overlap(databases: list[Database], key: str) -> None:
    relays = [Idempotency(database) for database in databases]
    running, tries = 0, 0

    async def caller(number: int) -> None:
        nonlocal running, tries
        records = relays[number % 2]
        for _ in range(15):
            try:
                held = await records.begin("u", key, HASH)
            except IdempotencyInProgress:
                continue
            assert isinstance(held, Try)
            running, tries = running + 1, tries + 1
            assert running == 1
            await asyncio.sleep(0.001)
            running -= 1
            await records.failed(held)

    await asyncio.gather(*(caller(number) for number in range(12)))
    assert tries > 10


# ── after a day ─────────────────────────────────────────────────────────────────────────────────


async def age(sql: Any, key: str, hours: float) -> None:
    await sql.execute(
        "UPDATE dev.relay_idempotency SET created_at = created_at - make_interval(secs => $2::float8) WHERE key = $1",
        key,
        hours * 3600,
    )


async def test_after_a_day_a_key_is_new(relay_a: Idempotency, sql: Any, key: str) -> None:
    first = await a_try(relay_a, key)
    await relay_a.opening(first, "s", "turn-1")
    assert await relay_a.completed(first, HEADERS, MESSAGE)
    await age(sql, key, 23.9)
    assert await relay_a.begin("u", key, HASH) == Replay(HEADERS, MESSAGE)
    await age(sql, key, 0.2)
    again = await a_try(relay_a, key, OTHER_HASH)
    assert again.earlier is None
    with pytest.raises(IdempotencyKeyReused):
        await relay_a.begin("u", key, HASH)
    assert await relay_a.completed(again, HEADERS, b"{}")
    assert await relay_a.begin("u", key, OTHER_HASH) == Replay(HEADERS, b"{}")


async def test_a_try_in_place_of_another_begins_the_day_anew(relay_a: Idempotency, sql: Any, key: str) -> None:
    await relay_a.failed(await a_try(relay_a, key))
    await age(sql, key, 23.9)
    assert await relay_a.completed(await a_try(relay_a, key), HEADERS, MESSAGE)
    await age(sql, key, 23.9)
    assert await relay_a.begin("u", key, HASH) == Replay(HEADERS, MESSAGE)


async def test_a_try_that_runs_outlives_the_day(relay_a: Idempotency, sql: Any, key: str) -> None:
    running = await a_try(relay_a, key)
    await age(sql, key, 25)
    assert await is_running(relay_a, key)
    assert await is_running(relay_a, key, OTHER_HASH)
    assert await relay_a.sweep() == 0
    assert await relay_a.completed(running, HEADERS, MESSAGE)
    assert await relay_a.sweep() == 1


async def test_sweeping(databases: list[Database], relay_a: Idempotency, sql: Any, key: str) -> None:
    """More than a batch, by two relays at once, past a row that somebody holds."""
    await sql.execute(
        "INSERT INTO dev.relay_idempotency"
        " (user_id, key, request_hash, status, token, lease_expires_at, created_at, answer)"
        " SELECT 'swept', $1 || n, '', CASE n % 2 WHEN 0 THEN 'failed' ELSE 'completed' END, '', now(),"
        " now() - interval '24 hours 1 second', CASE n % 2 WHEN 0 THEN NULL ELSE '{}'::bytea END"
        " FROM generate_series(1, 500) AS n",
        key,
    )
    kept = await a_try(relay_a, key)
    async with sql.transaction():
        await sql.execute("SELECT FROM dev.relay_idempotency WHERE key = $1 FOR UPDATE", f"{key}7")
        assert sum(await asyncio.gather(*(Idempotency(each).sweep() for each in databases))) == 499
    assert await relay_a.sweep() == 1
    assert await relay_a.sweep() == 0
    assert await relay_a.completed(kept, HEADERS, MESSAGE)


# ── the database away ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def data_dir(scratch: Path) -> Iterator[Path]:
    """A Postgres of this test alone, to be stopped."""
    path = scratch / "idempotency"
    migrate(embedded_postgres.start(path))
    yield path
    embedded_postgres.start(path)
    embedded_postgres.stop(path)


async def test_the_database_away(data_dir: Path, key: str) -> None:
    """Nothing runs without its record; what was answered is found by its turn, once the lease has run out."""
    database = Database(embedded_postgres.url(data_dir), schema="dev", timeout_seconds=1, connect_timeout_seconds=1)
    await database.open()
    records = Idempotency(database, lease_seconds=SHORT_SECONDS)
    answered = await a_try(records, key)
    await records.opening(answered, "s", "turn-1")
    running = await a_try(records, f"{key}-2")
    patient = Idempotency(database)
    given_up = await a_try(patient, f"{key}-3")
    async with records.kept(running):
        await asyncio.to_thread(embedded_postgres.stop, data_dir)
        try:
            with pytest.raises(DatabaseUnavailable):
                await records.begin("u", key, HASH)
            with pytest.raises(DatabaseUnavailable):
                await records.opening(answered, "s", "turn-2")
            with pytest.raises(DatabaseUnavailable):
                await records.sweep()
            assert not await records.completed(answered, HEADERS, MESSAGE)
            await records.failed(answered)
            await patient.failed(given_up)
            with pytest.raises(DatabaseUnavailable):
                await patient.begin("u", f"{key}-4", HASH)
        finally:
            await asyncio.to_thread(embedded_postgres.start, data_dir)
        await asyncio.sleep(1)
        assert await is_running(records, f"{key}-2")  # its lease was renewed again
        assert (await a_try(records, key)).earlier == Earlier("s", "turn-1")
        assert await records.completed(running, HEADERS, MESSAGE)
    async with asyncio.timeout(15):  # what was given up meanwhile is free long before its lease is over
        while await is_running(patient, f"{key}-3"):
            await asyncio.sleep(0.05)
    assert isinstance(await patient.begin("u", f"{key}-4", HASH), Try)
    await database.close()


# ── keys and hashes ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", ["a", "!~", "x" * 255, '"quoted"', "8e03978e-40d5-43dd-bc93-6894a57f9324"])
def test_a_header_that_is_a_key(key: str) -> None:
    assert header_of({"idempotency-key": key}) == key
    assert header_of({"x-api-key": key}) is None


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", " a", "a\n", "a\t", "é", "\x7f", "1, 2"])
def test_a_header_that_is_no_key(key: str) -> None:
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        header_of({"idempotency-key": key})


texts = st.text(st.characters(exclude_categories=()), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
bodies = st.dictionaries(texts, json_values, max_size=4)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(value)}
    return [reordered(each) for each in value] if isinstance(value, list) else value


@given(bodies, st.text(max_size=5))
def test_the_order_of_object_keys_does_not_count(body: dict[str, Any], session: str) -> None:
    assert request_hash(reordered(body), session) == request_hash(body, session)


@pytest.mark.parametrize(
    ("body", "session"),
    [
        ({"a": [1, 2]}, "t"),
        ({"a": [2, 1]}, "s"),
        ({"a": [1, True]}, "s"),
        ({"a": ["1", 2]}, "s"),
        ({"a": [1, 2], "b": None}, "s"),
        ({"A": [1, 2]}, "s"),
    ],
)
def test_what_does_count(body: dict[str, Any], session: str) -> None:
    assert request_hash(body, session) != request_hash({"a": [1, 2]}, "s")
