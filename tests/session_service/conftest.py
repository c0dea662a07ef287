"""What the black-box tests of session_service share beside tests/conftest.py."""

from collections.abc import AsyncIterator, Callable

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
