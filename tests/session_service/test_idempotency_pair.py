"""Idempotency-Key across two processes on one database, over time, and through a kill."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx
import pytest
import pytest_asyncio

from shared.http_client import http_client
from tests.processes import free_port, start_session_service
from tests.session_service.calls import Db, Turn, User, fine, new_user_id, refused, said
from tests.session_service.creations import GROWS, KINDS, Request, a_chat, answered, grown, owner, rows

WAIT_SECONDS = 5.0


@asynccontextmanager
async def client_at(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(read_seconds=30, connect_seconds=30) as client:
        client.base_url = httpx.URL(f"{url}/api/v1/")
        yield client


@dataclass(frozen=True)
class Pair:
    """Clients of two services on one database, and a connection to that."""

    one: httpx.AsyncClient
    two: httpx.AsyncClient
    db: Db


@pytest.fixture(scope="module")
def urls(make_database: Callable[[], str], scratch: Path) -> Iterator[list[str]]:
    """The database, then the two services; the second one sweeps all the time."""
    database = make_database()
    with ExitStack() as stack:
        first = stack.enter_context(start_session_service(database, scratch, free_port(), wait=False))
        second = stack.enter_context(
            start_session_service(database, scratch, free_port(), SWEEP_INTERVAL_SECONDS="0.1")
        )
        first.wait_until("/health/ready")
        yield [database, first.url, second.url]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(urls: list[str]) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(client_at(url)) for url in urls[1:]]
        db = await asyncpg.connect(urls[0])
        stack.push_async_callback(db.close)
        yield Pair(one, two, db)


@pytest.mark.parametrize("kind", KINDS)
async def test_twenty_at_once_through_two_services(pair: Pair, kind: str) -> None:
    chat = await a_chat(pair.one)
    request = await KINDS[kind](chat.user, chat)
    before = await rows(pair.db, owner(request))
    answers = await asyncio.gather(*(request.send(http, "key-1") for _ in range(10) for http in (pair.one, pair.two)))
    bodies = [fine(answer) for answer in answers]
    assert all(body == bodies[0] for body in bodies)
    assert [answer.headers.get("idempotent-replayed") for answer in answers].count(None) == 1
    assert grown(before, await rows(pair.db, owner(request))) == GROWS[kind]
    refused(await request.other().send(pair.two, "key-1"), 422, "idempotency_key_reused")


async def test_twenty_wait_for_a_busy_session(pair: Pair) -> None:
    chat = await a_chat(pair.one)
    held = await chat.open(said("q"))
    body = {"messages": [said("next")], "wait_seconds": 4}
    request = Request(f"/sessions/{chat.id}/turns", chat.user.params, {"json": body})
    before = await rows(pair.db, chat.user.id)
    waiting = [asyncio.create_task(request.send(http, "k")) for _ in range(10) for http in (pair.one, pair.two)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in waiting)
    fine(await held.finish(said("a", "assistant")))
    answers = await asyncio.gather(*waiting)
    bodies = [fine(answer) for answer in answers]
    assert all(body == bodies[0] for body in bodies)
    assert [answer.headers.get("idempotent-replayed") for answer in answers].count(None) == 1
    assert grown(before, await rows(pair.db, chat.user.id)) == (0, 2, 1, 0)  # with the answer "a"
    done = await Turn(chat, bodies[0]).complete(said("b", "assistant"))
    assert done["session"]["message_count"] == 5


async def test_different_bodies_at_once(pair: Pair) -> None:
    """Of two bodies under one key one is stored; the other is told so."""
    chat = await a_chat(pair.one)
    path = f"/sessions/{chat.id}/messages"
    requests = [Request(path, chat.user.params, {"json": said(f"body {n}")}) for n in range(10)]
    pairs = [(request, http) for request in requests for http in (pair.one, pair.two)]
    answers = await asyncio.gather(*(request.send(http, "k") for request, http in pairs))
    won = {fine(answer)["content"] for answer in answers if answer.status_code == 200}
    assert len(won) == 1
    for answer in answers:
        if answer.status_code != 200:
            refused(answer, 422, "idempotency_key_reused")
    assert [answer.status_code for answer in answers].count(200) == 2
    assert await chat.contents() == ["first", *won]


async def test_five_seconds_are_the_longest_wait(pair: Pair, urls: list[str]) -> None:
    """The first is held up by a lock on its session's row; those behind it, here and in the other process, give up."""
    chat = await a_chat(pair.one)
    request = Request(f"/sessions/{chat.id}/messages", chat.user.params, {"json": said("x")})
    blocker = await asyncpg.connect(urls[0])
    try:
        async with blocker.transaction():
            await blocker.execute("SELECT 1 FROM dev.sessions WHERE user_id = $1 FOR UPDATE", chat.user.id)
            first = asyncio.create_task(request.send(pair.one, "k"))
            await asyncio.sleep(0.2)
            began = time.monotonic()
            late = await asyncio.gather(*(request.send(http, "k") for http in (pair.one, pair.two)))
            waited = time.monotonic() - began
            assert not first.done()
    finally:
        await blocker.close()
    for answer in late:
        refused(answer, 409, "idempotency_in_progress")
        assert int(answer.headers["retry-after"]) >= 1
    assert WAIT_SECONDS - 0.5 < waited < WAIT_SECONDS + 1.5
    stored = answered(await first, replayed=False)
    for http in (pair.one, pair.two):
        assert answered(await request.send(http, "k"), replayed=True) == stored
    assert await chat.contents() == ["first", "x"]


