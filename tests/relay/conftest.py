"""What the relay's tests share beside tests/conftest.py: the test upstream, a relay in front of it, chats."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.processes import Process, ServiceProcess
from tests.relay.calls import Chat, admin_headers, client_of, rest_account, start_relay, upstream_settings
from tests.relay.conversing import User
from tests.relay.stage import Operator, operating
from tests.upstream.client import TestUpstream


@pytest.fixture(scope="session")
def upstream_process() -> Iterator[TestUpstream]:
    with TestUpstream.started() as upstream:
        yield upstream


@pytest.fixture
def upstream(upstream_process: TestUpstream) -> TestUpstream:
    """The test upstream, without a script."""
    upstream_process.reset()
    return upstream_process


@pytest.fixture(scope="session")
def data_dir(scratch: Path) -> Path:
    """Where the shared relay keeps its state."""
    return scratch / "relay"


@pytest.fixture(scope="session")
def relay(
    database_url: str, session_service: ServiceProcess, upstream_process: TestUpstream, data_dir: Path
) -> Iterator[Process]:
    """The relay that the tests of this worker share, in front of the test upstream. It waits for no account."""
    settings = upstream_settings(upstream_process.url) | {"RELAY_RETRY_WAIT_SECONDS": "0"}
    with start_relay(database_url, session_service.url, data_dir, settings) as process:
        yield process


@pytest.fixture
def rest(relay: Process, data_dir: Path) -> Callable[[], None]:
    """Ends whatever keeps the shared relay's account from being used."""
    return partial(rest_account, relay, data_dir)


@pytest.fixture(autouse=True)
def rested_account(request: pytest.FixtureRequest) -> None:
    """What one test made of the shared relay's account is over for the next."""
    if "relay" in request.fixturenames:
        request.getfixturevalue("rest")()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def http(relay: Process, data_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shared relay, with its development key."""
    async with client_of(relay, data_dir) as client:
        yield client


@pytest.fixture
def chat(http: httpx.AsyncClient, sessions: httpx.AsyncClient, upstream: TestUpstream) -> Chat:
    """A session that no other test knows."""
    return Chat(http, sessions)


@asynccontextmanager
async def user_at(relay: Process, folder: Path, sessions: httpx.AsyncClient, **fields: Any) -> AsyncIterator[User]:
    """A user that no other test knows, with an API key that has these fields."""
    user_id = f"user-{uuid.uuid4().hex[:12]}"
    async with httpx.AsyncClient(base_url=relay.url, trust_env=False, headers=admin_headers(folder)) as admin:
        made = (await admin.post("/admin/api-keys", json={"name": user_id, "userId": user_id, **fields})).json()["data"]
    headers = {"x-api-key": made["apiKey"]}
    async with httpx.AsyncClient(base_url=relay.url, headers=headers, timeout=30, trust_env=False) as http:
        yield User(http, sessions, user_id, made["id"])


MakeUser = Callable[..., Awaitable[User]]


@pytest_asyncio.fixture(loop_scope="session")
async def make_user(
    relay: Process, data_dir: Path, sessions: httpx.AsyncClient, upstream: TestUpstream
) -> AsyncIterator[MakeUser]:
    """Makes users of the shared relay, or of another one."""
    async with AsyncExitStack() as opened:

        async def make(at: Process = relay, folder: Path = data_dir, **fields: Any) -> User:
            return await opened.enter_async_context(user_at(at, folder, sessions, **fields))

        yield make


@pytest_asyncio.fixture(loop_scope="session")
async def caller(make_user: MakeUser) -> User:
    """A user that no other test knows, at the shared relay."""
    return await make_user()


MakeRelay = Callable[..., Process]


@pytest.fixture
def make_relay(
    make_database: Callable[[], str], session_service: ServiceProcess, upstream: TestUpstream, data_dir: Path
) -> Iterator[MakeRelay]:
    """Starts relays of a test's own, with settings and a database of its own; they share the state on disk."""
    database_url = make_database()
    with ExitStack() as started:

        def make(session_service_url: str = session_service.url, folder: Path = data_dir, **settings: str) -> Process:
            settings = upstream_settings(upstream.url) | settings
            return started.enter_context(start_relay(database_url, session_service_url, folder, settings))

        yield make


ChatAt = Callable[..., Awaitable[Chat]]


@pytest_asyncio.fixture(loop_scope="session")
async def chat_at(sessions: httpx.AsyncClient, data_dir: Path) -> AsyncIterator[ChatAt]:
    """Makes chats at relays of a test's own."""
    async with AsyncExitStack() as opened:

        async def make(relay: Process, folder: Path = data_dir, **fields: Any) -> Chat:
            http = await opened.enter_async_context(client_of(relay, folder))
            return Chat(http, sessions, **fields)

        yield make


@pytest.fixture
def own_database(make_database: Callable[[], str]) -> str:
    """A database for this test alone."""
    return make_database()


# ── relays whose accounts are made by admin calls (stage.py) ────────────────────────────────────


@pytest.fixture(scope="session")
def pool_database(make_database: Callable[[], str]) -> str:
    """The database that `patient`, `deaf` and `hasty` share."""
    return make_database()


StartOperator = Callable[..., AbstractAsyncContextManager[Operator]]


@pytest.fixture(scope="session")
def start_operator(session_service: ServiceProcess, data_dir: Path) -> StartOperator:
    """Starts a relay on a database, with settings; it has no account but the demo."""

    @asynccontextmanager
    async def start(database_url: str, **settings: str) -> AsyncIterator[Operator]:
        with start_relay(database_url, session_service.url, data_dir, settings) as process:
            async with operating(process, data_dir) as operator:
                yield operator

    return start


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def patient(start_operator: StartOperator, pool_database: str) -> AsyncIterator[Operator]:
    """A relay with the usual settings."""
    async with start_operator(pool_database) as operator:
        yield operator


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def deaf(start_operator: StartOperator, pool_database: str) -> AsyncIterator[Operator]:
    """A relay beside `patient` that never hears a notification."""
    async with start_operator(pool_database, LISTEN_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none") as operator:
        yield operator


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def hasty(start_operator: StartOperator, pool_database: str) -> AsyncIterator[Operator]:
    """A relay that waits for no account, and not for long for anything; it logs everything."""
    settings = {
        "DEBUG": "true",
        "RELAY_RETRY_WAIT_SECONDS": "0",
        "RELAY_CONNECT_TIMEOUT_SECONDS": "1",
        "RELAY_STREAM_SILENCE_SECONDS": "1",
        "RELAY_PLAIN_TIMEOUT_SECONDS": "1",
        "RELAY_DEADLINE_SECONDS": "3",
        "RELAY_PING_SECONDS": "0.5",
    }
    async with start_operator(pool_database, **settings) as operator:
        yield operator


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sql(pool_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to `pool_database`, as a person with psql has it."""
    connection = await asyncpg.connect(pool_database, server_settings={"search_path": "dev"})
    yield connection
    await connection.close()
