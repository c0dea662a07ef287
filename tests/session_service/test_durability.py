"""What a client was told succeeded is on disk, whoever is killed, and what was not applied is not half there."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from shared.http_client import http_client
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.session_service.calls import Chat, Db, Json, Turn, User, check_counters, fine, new_user_id, said


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(read_seconds=20, connect_seconds=5) as client:
        client.base_url = httpx.URL(f"http://127.0.0.1:{port}/api/v1/")
        yield client


async def append_until_it_fails(chat: Chat, name: str, acknowledged: dict[str, Json]) -> None:
    """Appends one after the other; the service's death ends it."""
    for number in range(10_000):
        message_id = f"{chat.id}-{name}-{number}"
        try:
            answer = await chat.post("x" * 200, message_id=message_id, tokens_used=3, cost_usd=0.000001)
        except httpx.HTTPError:
            return
        if answer.status_code == 503:
            return
        acknowledged[message_id] = fine(answer)


async def talk_until_it_fails(chat: Chat, acknowledged: dict[str, Json]) -> None:
    for number in range(10_000):
        ids = [f"{chat.id}-turn-{number}-{part}" for part in ("q", "r")]
        try:
            opened = await chat.turn(said("q", message_id=ids[0]))
            if opened.status_code == 503:
                return
            turn = Turn(chat, fine(opened))
            acknowledged[ids[0]] = turn.opened["messages"][0]
            finished = await turn.finish(said("r", "assistant", message_id=ids[1]), usage={"output_tokens": 7})
        except httpx.HTTPError:
            return
        if finished.status_code == 503:
            return
        acknowledged[ids[1]] = fine(finished)["messages"][0]


async def stored(chat: Chat) -> dict[str, Json]:
    found: dict[str, Json] = {}
    after = 0
    while messages := (await chat.messages(after_seq=after, limit=1000))["messages"]:
        found |= {each["message_id"]: each for each in messages}
        after = messages[-1]["seq"]
    return found


@dataclass
class Life:
    """What clients were told while a service lived."""

    acknowledged: dict[str, Json]
    user_id: str
    session_ids: list[str]
    turn: Json

    async def check_everything_is_there(self, client: httpx.AsyncClient, db: Db) -> int:
        """Every acknowledged message is stored as it was told, and counters equal rows; how many rows there are."""
        rows = 0
        for session_id in self.session_ids:
            chat = Chat(User(client, self.user_id), session_id)
            found = await stored(chat)
            rows += len(found)
            assert (await check_counters(db, chat))["message_count"] == len(found)
            told = {each: message for each, message in self.acknowledged.items() if message["session_id"] == session_id}
            assert {message_id: found.get(message_id) for message_id in told} == told
        return rows


async def lived(service: ServiceProcess, end: Callable[[], object]) -> Life:
    """A hundred clients that append and talk while `end` ends the service under them."""
    life = Life({}, new_user_id(), [f"s{number}" for number in range(10)], {})
    async with client_of(service.port) as client:
        user = User(client, life.user_id)
        for session_id in life.session_ids:
            await user.create(session_id=session_id)
        life.turn = (await Chat(user, "open").open(said("q"), create_session={})).opened
        waiting = asyncio.create_task(Chat(user, "open").turn(said("late"), wait_seconds=30))
        busy, others = life.session_ids[0], life.session_ids[1:]
        clients = [(busy, number) for number in range(50)] + [(each, n) for each in others[:5] for n in range(10)]
        tasks = [append_until_it_fails(Chat(user, each), f"c{n}", life.acknowledged) for each, n in clients]
        tasks += [talk_until_it_fails(Chat(user, each), life.acknowledged) for each in others[5:]]
        running = asyncio.gather(*tasks)
        while len(life.acknowledged) < 200:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(end)
        await running
        with pytest.raises(httpx.HTTPError):  # the waiter was not served, and did not hold up the end
            (await waiting).raise_for_status()
    return life


async def test_the_service_ends_in_the_middle_of_a_hundred_parallel_appends(own_database: str, scratch: Path) -> None:
    """First by SIGTERM, then by SIGKILL; each time the next process finds what the one before acknowledged."""
    port = free_port()
    settings: dict[str, Any] = {"GRACEFUL_STOP_SECONDS": "1"}
    db = await asyncpg.connect(own_database)
    with start_session_service(own_database, scratch, port, **settings) as service:
        first = await lived(service, service.stop)
        assert service.popen.returncode == 0
    with start_session_service(own_database, scratch, port) as service:
        async with client_of(port) as client:
            # Asked to end, it answered everyone before: no row is stored that nobody was told of.
            assert await first.check_everything_is_there(client, db) == len(first.acknowledged)
            await check_turn_outlived(client, first)
        second = await lived(service, service.kill)
    with start_session_service(own_database, scratch, port):
        async with client_of(port) as client:
            await second.check_everything_is_there(client, db)
            await check_turn_outlived(client, second)
    await db.close()


async def check_turn_outlived(client: httpx.AsyncClient, life: Life) -> None:
    """The turn that was open goes on under the next process, once."""
    chat = Chat(User(client, life.user_id), "open")
    turn = Turn(chat, life.turn)
    fine(await turn.renew())
    first = await turn.complete(said("r", "assistant"), cost_usd=0.5)
    assert await turn.complete(said("r", "assistant"), cost_usd=0.5) == first
    assert await chat.contents() == ["q", "r"]