async def test_a_first_one_that_fails_lets_the_next_try(pair: Pair) -> None:
    """All ask for a session that is not there yet; from when it is, one of them stores the message."""
    user = User(pair.one, new_user_id())
    request = Request("/sessions/later/messages", user.params, {"json": said("x")})
    tasks = [asyncio.create_task(request.send(http, "k")) for _ in range(10) for http in (pair.one, pair.two)]
    await user.create(session_id="later")
    answers = await asyncio.gather(*tasks, request.send(pair.one, "k"))
    found = [fine(answer) for answer in answers if answer.status_code == 200]
    for answer in answers:
        if answer.status_code != 200:
            refused(answer, 404, "session_not_found")
    assert all(body == found[0] for body in found)
    assert await rows(pair.db, user.id) == (1, 1, 0, 0)


@pytest.mark.parametrize("kind", ["session", "message", "turn making its session", "import"])
async def test_a_key_is_kept_for_a_day(pair: Pair, kind: str) -> None:
    chat = await a_chat(pair.one)
    request = await KINDS[kind](chat.user, chat)
    user_id = owner(request)
    first = answered(await request.send(pair.one, "k"), replayed=False)
    age = "UPDATE dev.idempotency_records SET created_at = created_at - $2::interval WHERE user_id = $1"
    await pair.db.execute(age.replace("$2::interval", "interval '23 hours 59 minutes'"), user_id)
    await asyncio.sleep(0.3)  # the second service sweeps meanwhile
    for http in (pair.one, pair.two):
        assert answered(await request.send(http, "k"), replayed=True) == first
    await pair.db.execute(age.replace("$2::interval", "interval '1 minute'"), user_id)
    again = await request.send(pair.two, "k")
    if kind in {"session", "message"}:
        second = answered(again, replayed=False)
        assert second != first
        for http in (pair.one, pair.two):
            assert answered(await request.send(http, "k"), replayed=True) == second
        other = answered(await request.other().send(pair.one, "k-2"), replayed=False)
        assert other != second
    else:
        refused(again, 409, "session_exists")
    await pair.db.execute(age.replace("$2::interval", "interval '25 hours'"), user_id)
    deadline = time.monotonic() + 5
    while await pair.db.fetchval("SELECT count(*) FROM dev.idempotency_records WHERE user_id = $1", user_id):
        assert time.monotonic() < deadline, "the sweeper leaves old records"
        await asyncio.sleep(0.05)


