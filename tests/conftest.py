"""The real parts that tests run against: Postgres, Consul, and our services as processes on loopback.

Its one invariant: a test may rely on nothing that another test left; whoever needs a clean slate uses a user of
its own (`user_id`), or a database of its own (`make_database`).
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import httpx
import pytest
import pytest_asyncio

from shared import embedded_postgres
from tests.processes import ROOT, Process, ServiceProcess, free_port, start_consul, start_session_service


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A short path for sockets and state, with room for another user's server below it."""
    path = Path(tempfile.mkdtemp(prefix="srt-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_url(scratch: Path) -> Iterator[str]:
    """A server for this worker alone: TEST_DATABASE_URL, or an embedded one."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    data_dir = scratch / "postgres"
    yield embedded_postgres.start(data_dir)
    embedded_postgres.stop(data_dir)


def _run_in(url: str, sql: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    # In a thread: tests that make a database have a loop running in theirs.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, run()).result()


def _with_database(url: str, name: str) -> str:
    base, _, query = url.partition("?")
    return f"{base.rsplit('/', 1)[0]}/{name}" + (f"?{query}" if query else "")


def migrate(url: str, *arguments: str, schema: str = "dev") -> subprocess.CompletedProcess[str]:
    """Runs Alembic on the database, `upgrade head` by default."""
    command = [sys.executable, "-m", "alembic", *(arguments or ("upgrade", "head"))]
    environment = {**os.environ, "DATABASE_URL": url, "DB_SCHEMA": schema}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)


@pytest.fixture(scope="session")
def template(postgres_url: str) -> Iterator[str]:
    """The name of a migrated database that `make_database` copies."""
    name = f"template_{uuid.uuid4().hex[:12]}"
    _run_in(postgres_url, f'CREATE DATABASE "{name}"')
    migrate(_with_database(postgres_url, name))
    yield name
    _run_in(postgres_url, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def make_database(postgres_url: str, template: str) -> Iterator[Callable[[], str]]:
    """Makes migrated, empty databases and gives their URLs."""
    names: list[str] = []

    def make() -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        _run_in(postgres_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        names.append(name)
        return _with_database(postgres_url, name)

    yield make
    for name in names:
        _run_in(postgres_url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def database_url(make_database: Callable[[], str]) -> str:
    """The database that the tests of this worker share."""
    return make_database()


@pytest.fixture(scope="session")
def session_service(database_url: str, scratch: Path) -> Iterator[ServiceProcess]:
    """The session_service that the tests of this worker share."""
    with start_session_service(database_url, scratch, free_port()) as service:
        yield service


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sessions(session_service: ServiceProcess) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose base is session_service's /api/v1."""
    async with httpx.AsyncClient(base_url=f"{session_service.url}/api/v1", timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def user_id() -> str:
    """A user that no other test knows."""
    return f"user-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def consul(scratch: Path) -> Iterator[Process]:
    """A real Consul agent in development mode."""
    with start_consul(scratch) as agent:
        yield agent
