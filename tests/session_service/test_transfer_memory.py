"""Export and import of big sessions: memory that does not grow with them, no limit on size or time, all or nothing."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx
import pytest
import pytest_asyncio

from shared.http_client import http_client
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.session_service.calls import Chat, Db, User, fine, new_user_id, refused
from tests.session_service.exports import count, grow, take_back

# The issue names 200,000, which take half a minute and show no more than this many: memory is flat from here on.
MESSAGES = 20_000
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Big:
    """A service of its own, by whose memory nothing else grows, and which holds bodies to limits that imports pass."""

    process: ServiceProcess
    user: User
    db: Db

    def memory(self, name: str) -> int:
        """VmRSS or VmHWM (its highest so far) of the service, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def database(make_database: Callable[[], str]) -> str:
    return make_database()


@pytest.fixture(scope="module")
def process(database: str, scratch: Path) -> Iterator[ServiceProcess]:
    limits = {"BODY_TIMEOUT_SECONDS": "0.2", "LIMITS__BODY_BYTES": "100000", "DATABASE_POOL_SIZE": "4"}
    with start_session_service(database, scratch, free_port(), True, NEWS_INTERVAL_SECONDS="0", **limits) as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def big(process: ServiceProcess, database: str) -> AsyncIterator[Big]:
    db = await asyncpg.connect(database)
    async with http_client(read_seconds=60, connect_seconds=5) as http:
        http.base_url = httpx.URL(f"{process.url}/api/v1/")
        yield Big(process, User(http, new_user_id()), db)
    await db.close()


async def save(chat: Chat, path: Path) -> None:
    """The export, written to a file as it comes."""
    async with chat.user.http.stream("GET", f"/sessions/{chat.id}/export", params=chat.user.params) as answer:
        assert answer.status_code == 200
        with path.open("wb") as file:
            async for chunk in answer.aiter_raw():
                file.write(chunk)


async def parts_of(path: Path, pause_seconds: float = 0) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(MEBIBYTE):
            yield chunk
            await asyncio.sleep(pause_seconds)


async def a_big_chat(big: Big, to: int, content: str, blocks: str = "NULL") -> Chat:
    chat = await User(big.user.http, new_user_id()).chat()
    await chat.append("first")
    await grow(big.db, chat, to, content, blocks)
    return chat


async def test_memory_is_constant(big: Big, tmp_path: Path) -> None:
    """There and back with a small session first; then a big one takes hardly more."""
    text = "g || ' ' || repeat(md5(g::text), 64)"
    small = await a_big_chat(big, 2000, text)
    await save(small, tmp_path / "small")
    fine(await take_back(small.user.other(), parts_of(tmp_path / "small")))
    chat = await a_big_chat(big, MESSAGES, text)
    before = big.memory("VmHWM")
    await save(chat, tmp_path / "big")
    size = (tmp_path / "big").stat().st_size
    assert size > MESSAGES * 2000
    after_export = big.memory("VmHWM")
    assert after_export - before < size / 3
    there = chat.user.other()
    session = fine(await take_back(there, parts_of(tmp_path / "big", pause_seconds=0.01)))
    assert session["message_count"] == MESSAGES
    assert big.memory("VmHWM") - after_export < size / 3
    copy = chat.of(there)
    for page in (1, MESSAGES // 1000):
        one, other = [await each.messages(page=page, page_size=1000) for each in (chat, copy)]
        assert [each["content"] for each in one["messages"]] == [each["content"] for each in other["messages"]]
        assert other["messages"][-1]["seq"] == page * 1000


async def test_memory_is_constant_with_big_messages(big: Big, tmp_path: Path) -> None:
    """A page is bounded by its bytes, whatever the number of its messages."""
    blocks = "json_build_array(json_build_object('type', 'text', 'text', repeat('y', 4194304)))"
    chat = await a_big_chat(big, 24, "repeat('y', 4194304)", blocks)
    before = big.memory("VmHWM")
    await save(chat, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size > 23 * 4 * MEBIBYTE
    assert big.memory("VmHWM") - before < 80 * MEBIBYTE


async def test_slow_readers_hold_no_connection(big: Big) -> None:
    """Three times as many exports as there are connections, all read to their first bytes only."""
    chat = await a_big_chat(big, 300, "repeat('z', 50000)")
    path, params = f"/sessions/{chat.id}/export", chat.user.params
    streams = [big.user.http.stream("GET", path, params=params) for _ in range(12)]
    answers = [await stream.__aenter__() for stream in streams]
    try:
        assert [answer.status_code for answer in answers] == [200] * 12
        began = time.monotonic()
        await asyncio.gather(*(chat.append("meanwhile") for _ in range(20)))
        assert time.monotonic() - began < 3
    finally:
        for stream in streams:
            await stream.__aexit__(None, None, None)
    assert (await chat.get())["message_count"] == 320


async def test_a_client_that_leaves_in_the_middle(big: Big, tmp_path: Path) -> None:
    """Of an upload: nothing is stored; of a download: nothing is held. No fault is logged."""
    chat = await a_big_chat(big, 300, "repeat('z', 50000)")
    await save(chat, tmp_path / "file")
    there = User(big.user.http, new_user_id())
    whole = (tmp_path / "file").read_bytes()
    logged = len(big.process.logged())
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        reader, writer = await asyncio.open_connection("127.0.0.1", big.process.port)
        target = f"POST /api/v1/sessions/import?user_id={there.id}"
        head = f"{target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(whole)}\r\n\r\n"
        writer.write(head.encode() + whole[:size])
        await writer.drain()
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", big.process.port)
        writer.write(
            f"GET /api/v1/sessions/{chat.id}/export?user_id={chat.user.id} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    await asyncio.sleep(0.3)
    assert await count(big.db, there) == 0
    refused(await Chat(there, chat.id).call("GET"), 404, "session_not_found")
    assert '"level": "error"' not in big.process.logged()[logged:]
    waiting = "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
    assert [row[0] for row in await big.db.fetch(waiting)] == []


async def test_a_kill_in_the_middle_of_an_import(big: Big, database: str, scratch: Path, tmp_path: Path) -> None:
    chat = await a_big_chat(big, 8000, "repeat('k', 500)")
    await save(chat, tmp_path / "file")
    there = new_user_id()
    with start_session_service(database, scratch, free_port(), NEWS_INTERVAL_SECONDS="0") as service:
        async with http_client(read_seconds=60, connect_seconds=5) as http:
            http.base_url = httpx.URL(f"{service.url}/api/v1/")
            importing = asyncio.create_task(take_back(User(http, there), parts_of(tmp_path / "file")))
            writing = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE $1"
            while not await big.db.fetchval(writing, "INSERT INTO dev.session_messages%"):
                assert not importing.done()
                await asyncio.sleep(0.005)
            service.kill()
            with pytest.raises(httpx.TransportError):
                await importing
    assert await count(big.db, User(big.user.http, there)) == 0
    fine(await take_back(User(big.user.http, there), parts_of(tmp_path / "file")))
    assert (await Chat(User(big.user.http, there), chat.id).get())["message_count"] == 8000