async def test_a_day_old_key_may_come_with_another_body(pair: Pair) -> None:
    chat = await a_chat(pair.one)
    request = Request(f"/sessions/{chat.id}/messages", chat.user.params, {"json": said("old")})
    answered(await request.send(pair.one, "k"), replayed=False)
    # Aged and asked for in one go: most often the sweeper has not been there.
    await pair.db.execute(
        "UPDATE dev.idempotency_records SET created_at = created_at - interval '24 hours' WHERE user_id = $1",
        chat.user.id,
    )
    other = Request(request.path, request.params, {"json": said("new")})
    answers = await asyncio.gather(*(other.send(http, "k") for _ in range(5) for http in (pair.one, pair.two)))
    assert [answer.headers.get("idempotent-replayed") for answer in answers].count(None) == 1
    assert {fine(answer)["seq"] for answer in answers} == {3}
    assert await chat.contents() == ["first", "old", "new"]


# ── a kill ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_kill_in_the_middle_of_two_hundred(own_database: str, scratch: Path) -> None:
    """A record commits with its write: after the restart every call sent again makes exactly what is missing."""
    port, user_id = free_port(), new_user_id()
    acknowledged: dict[str, object] = {}
    chance = random.Random(3)

    def request_of(number: int) -> Request:
        if number % 2:
            return Request("/sessions", {}, {"json": {"user_id": user_id, "title": str(number)}})
        return Request(f"/sessions/s{number % 10}/messages", {"user_id": user_id}, {"json": said(f"m{number}")})

    async def send(http: httpx.AsyncClient, number: int) -> None:
        await asyncio.sleep(chance.random() * 0.4)
        try:
            acknowledged[str(number)] = fine(await request_of(number).send(http, f"key-{number}"))
        except httpx.HTTPError:
            return
        if len(acknowledged) == 80:  # here, so that no slow moment lets all of them through before
            service.popen.kill()

    with start_session_service(own_database, scratch, port) as service:
        async with client_at(service.url) as http:
            user = User(http, user_id)
            for number in range(0, 10, 2):
                await user.create(session_id=f"s{number}")
            await asyncio.gather(*(send(http, number) for number in range(200)))
            service.kill()
    assert 80 <= len(acknowledged) < 200
    db = await asyncpg.connect(own_database)
    try:
        written = (await rows(db, user_id))[:2]
        records = await db.fetchval("SELECT count(*) FROM dev.idempotency_records WHERE answer IS NOT NULL")
        assert sum(written) - 5 == records == await db.fetchval("SELECT count(*) FROM dev.idempotency_records")
        with start_session_service(own_database, scratch, port) as service:
            async with client_at(service.url) as http:
                answers = await asyncio.gather(*(request_of(n).send(http, f"key-{n}") for n in range(200)))
                replayed = {str(n) for n, each in enumerate(answers) if "idempotent-replayed" in each.headers}
                assert replayed >= set(acknowledged)
                assert len(replayed) == records
                for number, answer in enumerate(answers):
                    assert fine(answer) == acknowledged.get(str(number), answer.json())
                again = await asyncio.gather(*(request_of(n).send(http, f"key-{n}") for n in range(200)))
                assert [each.json() for each in again] == [each.json() for each in answers]
        assert (await rows(db, user_id))[:2] == (105, 100)
        titles = await db.fetch("SELECT title FROM dev.sessions WHERE title IS NOT NULL")
        assert sorted(int(row[0]) for row in titles) == list(range(1, 200, 2))
        contents = await db.fetch("SELECT content FROM dev.session_messages")
        assert sorted(int(row[0][1:]) for row in contents) == list(range(0, 200, 2))
    finally:
        await db.close()
