"""Two instances on one database: what holds for one process holds for both together."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from shared.http_client import http_client
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.session_service.calls import Chat, Db, Turn, User, check_counters, fine, new_user_id, refused, said

SETTINGS: dict[str, Any] = {"SWEEP_INTERVAL_SECONDS": "0.1"}


@pytest.fixture(scope="module")
def url(make_database: Callable[[], str]) -> str:
    return make_database()


@pytest.fixture(scope="module")
def pair(url: str, scratch: Path) -> Iterator[list[ServiceProcess]]:
    """Two services; their sweepers come by all the time."""
    one = start_session_service(url, scratch, free_port(), **SETTINGS)
    two = start_session_service(url, scratch, free_port(), **SETTINGS)
    with one as first, two as second:
        yield [first, second]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def their_db(url: str) -> AsyncIterator[Db]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def users(pair: list[ServiceProcess]) -> AsyncIterator[list[User]]:
    """One user, at each of the two."""
    user_id = new_user_id()
    async with AsyncExitStack() as stack:
        found = []
        for service in pair:
            client = await stack.enter_async_context(http_client(read_seconds=30, connect_seconds=10))
            client.base_url = httpx.URL(f"{service.url}/api/v1/")
            found.append(User(client, user_id))
        yield found


async def test_appends_through_both(users: list[User], their_db: Db) -> None:
    chat = await users[0].chat()
    chats = [chat.of(user) for user in users]
    answers = await asyncio.gather(*(chats[n % 2].append(f"m{n}", tokens_used=1) for n in range(200)))
    assert sorted(answer["seq"] for answer in answers) == list(range(1, 201))
    session = await check_counters(their_db, chat)
    assert (session["message_count"], session["total_tokens"]) == (200, 200)


async def test_the_same_message_through_both(users: list[User], their_db: Db) -> None:
    chat = await users[0].chat()
    answers = await asyncio.gather(*(chat.of(users[n % 2]).append("x", message_id="m") for n in range(20)))
    assert len({str(answer) for answer in answers}) == 1
    assert (await check_counters(their_db, chat))["message_count"] == 1


async def test_one_open_turn_for_both(users: list[User]) -> None:
    chats = [Chat(user, "wanted") for user in users]
    answers = await asyncio.gather(*(chats[n % 2].turn(said("q"), create_session={}) for n in range(40)))
    [won] = [answer for answer in answers if answer.status_code == 200]
    for answer in answers:
        if answer is not won:
            assert refused(answer, 409, "turn_in_progress")["turn_id"] == won.json()["turn_id"]
    await Turn(chats[0], won.json()).complete()


async def test_a_turn_opened_here_is_completed_there(users: list[User]) -> None:
    chat = await users[0].chat()
    turn = await chat.open(said("q"))
    there = Turn(chat.of(users[1]), turn.opened)
    fine(await there.renew())
    first = await there.complete(said("r", "assistant"))
    assert await turn.complete(said("r", "assistant")) == first


async def test_a_waiter_hears_of_a_turn_that_was_closed_elsewhere(users: list[User]) -> None:
    chat = await users[0].chat()
    turn = await chat.open(said("q"))
    waiting = asyncio.create_task(chat.of(users[1]).turn(said("w"), wait_seconds=20))
    await asyncio.sleep(0.3)
    began = time.monotonic()
    await turn.complete()
    await Turn(chat, fine(await waiting)).complete()
    assert time.monotonic() - began < 1


async def test_waiters_at_both_are_all_served_once(users: list[User], their_db: Db) -> None:
    chat = await users[0].chat()
    turn = await chat.open(said("q"))

    async def wait_and_complete(number: int) -> None:
        here = chat.of(users[number % 2])
        own = await here.open(said(f"w{number}"), wait_seconds=20)
        await own.complete(said(f"r{number}", "assistant"))

    waiting = asyncio.gather(*(wait_and_complete(number) for number in range(10)))
    await asyncio.sleep(0.3)
    await turn.complete()
    await waiting
    contents = await chat.contents()
    assert sorted(contents) == sorted(["q", *(f"{kind}{number}" for number in range(10) for kind in "wr")])
    assert all(contents[place + 1] == "r" + contents[place][1:] for place in range(1, 21, 2))
    await check_counters(their_db, chat)


async def expired_by_sweepers(pair: list[ServiceProcess], client: httpx.AsyncClient) -> float:
    ended = 0.0
    for each in pair:
        metrics = (await client.get(f"{each.url}/metrics")).text
        ended += float(metrics.split("\nsessions_expired_total ")[1].split("\n")[0])
    return ended


async def test_two_sweepers_at_once_end_each_session_once(
    pair: list[ServiceProcess], users: list[User], their_db: Db
) -> None:
    user, count = users[0], 120
    before = await expired_by_sweepers(pair, user.http)
    chats = [await user.chat(idle_timeout_seconds=60) for _ in range(count)]
    turns = [await chat.open(said("x"), lease_seconds=3600) for chat in chats[:20]]
    kept = await user.chat(idle_timeout_seconds=1000)
    versions = {chat.id: (await chat.get())["version"] for chat in chats}
    await their_db.execute(
        "UPDATE dev.sessions SET expires_at = expires_at - interval '1 hour',"
        " lease_expires_at = lease_expires_at - interval '2 hours' WHERE user_id = $1 AND session_id != $2",
        user.id,
        kept.id,
    )
    deadline = time.monotonic() + 10
    due = "(status = 'active' OR lease_expires_at IS NOT NULL)"
    while await their_db.fetchval(f"SELECT count(*) FROM dev.sessions WHERE user_id = $1 AND {due}", user.id) > 1:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    with_turn = {turn.chat.id for turn in turns}
    for chat in chats:
        session = await chat.get()
        assert (session["status"], session["ended_reason"]) == ("ended", "expired")
        assert session["version"] == versions[chat.id] + 1 + (chat.id in with_turn)  # its turn, then itself
    assert {(await turn.get())["status"] for turn in turns} == {"expired"}
    assert (await kept.get())["status"] == "active"
    late = await turns[0].complete(said("late, but not taken over", "assistant"))
    assert (late["turn"]["status"], late["session"]["status"]) == ("completed", "ended")
    assert await expired_by_sweepers(pair, user.http) == before + count
