"""What the black-box tests of session_service share beside tests/conftest.py."""

from collections.abc import AsyncIterator, Callable

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.processes import ServiceProcess
from tests.session_service.calls import User


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def db(database_url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
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
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    url = f"{session_service.url}/api/v1"
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client:
        yield client


@pytest.fixture
def own_database(make_database: Callable[[], str]) -> str:
    """A database for this test alone."""
    return make_database()
