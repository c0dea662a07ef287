"""How often a turn asks Postgres: counted on the wire, between the service and the server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest_asyncio

from shared.http_client import http_client
from tests.processes import free_port, start_session_service
from tests.session_service.calls import Chat, Json, Turn, User, fine, new_user_id, said

# Nothing else asks while it is counted.
QUIET: dict[str, Any] = {"NEWS_INTERVAL_SECONDS": "0", "SWEEP_INTERVAL_SECONDS": "3600", "DATABASE_POOL_SIZE": "1"}


class Wire:
    """Passes the bytes of Postgres' protocol on, and counts Syncs and simple queries: each waits for an answer."""

    def __init__(self, database_url: str) -> None:
        url = urlsplit(database_url)
        self._socket = parse_qs(url.query).get("host", [""])[0]
        self._host, self._port = url.hostname, url.port or 5432
        self._credentials = url.netloc.rpartition("@")[0]
        self._database = url.path
        self.round_trips = 0
        self.connections: set[asyncio.Task[None]] = set()

    def url(self, port: int) -> str:
        user = f"{self._credentials}@" if self._credentials else ""
        return f"postgresql://{user}127.0.0.1:{port}{self._database}?sslmode=disable"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._socket:
            path = f"{self._socket}/.s.PGSQL.{self._port}"
            from_server, to_server = await asyncio.open_unix_connection(path)
        else:
            from_server, to_server = await asyncio.open_connection(self._host, self._port)
        serving = asyncio.current_task()
        assert serving is not None
        self.connections.add(serving)
        await asyncio.gather(self._requests(reader, to_server), self._answers(from_server, writer))

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            first = await reader.readexactly(4)
            writer.write(first + await reader.readexactly(int.from_bytes(first) - 4))
            while True:
                head = await reader.readexactly(5)
                self.round_trips += head[:1] in {b"S", b"Q"}
                writer.write(head + await reader.readexactly(int.from_bytes(head[1:]) - 4))
        await _close(writer)

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)
        await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def counted(database_url: str, scratch: Path) -> AsyncIterator[tuple[User, Wire]]:
    wire = Wire(database_url)
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    started = start_session_service(wire.url(port), scratch, free_port(), wait=False, **QUIET)
    async with http_client(read_seconds=20, connect_seconds=5) as client:
        with started as service:
            await asyncio.to_thread(service.wait_until, "/health/ready")
            client.base_url = httpx.URL(f"{service.url}/api/v1/")
            yield User(client, new_user_id()), wire
        server.close()
        await asyncio.gather(*wire.connections)


@pytest_asyncio.fixture
async def wired(own_database: str, scratch: Path) -> AsyncIterator[tuple[User, Wire]]:
    async with counted(own_database, scratch) as found:
        yield found


async def test_a_turn_takes_few_round_trips(wired: tuple[User, Wire]) -> None:
    user, wire = wired
    rewinding: Json = {"rewind_to_seq": 0}

    async def spent(call: Awaitable[httpx.Response]) -> tuple[int, httpx.Response]:
        before = wire.round_trips
        answer = await call
        return wire.round_trips - before, answer

    async def turn(chat: Chat, version: str = "*", **fields: Any) -> tuple[int, int]:
        body = {"messages": [said("q")], "create_session": {}, **fields}
        headers = {"If-Match": version} if fields else {}
        to_open, answer = await spent(chat.call("POST", "/turns", json=body, headers=headers))
        opened = Turn(chat, fine(answer))
        to_complete, done = await spent(opened.finish(said("a", "assistant"), usage={"output_tokens": 1}))
        rewinding["rewind_to_seq"] = fine(done)["messages"][-1]["seq"]
        return to_open, to_complete

    async def append(chat: Chat) -> int:
        return (await spent(chat.post("x")))[0]

    for name in ("warm", "counted"):  # at first statements are prepared
        chat = Chat(user, name)
        found = [await turn(chat), await turn(chat), await turn(chat, **rewinding), await append(chat)]
        # What came between was not known; then it is.
        after = [await turn(chat), await turn(chat)]
    assert found == [(2, 1), (1, 1), (1, 1), 1]
    assert after == [(4, 1), (1, 1)]


async def test_turns_whose_window_has_moved_take_no_more(wired: tuple[User, Wire]) -> None:
    user, wire = wired
    chat = Chat(user, "s")
    spent = []
    for _ in range(8):
        before = wire.round_trips
        opened = await chat.turn(said("q"), create_session={}, context={"max_messages": 6})
        spent.append(wire.round_trips - before)
        await Turn(chat, fine(opened)).complete(said("a", "assistant"))
    assert opened.json()["context"]["receipt"]["left_out"]
    # Where it moves first, the session's beginning is looked for; at first statements are prepared.
    assert spent[1:] == [1, 1, 2, 1, 1, 1, 1]


async def test_of_an_erased_user_nothing_is_remembered(wired: tuple[User, Wire]) -> None:
    """Who was remembered would have a third round trip, with which it is found that the session has gone."""
    user, wire = wired
    for name in ("warm", "counted"):
        chat = Chat(user, name)
        await (await chat.open(said("q"), create_session={})).complete(said("a", "assistant"))
        fine(await user.http.delete(f"/users/{user.id}"))
        before = wire.round_trips
        await chat.open(said("again"), create_session={})
        spent = wire.round_trips - before
    assert spent == 2
