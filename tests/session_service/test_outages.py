"""Postgres away, frozen or killed: 503 in good time, and everything goes on by itself when it is back."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import pytest
import pytest_asyncio

from shared import embedded_postgres
from shared.http_client import http_client
from tests.conftest import migrate
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.session_service.calls import Chat, Json, User, check_counters, fine, new_user_id, refused, said
from tests.session_service.test_durability import append_until_it_fails, stored

TIMEOUTS: dict[str, Any] = {"DATABASE_TIMEOUT_SECONDS": "0.5", "DATABASE_CONNECT_TIMEOUT_SECONDS": "0.5"}
QUICKLY_SECONDS = 4.0


@pytest.fixture(scope="module")
def data_dir(scratch: Path) -> Iterator[Path]:
    """A Postgres of this file alone, to be ill-treated."""
    path = scratch / "outages"
    migrate(embedded_postgres.start(path))
    yield path
    embedded_postgres.start(path)
    embedded_postgres.stop(path)


@pytest.fixture(scope="module")
def service(data_dir: Path, scratch: Path) -> Iterator[ServiceProcess]:
    with start_session_service(embedded_postgres.url(data_dir), scratch, free_port(), **TIMEOUTS) as process:
        yield process


@pytest_asyncio.fixture
async def user(service: ServiceProcess) -> AsyncIterator[User]:
    async with http_client(read_seconds=20, connect_seconds=5) as client:
        client.base_url = httpx.URL(f"{service.url}/api/v1/")
        yield User(client, new_user_id())


def processes_of(data_dir: Path) -> list[psutil.Process]:
    postmaster = psutil.Process(embedded_postgres.pid(data_dir))
    return [postmaster, *postmaster.children(recursive=True)]


@contextmanager
def frozen(data_dir: Path) -> Iterator[None]:
    stopped = processes_of(data_dir)
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            process.resume()


async def until_it_works(chat: Chat, seconds: float = 10) -> float:
    """Appends until one succeeds; how long that took."""
    began = time.monotonic()
    while (answer := await chat.post("back")).status_code != 200:
        refused(answer, 503, "database_unavailable")
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.05)
    return time.monotonic() - began


async def check_all_calls_say_so(chat: Chat) -> None:
    """Every call answers 503 with Retry-After, each in good time, all at once."""
    user = chat.user
    calls = [
        user.http.post("/sessions", json={"user_id": user.id}),
        user.http.get("/sessions", params=user.params),
        user.http.get(f"/users/{user.id}/stats"),
        chat.call("GET"),
        chat.put(title="x"),
        chat.end(),
        chat.post("x"),
        chat.turn(said("x"), create_session={}),
        chat.turn(said("x"), wait_seconds=1),
        chat.call("POST", "/turns/t/complete", json={"lease_token": "x", "status": "completed"}),
        chat.call("POST", "/turns/t/renew", json={"lease_token": "x"}),
        chat.call("POST", "/align", json={"hashes": []}),
        chat.call("GET", "/messages"),
        chat.call("GET", "/messages", params={"order": "desc"}),
        chat.call("GET", "/context"),
        chat.call("POST", "/memory", json={"memory_type": "custom", "content": "x"}),
        *(chat.post(f"x{number}") for number in range(20)),
    ]
    began = time.monotonic()
    for answer in await asyncio.gather(*calls):
        refused(answer, 503, "database_unavailable", "Database unavailable")
    assert time.monotonic() - began < QUICKLY_SECONDS


async def check_health_of(user: User, *, connected: bool) -> None:
    root = str(user.http.base_url).split("/api")[0]
    paths = ("/health/live", "/health/ready", "/health", "/health/detailed")
    live, ready, simple, detailed = await asyncio.gather(*(user.http.get(root + path) for path in paths))
    assert (live.status_code, simple.status_code) == (200, 200)
    assert (ready.status_code, detailed.status_code) == ((200, 200) if connected else (503, 503))
    assert detailed.json()["database_connected"] is connected
    assert detailed.elapsed.total_seconds() < 2.5
    assert (await user.http.get(root + "/metrics")).status_code == 200


async def test_a_frozen_postgres(user: User, data_dir: Path) -> None:
    chat = await user.chat()
    await chat.append("before")
    with frozen(data_dir):
        await check_all_calls_say_so(chat)
        await check_all_calls_say_so(chat)
        await check_health_of(user, connected=False)
    assert await until_it_works(chat) < 5
    await check_health_of(user, connected=True)
    connection = await asyncpg.connect(embedded_postgres.url(data_dir))
    await check_counters(connection, chat)
    await connection.close()


async def test_a_stopped_postgres(user: User, data_dir: Path) -> None:
    chat = await user.chat()
    await chat.append("before")
    await asyncio.to_thread(embedded_postgres.stop, data_dir)
    try:
        await check_all_calls_say_so(chat)
        await check_health_of(user, connected=False)
    finally:
        await asyncio.to_thread(embedded_postgres.start, data_dir)
    assert await until_it_works(chat) < 3
    assert (await chat.contents())[0] == "before"
    await check_health_of(user, connected=True)


async def test_a_killed_postgres_has_everything_that_was_acknowledged(user: User, data_dir: Path) -> None:
    chats = [await user.chat() for _ in range(5)]
    acknowledged: dict[str, Json] = {}
    running = asyncio.gather(
        *(append_until_it_fails(chat, f"c{number}", acknowledged) for chat in chats for number in range(10))
    )
    while len(acknowledged) < 200:
        await asyncio.sleep(0.01)
    for process in processes_of(data_dir):
        os.kill(process.pid, signal.SIGKILL)
    await running
    refused(await chats[0].call("GET"), 503, "database_unavailable")
    await asyncio.to_thread(embedded_postgres.start, data_dir)
    assert await until_it_works(chats[0]) < 5
    connection = await asyncpg.connect(embedded_postgres.url(data_dir))
    for chat in chats:
        found = await stored(chat)
        assert (await check_counters(connection, chat))["message_count"] == len(found)
        for message_id, message in acknowledged.items():
            if message["session_id"] == chat.id:
                assert found[message_id] == message
    await connection.close()


async def test_connections_cut_under_the_calls(user: User, data_dir: Path) -> None:
    chat = await user.chat()
    connection = await asyncpg.connect(embedded_postgres.url(data_dir))
    cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'session_service'"
    cut_off = 0
    for _ in range(5):
        cut_off += await connection.fetchval(cut)
        answers = await asyncio.gather(*(chat.post("x") for _ in range(10)))
        for answer in answers:
            if answer.status_code != 200:
                refused(answer, 503, "database_unavailable")
    assert cut_off > 0
    assert await until_it_works(chat) < 2
    await check_counters(connection, chat)
    await connection.close()


async def test_a_row_locked_by_someone_else(user: User, data_dir: Path) -> None:
    """A long transaction elsewhere: the call that needs the row gives up in time, the others go on."""
    chat, other = await user.chat(), await user.chat()
    connection = await asyncpg.connect(embedded_postgres.url(data_dir))
    async with connection.transaction():
        await connection.execute("SELECT FROM dev.sessions WHERE session_id = $1 FOR UPDATE", chat.id)
        began = time.monotonic()
        stuck = [asyncio.create_task(chat.post("x")), asyncio.create_task(chat.turn(said("x")))]
        await other.append("goes on")
        assert (await chat.get())["message_count"] == 0
        for task in stuck:
            refused(await task, 503, "database_unavailable")
        assert time.monotonic() - began < QUICKLY_SECONDS
    await connection.close()
    await chat.append("free again")


async def test_a_service_that_starts_before_postgres_and_before_its_tables(data_dir: Path, scratch: Path) -> None:
    """Until both are there it says so; then it needs no restart."""
    url = embedded_postgres.url(data_dir)
    await asyncio.to_thread(embedded_postgres.stop, data_dir)
    port = free_port()
    with start_session_service(url, scratch, port, wait=False, DB_SCHEMA="other_1", **TIMEOUTS) as process:
        async with httpx.AsyncClient(base_url=process.url, trust_env=False) as client:
            try:
                await asyncio.to_thread(process.wait_until, "/health/live")
                await check_not_initialized(client)
            finally:
                await asyncio.to_thread(embedded_postgres.start, data_dir)
            await asyncio.sleep(0.5)
            await check_not_initialized(client)
            await asyncio.to_thread(migrate, url, schema="other_1")
            await asyncio.to_thread(process.wait_until, "/health/ready", 10)
            fine(await client.post("/api/v1/sessions", json={"user_id": "u"}))
            assert (await client.get("/health/detailed")).json()["schema_revision"]


async def check_not_initialized(client: httpx.AsyncClient) -> None:
    every_turns: dict[str, Json] = {
        "/messages": said("x"),
        "/align": {"hashes": []},
        "/turns": {"messages": [said("x")]},
        "/turns/t/complete": {"lease_token": "x", "status": "completed"},
    }
    for path in ("/sessions?user_id=u", "/sessions/s?user_id=u", "/sessions/s/messages?user_id=u", "/sessions/stats"):
        refused(await client.get(f"/api/v1{path}"), 503, "not_initialized", "Session service not initialized")
    for path, body in every_turns.items():
        answer = await client.post(f"/api/v1/sessions/s{path}?user_id=u", json=body)
        refused(answer, 503, "not_initialized", "Session service not initialized")
    posted = await client.post("/api/v1/sessions", json={"user_id": "u"})
    assert posted.content == b'{"detail":"Session service not initialized","code":"not_initialized"}'
    assert (await client.get("/health/ready")).status_code == 503
    detailed = await client.get("/health/detailed")
    assert (detailed.status_code, detailed.json()["database_connected"]) == (503, False)
    assert detailed.json()["schema_revision"] is None
