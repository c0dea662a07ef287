"""What the black-box tests of session_service share beside tests/conftest.py."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import httpx
import pytest
import pytest_asyncio

from shared.http_client import http_client
from tests.processes import ServiceProcess
from tests.session_service.calls import Db, User


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def db(database_url: str) -> AsyncIterator[Db]:
    """A connection to the database of the shared service, for looking behind it."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
def user(sessions: httpx.AsyncClient, user_id: str) -> User:
    """A user of the shared service that no other test knows."""
    return User(sessions, user_id)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def crowd(session_service: ServiceProcess) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shared service with as many connections as are asked for at once."""
    async with http_client(read_seconds=60, connect_seconds=60) as client:
        client.base_url = httpx.URL(f"{session_service.url}/api/v1/")
        yield client


@pytest.fixture
def own_database(make_database: Callable[[], str]) -> str:
    """A database for this test alone."""
    return make_database()


@pytest.fixture(autouse=True, scope="module")
def no_faults(scratch: Path) -> Iterator[None]:
    """Whatever the tests of a file do to their services, none says that something was a fault of its own."""
    logs = "session_service-*.log"
    seen = {log: log.stat().st_size for log in scratch.glob(logs)}
    yield
    for log in scratch.glob(logs):
        for line in log.read_bytes()[seen.get(log, 0) :].decode(errors="replace").splitlines():
            said = json.loads(line)
            assert said["level"] != "error" or "logger" in said, line  # libraries have a logger; we do not
