"""What a client was told succeeded is on disk, whoever is killed, and what was not applied is not half there."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from shared.http_client import http_client
from tests.processes import free_port, start_session_service
from tests.session_service.calls import Chat, Json, Turn, User, check_counters, fine, new_user_id, said


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


@pytest.mark.parametrize("graceful", [False, True], ids=["SIGKILL", "SIGTERM"])
async def test_the_service_ends_in_the_middle_of_a_hundred_parallel_appends(
    own_database: str, scratch: Path, graceful: bool
) -> None:
    port = free_port()
    acknowledged: dict[str, Json] = {}
    user_id = new_user_id()
    with start_session_service(own_database, scratch, port) as service:
        async with client_of(port) as client:
            user = User(client, user_id)
            busy, *others = [(await user.create(session_id=f"s{number}"))["session_id"] for number in range(10)]
            tasks = [append_until_it_fails(Chat(user, busy), f"c{number}", acknowledged) for number in range(50)]
            tasks += [
                append_until_it_fails(Chat(user, each), f"c{n}", acknowledged) for each in others[:5] for n in range(10)
            ]
            tasks += [talk_until_it_fails(Chat(user, each), acknowledged) for each in others[5:]]
            running = asyncio.gather(*tasks)
            while len(acknowledged) < 300:
                await asyncio.sleep(0.01)
            if graceful:
                assert await asyncio.to_thread(service.stop) == 0
            else:
                service.kill()
            await running
    with start_session_service(own_database, scratch, port):
        connection = await asyncpg.connect(own_database)
        async with client_of(port) as client:
            user = User(client, user_id)
            rows = 0
            for each in (busy, *others):
                chat = Chat(user, each)
                found = await stored(chat)
                rows += len(found)
                assert (await check_counters(connection, chat))["message_count"] == len(found)
                kept = {
                    message_id: message for message_id, message in acknowledged.items() if message["session_id"] == each
                }
                assert {message_id: found.get(message_id) for message_id in kept} == kept
            if graceful:  # nobody was left without an answer
                assert rows == len(acknowledged)
        await connection.close()


async def test_an_open_turn_outlives_the_process(own_database: str, scratch: Path) -> None:
    port = free_port()
    user_id = new_user_id()
    with start_session_service(own_database, scratch, port) as service:
        async with client_of(port) as client:
            turn = await Chat(User(client, user_id), "s").open(said("q"), create_session={})
            service.kill()
    with start_session_service(own_database, scratch, port):
        async with client_of(port) as client:
            chat = Chat(User(client, user_id), "s")
            again = Turn(chat, turn.opened)
            fine(await again.renew())
            first = await again.complete(said("r", "assistant"), cost_usd=0.5)
            assert await again.complete(said("r", "assistant"), cost_usd=0.5) == first
            assert await chat.contents() == ["q", "r"]


async def test_a_waiter_does_not_hold_up_the_end(own_database: str, scratch: Path) -> None:
    """SIGTERM while someone waits for a busy session: an answer comes, and the process ends within its time."""
    port = free_port()
    with start_session_service(own_database, scratch, port, GRACEFUL_STOP_SECONDS="1") as service:
        async with client_of(port) as client:
            chat = Chat(User(client, new_user_id()), "s")
            turn = await chat.open(said("q"), create_session={})
            waiting = asyncio.create_task(chat.turn(said("late"), wait_seconds=30))
            await asyncio.sleep(0.2)
            assert await asyncio.to_thread(service.stop, 10) == 0
            with pytest.raises(httpx.HTTPError):
                (await waiting).raise_for_status()
    with start_session_service(own_database, scratch, port):
        async with client_of(port) as client:
            chat = Chat(User(client, chat.user.id), "s")
            assert (await Turn(chat, turn.opened).complete())["session"]["message_count"] == 1
