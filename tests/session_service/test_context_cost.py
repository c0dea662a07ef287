"""What a context costs depends on its window, not on the session's length."""

import time
from pathlib import Path

import asyncpg
import httpx

from shared.http_client import http_client
from tests.processes import free_port, start_session_service
from tests.session_service.calls import Chat, User, fine, new_user_id, said
from tests.session_service.exports import grow

SHORT, LONG = 100, 100_000
ROUNDS = 25
BUDGET = {"max_messages": 40}


async def seconds_of_a_get(chat: Chat) -> float:
    started_at = time.perf_counter()
    context = fine(await chat.call("GET", "/context", params=BUDGET))
    seconds = time.perf_counter() - started_at
    assert len(context["messages"][0]["content"]) == BUDGET["max_messages"]
    return seconds


async def seconds_of_a_turn(chat: Chat) -> float:
    started_at = time.perf_counter()
    turn = await chat.open(said("and now?"), context=BUDGET)
    await turn.complete(said("this", "assistant"))
    return time.perf_counter() - started_at


async def test_a_long_session_costs_what_a_short_one_does(own_database: str, scratch: Path) -> None:
    """The quickest of many calls, taken in turns: the machine's other work slows all of them alike."""
    with start_session_service(own_database, scratch, free_port(), NEWS_INTERVAL_SECONDS="0") as service:
        db = await asyncpg.connect(own_database)
        async with http_client(read_seconds=60, connect_seconds=5) as http:
            http.base_url = httpx.URL(f"{service.url}/api/v1/")
            user = User(http, new_user_id())
            chats = {SHORT: await user.chat(), LONG: await user.chat()}
            for size, chat in chats.items():
                await chat.append("first")
                await grow(db, chat, size, "'message ' || g || ' of a long conversation'")
            await db.execute("ANALYZE dev.session_messages")
            for measured in (seconds_of_a_get, seconds_of_a_turn):
                seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
                for _ in range(ROUNDS):
                    for size, chat in chats.items():
                        seconds[size].append(await measured(chat))
                assert min(seconds[LONG]) < 1.5 * min(seconds[SHORT]), (measured.__name__, seconds)
        await db.close()
