"""The real stack that is measured: one Postgres, databases in it, our services and yardsticks as processes.

Its one invariant: nothing here was used before, and all of it ends and is removed with the run.
"""

import asyncio
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import asyncpg
import psutil

from shared import embedded_postgres
from tests.conftest import migrate
from tests.processes import Process, free_port, running, start_session_service
from tests.relay.calls import start_relay, upstream_settings
from tests.upstream.client import TestUpstream

USER = "dev"
"""Whose sessions the relay's development key works on."""
QUIET = {"RELAY_SUMMARIES": "false", "RELAY_REQUESTS_PER_SECOND": "0", "RELAY_MAX_SESSIONS": "100000000"}
"""The relay does a client's work and no other, and no limit is measured."""
_INDEX_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how often: each round measures the thing and its yardstick, one right after the other."""

    name: str
    rounds: int
    seconds: float
    streams: int
    turns: int
    sessions: int
    long_session: int
    held_events: int = 60

    @property
    def seconds_long(self) -> float:
        """For percentiles, which need more."""
        return self.seconds * 2


QUICK = Pace("quick", rounds=1, seconds=0.7, streams=100, turns=300, sessions=3_000, long_session=1_500, held_events=16)
NORMAL = Pace("normal", rounds=3, seconds=2.5, streams=1_000, turns=5_000, sessions=100_000, long_session=100_000)
LONG = Pace("long", rounds=5, seconds=5, streams=1_000, turns=100_000, sessions=1_000_000, long_session=100_000)


@dataclass(eq=False)
class Stack:
    """One run's Postgres and its databases, in `folder`; what is in `kept` lives as long as the run."""

    folder: Path
    pace: Pace
    postgres_url: str
    kept: ExitStack
    _template: str = field(default_factory=lambda: f"template_{uuid.uuid4().hex[:8]}")

    def run_sql(self, sql: str, url: str | None = None, *arguments: object) -> Any:
        """The first value of what the statement gives."""

        async def ask() -> Any:
            connection = await asyncpg.connect(url or self.postgres_url)
            try:
                return await connection.fetchval(sql, *arguments)
            finally:
                await connection.close()

        return asyncio.run(ask())

    def wait_for_index(self, url: str) -> None:
        """Until search and sums have caught up with what was written."""
        until = monotonic() + _INDEX_SECONDS
        while self.run_sql("SELECT count(*) FROM dev.sessions WHERE indexed_version < version", url):
            if monotonic() > until:
                raise TimeoutError(f"not everything is indexed after {_INDEX_SECONDS} s")
            sleep(0.1)

    def make_template(self) -> None:
        self.run_sql(f'CREATE DATABASE "{self._template}"')
        migrate(self._url_of(self._template))

    def database(self) -> str:
        """The URL of a new, migrated, empty database."""
        name = f"bench_{uuid.uuid4().hex[:8]}"
        self.run_sql(f'CREATE DATABASE "{name}" TEMPLATE "{self._template}"')
        return self._url_of(name)

    def empty_database(self) -> str:
        """The URL of a new database without a schema, for others than us."""
        name = f"bench_{uuid.uuid4().hex[:8]}"
        self.run_sql(f'CREATE DATABASE "{name}"')
        return self._url_of(name)

    def _url_of(self, name: str) -> str:
        base, _, query = self.postgres_url.partition("?")
        return f"{base.rsplit('/', 1)[0]}/{name}?{query}"

    def store(self, database_url: str, **settings: str) -> AbstractContextManager[Process]:
        """A session_service on this database."""
        return start_session_service(database_url, self.folder, free_port(), True, **settings)

    def upstream(self) -> TestUpstream:
        return TestUpstream.started(log_limit=10)

    def relay(self, database_url: str, store: Process, upstream_url: str) -> AbstractContextManager[Process]:
        """A relay in front of this upstream; its development key is `key`."""
        settings = upstream_settings(upstream_url) | QUIET
        return start_relay(database_url, store.url, self.folder / "relay", settings)

    @property
    def key(self) -> str:
        return (self.folder / "relay" / "api.key").read_text().strip()

    @contextmanager
    def module(self, name: str, path: str, **environment: str) -> Iterator[Process]:
        """A process of a module of ours that listens on $PORT and answers 200 at `path` once it is ready."""
        port = free_port()
        command = [sys.executable, "-m", name]
        log = self.folder / f"{name}-{port}.log"
        with running(command, port, log, {"PORT": str(port), **environment}) as process:
            process.wait_until(path)
            yield process


@contextmanager
def stack_of(pace: Pace) -> Iterator[Stack]:
    """A Postgres of its own in a short path, the template made."""
    folder = Path(tempfile.mkdtemp(prefix="srb-"))
    folder.chmod(0o755)
    data_dir = folder / "postgres"
    try:
        url = embedded_postgres.start(data_dir)
        with ExitStack() as kept:
            stack = Stack(folder, pace, url, kept)
            stack.make_template()
            yield stack
    finally:
        embedded_postgres.stop(data_dir)
        shutil.rmtree(folder, ignore_errors=True)


def memory_bytes(process: Process) -> int:
    """What the process has for itself alone: memory that would be free without it."""
    return int(psutil.Process(process.pid).memory_full_info().uss)
