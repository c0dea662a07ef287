"""The limits of API keys: each by itself, kept to by two relays at once, and given back by those that are gone."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.processes import Process, ServiceProcess
from tests.relay.calls import Json, error_of, start_relay, upstream_settings
from tests.relay.key_calls import PATH, Admin, open_db, open_http, seconds_until, use_row
from tests.session_service.calls import Db
from tests.upstream.client import TestUpstream

MODEL = "claude-sonnet-4-5"
LONG = "word " * 60
DAY_SECONDS = 86_400
LEASE_SECONDS = 30


@pytest.fixture(scope="module")
def other_relay(
    database_url: str, session_service: ServiceProcess, upstream_process: TestUpstream, data_dir: Path
) -> Iterator[Process]:
    """A second relay on the database of the shared one."""
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


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def db(database_url: str) -> AsyncIterator[Db]:
    async with open_db(database_url) as db:
        yield db


def limited(answer: httpx.Response, limit: str, *, at_least: float = 1, at_most: float) -> int:
    """The seconds of a refusal that names this limit."""
    assert error_of(answer, 429, "rate_limit_error") == f"The API key has reached its {limit}"
    seconds = int(answer.headers["retry-after"])
    assert at_least <= seconds <= at_most
    assert "x-turn-id" not in answer.headers
    return seconds


def seconds_of_today() -> float:
    """What is left of the day, in UTC."""
    now = datetime.now(UTC)
    return DAY_SECONDS - (now.hour * 3600 + now.minute * 60 + now.second)


def asked(upstream: TestUpstream) -> int:
    return len(upstream.requests(PATH))


async def set_use(db: Db, key_id: str, change: str) -> None:
    """As if time had passed, or the key had been used before."""
    assert await db.execute(f"UPDATE dev.relay_key_use SET {change} WHERE key_id = $1", key_id) == "UPDATE 1"


async def nothing_reserved(db: Db, key_id: str) -> bool:
    row = await use_row(db, key_id)
    left = await db.fetchval("SELECT count(*) FROM dev.relay_key_reservations WHERE key_id = $1", key_id)
    return (row["in_flight"], row["reserved_tokens"], row["reserved_cost"], left) == (0, 0, 0, 0)


# ── each limit by itself ────────────────────────────────────────────────────────────────────────

USAGE = {"input_tokens": 100, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 30, "output_tokens": 50}
ALONE: list[tuple[str, Json, int, float]] = [
    ("rateLimitRequests", {"rateLimitWindow": 3, "rateLimitRequests": 2}, 2, 180),
    ("tokenLimit", {"tokenLimit": 201}, 2, DAY_SECONDS),
    ("tokenLimit", {"tokenLimit": 200}, 1, DAY_SECONDS),
    ("tokenLimit", {"tokenLimit": 201, "rateLimitWindow": 3}, 2, 180),
    ("tokenLimit", {"tokenLimit": 1}, 1, DAY_SECONDS),
    ("dailyCostLimit", {"dailyCostLimit": 0.0012}, 2, DAY_SECONDS),
    ("dailyCostLimit", {"dailyCostLimit": 0.000001}, 1, DAY_SECONDS),
    ("totalCostLimit", {"totalCostLimit": 0.0012}, 2, DAY_SECONDS),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("limit", "fields", "served", "seconds"), ALONE)
async def test_a_limit_by_itself(
    admin: Admin, upstream: TestUpstream, sessions: httpx.AsyncClient, db: Db,
    limit: str, fields: Json, served: int, seconds: float, stream: bool,
) -> None:  # fmt: skip
    """So many are served; the next is refused at either relay, is not stored, counted or asked upstream."""
    upstream.script({"usage": USAGE, "repeat": -1})  # 200 tokens, $ 0.0011685
    key = await admin.make(**fields)
    for _ in range(served):
        answer = await (key.stream_whole if stream else key.ask)(model=MODEL)
        assert answer.status_code == 200, answer.text
    before, row = await admin.key(key.id), await use_row(db, key.id)
    session = f"s-{uuid.uuid4().hex[:8]}"
    if limit == "dailyCostLimit":
        seconds = seconds_of_today() + 1
    for _ in range(2):
        if stream:
            refused = await key.stream_whole(session=session, model=MODEL)
        else:
            refused = await key.ask(session=session, model=MODEL)
        limited(refused, limit, at_least=seconds - 30, at_most=seconds)
    assert "x-session-id" not in refused.headers
    stored = await sessions.get(f"/sessions/{session}", params={"user_id": key.id})
    assert stored.status_code == 404
    assert asked(upstream) == served
    assert await admin.key(key.id) == before
    assert await use_row(db, key.id) == row
    assert before["usage"]["requests"] == served
    # What asks no model is not limited.
    for path in ("/v1/models", f"/sessions/{session}"):
        assert (await key.http.get(path, headers={"x-api-key": key.secret})).status_code in {200, 404}
    # A limit that is taken away is gone at once.
    await admin.change(key.id, **dict.fromkeys(fields))
    assert (await key.ask(model=MODEL)).status_code == 200


async def test_the_limit_holds_at_another_relay(admin: Admin, https: list[httpx.AsyncClient]) -> None:
    key = await admin.make(rateLimitWindow=5, rateLimitRequests=3)
    statuses = [(await key.at(https[number % 2]).ask()).status_code for number in range(4)]
    assert statuses == [200, 200, 200, 429]


async def test_the_limit_of_running_requests(
    admin: Admin, https: list[httpx.AsyncClient], upstream: TestUpstream, sessions: httpx.AsyncClient
) -> None:
    """It counts those of all relays, plain ones too; as soon as one has ended another is let in."""
    upstream.script({"text": LONG, "event_delay_ms": 5000, "match": {"contains": "slow"}, "repeat": -1})
    key = await admin.make(concurrencyLimit=2)
    running = [asyncio.create_task(key.at(http).leave("slow", model=MODEL)) for http in https]
    await upstream.until(lambda state: state["running"] == 2)
    session = f"s-{uuid.uuid4().hex[:8]}"
    there = [key.at(http) for http in https]
    refused = [ask(session=session) for each in there for ask in (each.ask, each.stream_whole)]
    for answer in await asyncio.gather(*refused):
        limited(answer, "concurrencyLimit", at_most=1)
    stored = await sessions.get(f"/sessions/{session}", params={"user_id": key.id})
    assert stored.status_code == 404
    assert asked(upstream) == 2
    assert (await admin.key(key.id))["usage"]["inFlight"] == 2
    running[1].cancel()
    await upstream.until(lambda state: state["running"] == 1)

    async def is_served() -> bool:
        return (await key.ask()).status_code == 200

    await seconds_until(is_served, between=0.1)
    upstream.reset()
    await asyncio.gather(*running, return_exceptions=True)


@pytest.mark.parametrize("nothing", [0, None])
async def test_no_limit(admin: Admin, db: Db, nothing: int | None) -> None:
    """0 and null mean none, also when they were written by hand."""
    names = ("tokenLimit", "concurrencyLimit", "rateLimitWindow", "rateLimitRequests", "dailyCostLimit")
    key = await admin.make(**dict.fromkeys((*names, "totalCostLimit"), nothing))
    columns = ("token_limit", "concurrency_limit", "rate_limit_window", "rate_limit_requests", "daily_cost_limit")
    given = ", ".join(f"{name} = {'NULL' if nothing is None else 0}" for name in (*columns, "total_cost_limit"))
    await db.execute(f"UPDATE dev.relay_api_keys SET {given} WHERE id = $1", key.id)
    assert [(await key.ask(model=MODEL)).status_code for _ in range(3)] == [200] * 3
    await db.execute(
        "UPDATE dev.relay_api_keys SET rate_limit_requests = 1, token_limit = 10 ^ 9 WHERE id = $1", key.id
    )
    assert [(await key.ask(model=MODEL)).status_code for _ in range(3)] == [200] * 3


async def test_the_database_takes_no_negative_limit(admin: Admin, db: Db) -> None:
    key = await admin.make()
    columns = ("token_limit", "concurrency_limit", "rate_limit_window", "rate_limit_requests", "daily_cost_limit")
    for column in (*columns, "total_cost_limit"):
        with pytest.raises(asyncpg.CheckViolationError):
            await db.execute(f"UPDATE dev.relay_api_keys SET {column} = -1 WHERE id = $1", key.id)


# ── windows and days ────────────────────────────────────────────────────────────────────────────


async def test_a_window_ends(admin: Admin, db: Db, upstream: TestUpstream) -> None:
    """It begins with its first request; refused ones neither count in it nor make it longer."""
    upstream.script({"usage": USAGE, "repeat": -1})
    key = await admin.make(rateLimitWindow=1, rateLimitRequests=2)
    moved = "window_started_at = window_started_at - interval '{} s'"
    for number in range(4):
        if number == 2:
            await admin.change(key.id, rateLimitRequests=None, tokenLimit=300)
        assert [(await key.ask()).status_code for _ in range(2)] == [200, 200]
        await set_use(db, key.id, moved.format(39.6))
        seconds = limited(await key.ask(), "rateLimitRequests" if number < 2 else "tokenLimit", at_most=21)
        await set_use(db, key.id, moved.format(seconds))  # it is worth coming back then, and not a moment later
    assert (await admin.used(key.id))[:2] == (8, 8 * 200)


async def test_without_a_window_tokens_count_in_all(admin: Admin, db: Db, upstream: TestUpstream) -> None:
    """All classes of them, also those of other days; with a window only its own."""
    upstream.script({"usage": USAGE, "repeat": -1})
    key = await admin.make(tokenLimit=1000)
    assert (await key.ask()).status_code == 200
    await set_use(db, key.id, "day = day - 1, window_started_at = window_started_at - interval '1 day', tokens = 1000")
    limited(await key.ask(), "tokenLimit", at_least=DAY_SECONDS, at_most=DAY_SECONDS)
    await admin.change(key.id, rateLimitWindow=1)
    assert (await key.ask()).status_code == 200
    await set_use(db, key.id, "window_tokens = 1000")
    limited(await key.ask(), "tokenLimit", at_most=60)
    await admin.change(key.id, tokenLimit=1001)
    assert (await key.ask()).status_code == 200


async def test_a_new_day(admin: Admin, db: Db, upstream: TestUpstream) -> None:
    """What was used yesterday no longer counts today, and still counts in all."""
    upstream.script({"usage": USAGE, "repeat": -1})
    key = await admin.make(dailyCostLimit=0.001)
    assert (await key.ask(model=MODEL)).status_code == 200
    cost = (await admin.used(key.id))[2]
    assert cost > 0.001
    limited(await key.ask(model=MODEL), "dailyCostLimit", at_most=seconds_of_today() + 1)
    await set_use(db, key.id, "day = day - 1")
    usage = (await admin.key(key.id))["usage"]
    assert usage["today"] == {"requests": 0, "tokens": 0, "cost": 0}
    assert usage["total"] == {"requests": 1, "tokens": 200, "cost": cost}
    assert (await key.ask(model=MODEL)).status_code == 200
    usage = (await admin.key(key.id))["usage"]
    assert usage["today"] == {"requests": 1, "tokens": 200, "cost": cost}
    assert usage["total"] == {"requests": 2, "tokens": 400, "cost": 2 * cost}
    limited(await key.ask(model=MODEL), "dailyCostLimit", at_most=seconds_of_today() + 1)
    await admin.change(key.id, dailyCostLimit=None, totalCostLimit=2 * cost)
    await set_use(db, key.id, "day = day - 1")
    limited(await key.ask(model=MODEL), "totalCostLimit", at_least=DAY_SECONDS, at_most=DAY_SECONDS)


async def test_what_is_only_reserved_is_worth_waiting_for(admin: Admin, upstream: TestUpstream) -> None:
    """A limit that those in flight may reach is not told as one that is reached for the day, or for good."""
    upstream.script({"text": LONG, "event_delay_ms": 5000, "match": {"contains": "slow"}, "repeat": -1})
    for number, (limit, value) in enumerate((("dailyCostLimit", 0.01), ("totalCostLimit", 0.01), ("tokenLimit", 3000))):
        key = await admin.make(**{limit: value})
        running = asyncio.create_task(key.leave("slow", model=MODEL, max_tokens=4000))
        await upstream.until(lambda state: state["running"] == 1)
        for _ in range(2):
            limited(await key.ask(model=MODEL), limit, at_most=5)
        assert asked(upstream) == number + 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await upstream.until(lambda state: state["running"] == 0)


async def test_whatever_asks_a_model_is_limited_and_counted(admin: Admin, upstream: TestUpstream) -> None:
    """The chat, and a summary on demand."""
    upstream.script({"usage": USAGE, "repeat": -1})
    key = await admin.make(rateLimitWindow=5, rateLimitRequests=3)
    session = f"s-{uuid.uuid4().hex[:8]}"
    said = {"message": "Hello", "conversation_id": session, "model": MODEL}
    calls = [("/api/chat", said), ("/api/chat/stream", said), (f"/sessions/{session}/summarize", {"model": MODEL})]
    for path, content in calls:
        answer = await key.http.post(path, json=content, headers={"x-api-key": key.secret})
        assert answer.status_code == 200, answer.text
    before = await admin.used(key.id)
    assert before[:2] == (3, 600)
    assert before[2] > 0.003
    for path, content in calls:
        answer = await key.http.post(path, json=content, headers={"x-api-key": key.secret})
        limited(answer, "rateLimitRequests", at_most=300)
    assert await admin.used(key.id) == before
    assert asked(upstream) == 3


# ── what is neither limited nor counted ─────────────────────────────────────────────────────────


async def test_counting_tokens_is_neither_limited_nor_counted(admin: Admin, upstream: TestUpstream) -> None:
    key = await admin.make(rateLimitWindow=1, rateLimitRequests=1, tokenLimit=1, dailyCostLimit=0.000001)
    counted = f"{PATH}/count_tokens"
    for _ in range(3):
        assert (await key.ask(path=counted, model=MODEL)).json()["input_tokens"] > 0
    told = await admin.key(key.id)
    assert (told["usage"]["requests"], told["lastUsedAt"]) == (0, None)
    assert (await key.ask(model=MODEL)).status_code == 200
    before = await admin.key(key.id)
    assert (await key.ask(model=MODEL)).status_code == 429
    for _ in range(3):
        assert (await key.ask(path=counted, model=MODEL)).status_code == 200
    assert await admin.key(key.id) == before


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_given_again_is_neither_limited_nor_counted(
    admin: Admin, upstream: TestUpstream, stream: bool
) -> None:
    key = await admin.make(rateLimitWindow=1, rateLimitRequests=1)
    again = {"idempotency-key": uuid.uuid4().hex}
    first = await key.ask(model=MODEL, headers=again)
    assert first.status_code == 200
    before = await admin.key(key.id)
    assert before["usage"]["cost"] > 0
    limited(await key.ask(model=MODEL), "rateLimitRequests", at_most=60)
    for _ in range(3):
        answer = await key.ask(model=MODEL, headers=again, stream=stream)
        assert answer.status_code == 200, answer.text
        assert answer.headers["idempotent-replayed"] == "true"
    assert asked(upstream) == 1
    assert await admin.key(key.id) == before


# ── one after the other ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("session", [None, "the same"])
async def test_one_after_the_other_never_meet(
    admin: Admin, https: list[httpx.AsyncClient], upstream: TestUpstream, db: Db, session: str | None
) -> None:
    """With one at a time allowed, a client that waits for its answers is never refused, however they end."""
    key = await admin.make(concurrencyLimit=1)
    cut = {"text": LONG, "cut_after_events": 6, "match": {"model": "cut"}, "repeat": -1}
    bad = {"status": 400, "match": {"model": "bad"}, "repeat": -1}
    upstream.script(cut, bad, {"text": LONG, "repeat": -1})
    statuses = []
    for number in range(10):
        caller = key.at(https[number % 2])
        statuses.append((await caller.ask(session=session)).status_code)
        statuses.append((await caller.stream_whole(session=session)).status_code)
        statuses.append((await caller.stream_whole(model="cut", session=session)).status_code)
        statuses.append((await caller.ask(model="bad", session=session)).status_code)
        statuses.append((await caller.ask(session=session, messages=[])).status_code)
    assert statuses == [200, 200, 200, 400, 400] * 10
    assert await nothing_reserved(db, key.id)


async def test_a_client_that_hangs_up_is_not_in_its_own_way(admin: Admin, upstream: TestUpstream, db: Db) -> None:
    """Its next request comes while the one that it left is being put away."""
    upstream.script({"text": LONG, "event_delay_ms": 2, "repeat": -1})
    key = await admin.make(concurrencyLimit=1)
    for session in (None, "hang up"):
        statuses = []
        for _ in range(5):
            statuses.append(await key.leave(session=session))
            statuses.append((await key.ask(session=session)).status_code)
        assert statuses == [200] * 10
    assert await nothing_reserved(db, key.id)
