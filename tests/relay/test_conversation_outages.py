"""Conversations while session_service or the relay is away: nothing that was told is lost, nothing is left over."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from websockets.exceptions import ConnectionClosed

from shared import embedded_postgres
from tests.conftest import migrate
from tests.relay.calls import MODEL
from tests.relay.conftest import user_at
from tests.relay.conversing import Conversation, User, fine, refused, say, told_by, until
from tests.relay.stack import Stack, stack_of
from tests.upstream.client import TestUpstream

SLOW = {"text": "one two three four five six seven eight nine ten", "event_delay_ms": 100, "delta_characters": 5}


@dataclass
class Place:
    """A stack, and a user of it."""

    stack: Stack
    user: User


@pytest_asyncio.fixture(loop_scope="session")
async def place(own_database: str, upstream: TestUpstream, tmp_path: Path) -> AsyncIterator[Place]:
    settings = {"RELAY_RETRY_WAIT_SECONDS": "0", "RELAY_STORE_TIMEOUT_SECONDS": "5"}
    async with (
        stack_of(own_database, upstream, tmp_path / "stack", **settings) as stack,
        user_at(stack.relay, stack.folder, stack.sessions) as user,
    ):
        yield Place(stack, user)


async def test_starts_without_the_store(place: Place) -> None:
    """They say why they failed, hold no place, and leave nothing."""
    stack, user = place.stack, place.user
    stack.store.kill()
    tasks = [await user.start(llm_model=MODEL) for _ in range(6)]
    ended = [await user.ended(task["id"]) for task in tasks]
    assert {(task["status"], task["app_conversation_id"]) for task in ended} == {("ERROR", None)}
    assert all(task["detail"] for task in ended)
    for _ in range(6):
        refused(await user.http.post("/api/conversations", json={"initial_user_msg": "Hi"}), 503)
    stack.revive()
    assert fine(await user.http.get("/api/conversations"))["results"] == []
    mine = await user.conversation(initial_message=say("Hi", run=False))
    assert await mine.stored() == [("user", "Hi")]


async def test_the_store_is_killed_while_an_answer_comes(place: Place, upstream: TestUpstream) -> None:
    """The answer waits on disk, and the run for it."""
    stack = place.stack
    mine = await place.user.conversation()
    upstream.script(SLOW)
    await mine.say("Count")
    await upstream.until(lambda state: state["running"] > 0)
    stack.store.kill()
    await upstream.until(lambda state: state["running"] == 0)
    async with mine.socket() as socket:  # it does not need the store
        first = await socket.next()
        assert first["value"]["execution_status"] == "running"
        stack.revive()
        await socket.until_status("finished")
        assert socket.told[-2:] == [("agent", str(SLOW["text"])), ("status", "finished")]
    assert await mine.stored() == [("user", "Count"), ("assistant", str(SLOW["text"]))]
    assert len(upstream.requests("/v1/messages")) == 1


async def test_the_relay_is_killed_again_and_again(place: Place, upstream: TestUpstream) -> None:
    """Every message that was told to be stored is there once, and none was answered twice."""
    stack, user = place.stack, place.user
    mine = await user.conversation()
    upstream.script({"text": "answer", "event_delay_ms": 30, "delta_characters": 1, "repeat": -1})
    told: list[str] = []
    is_over = asyncio.Event()

    async def talk(who: int) -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            said = f"{who}-{number}"
            try:
                answer = await mine.call("events", say(said, run=bool(number % 2)))
            except httpx.TransportError:
                await asyncio.sleep(0.1)
                continue
            if answer.status_code == 200:
                told.append(said)
            await asyncio.sleep(0.05)

    talking = [asyncio.create_task(talk(who)) for who in range(2)]
    for pause in (0.7, 1.1, 1.6):
        await asyncio.sleep(pause)
        stack.relay.kill()
        stack.revive()
    await asyncio.sleep(0.5)
    is_over.set()
    await asyncio.gather(*talking)
    assert len(told) > 6
    await _finish(mine)
    stored = await mine.stored()
    asked = [said for role, said in stored if role == "user"]
    assert len(set(asked)) == len(asked)
    assert set(told) <= set(asked)
    assert sorted(said for kind, said in await mine.trajectory() if kind == "user") == sorted(asked)
    roles = [role for role, _ in stored]
    assert ("assistant", "assistant") not in list(pairwise(roles))


async def _finish(mine: Conversation) -> None:
    """Until what a killed relay has left is given up, and all that waits was answered."""

    async def is_still() -> bool:
        return bool((await mine.app())["execution_status"] != "running")

    await until(is_still, 40)
    await mine.say("The end")

    async def is_answered() -> bool:
        return (await mine.stored())[-2:] == [("user", "The end"), ("assistant", "answer")]

    await until(is_answered, 40)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Path]:
    """A Postgres of one test, to be stopped."""
    path = tmp_path / "postgres"
    migrate(embedded_postgres.start(path))
    yield path
    embedded_postgres.start(path)
    embedded_postgres.stop(path)


async def test_postgres_is_away_while_an_answer_comes(postgres: Path, upstream: TestUpstream, tmp_path: Path) -> None:
    """Calls say so, sockets close and may come back; the answer is stored once, and the run ends."""
    settings = {"DATABASE_TIMEOUT_SECONDS": "2", "DATABASE_CONNECT_TIMEOUT_SECONDS": "1"}
    async with (
        stack_of(embedded_postgres.url(postgres), upstream, tmp_path / "stack", **settings) as stack,
        user_at(stack.relay, stack.folder, stack.sessions) as user,
    ):
        mine = await user.conversation()
        upstream.script(SLOW)
        async with mine.socket() as socket:
            await mine.say("Count")
            await socket.until_status("running")
            await upstream.until(lambda state: state["running"] > 0)
            embedded_postgres.stop(postgres)
            with pytest.raises(ConnectionClosed) as closed:
                await socket.until_status("finished")
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013
        for answer in (await user.http.get(mine.path), await mine.call("pause"), await mine.call("events", say("x"))):
            refused(answer, 503)
            assert answer.headers["retry-after"]
        await upstream.until(lambda state: state["running"] == 0)
        embedded_postgres.start(postgres)
        app = await mine.until_status("finished", "error")
        assert app["sandbox_status"] == "RUNNING"

        async def is_stored() -> bool:
            return await mine.stored() == [("user", "Count"), ("assistant", str(SLOW["text"]))]

        await until(is_stored)
        async with mine.socket(last_event_id=socket.frames[-1]["id"]) as again:
            await again.until(lambda frame: told_by(frame) in {("status", "finished"), ("status", "error")})
        assert ("agent", str(SLOW["text"])) in again.told
        await mine.answered("More")
        assert len(await mine.stored()) == 4
