"""A store and a relay of a test's own, on one database, to be frozen, killed and started again.

Its one invariant: whatever is started again has the address and the state on disk of the one before.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg
import httpx

from tests.processes import ROOT, Process, free_port, start_session_service
from tests.relay.calls import Chat, client_of, start_relay, upstream_settings
from tests.upstream.client import TestUpstream

_LONG_AGO = "now() - interval '1 hour'"
_KEYS_RUN_OUT = f"UPDATE dev.relay_idempotency SET lease_expires_at = {_LONG_AGO} WHERE status = 'running'"
RUN_OUT = (
    _KEYS_RUN_OUT,
    f"UPDATE dev.session_turns SET lease_expires_at = {_LONG_AGO} WHERE status = 'open'",
    f"UPDATE dev.sessions SET lease_expires_at = {_LONG_AGO} WHERE lease_expires_at IS NOT NULL",
    f"UPDATE dev.relay_slots SET expires_at = {_LONG_AGO} WHERE relay_id IS NOT NULL",
)
NEWS = "SELECT count(*) FROM dev.sessions WHERE indexed_version < version"


class Stack:
    """`store` and `relay` are the ones started last; `http` and `sessions` go to whichever runs at their address."""

    def __init__(
        self, database_url: str, upstream: TestUpstream, folder: Path, started: ExitStack, settings: Mapping[str, str]
    ) -> None:
        self.database_url = database_url
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.upstream = upstream
        self._started = started
        self._settings = settings
        self._store_port, self._relay_port = free_port(), free_port()
        self.store: Process
        self.relay: Process
        self.http: httpx.AsyncClient
        self.sessions: httpx.AsyncClient

    def start_store(self, **settings: str) -> None:
        settings = {"NEWS_INTERVAL_SECONDS": "0.05", **self._settings, **settings}
        service = start_session_service(self.database_url, self.folder, self._store_port, True, **settings)
        self.store = self._started.enter_context(service)

    def start_relay(self, **settings: str) -> None:
        settings = upstream_settings(self.upstream.url) | {"RELAY_LEASE_SECONDS": "5"} | dict(self._settings) | settings
        url = f"http://127.0.0.1:{self._store_port}"
        relay = start_relay(self.database_url, url, self.folder, settings, port=self._relay_port)
        self.relay = self._started.enter_context(relay)

    @contextmanager
    def relay_with(self, **settings: str) -> Iterator[None]:
        """A relay with these settings in place of the usual one while inside."""
        self.relay.kill()
        self.start_relay(**settings)
        try:
            yield
        finally:
            self.relay.kill()
            self.start_relay()

    def revive(self) -> None:
        """Starts what does not run."""
        if self.store.popen.poll() is not None:
            self.start_store()
        if self.relay.popen.poll() is not None:
            self.start_relay()

    def chat(self) -> Chat:
        """A new session."""
        return Chat(self.http, self.sessions)

    def spooled(self) -> list[Path]:
        """The completions that wait on disk, or were set aside."""
        return list((self.folder / "spool").rglob("*.json"))

    @asynccontextmanager
    async def sql(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def locked(self, statement: str, *arguments: object) -> AsyncIterator["Lock"]:
        """What the statement locks is locked while inside."""
        async with self.sql() as holder, self.sql() as watcher, holder.transaction():
            await holder.execute(statement, *arguments)
            yield Lock(holder.get_server_pid(), watcher)

    async def keys_run_out(self) -> None:
        """As if the tries of idempotent requests that run now had been left by their relay long ago."""
        async with self.sql() as connection:
            await connection.execute(_KEYS_RUN_OUT)

    async def leases_run_out(self) -> None:
        """As if every lease and slot that is held now had been left by its holder long ago."""
        async with self.sql() as connection:
            for statement in RUN_OUT:
                await connection.execute(statement)

    async def check(self) -> None:
        """The record agrees with itself, sums included, and nothing waits on disk."""
        left = {path.name: path.read_text() for path in self.spooled()}
        assert left == {}, left
        async with asyncio.timeout(15), self.sql() as connection:
            while await connection.fetchval(NEWS):
                await asyncio.sleep(0.05)
        checked = await asyncio.to_thread(_fsck, self.database_url)
        assert (checked.returncode, checked.stdout) == (0, ""), checked.stdout


class Lock:
    """A lock in the database, and who waits for it."""

    def __init__(self, pid: int, watcher: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._pid = pid
        self._watcher = watcher

    async def waited_for(self, seconds: float = 10) -> None:
        """Returns once somebody waits for it."""
        async with asyncio.timeout(seconds):
            while not await self._watcher.fetchval(f"SELECT count(*) {_WAITING}", self._pid):
                await asyncio.sleep(0.01)

    async def end_waiting(self) -> None:
        """Those who wait never get it: what a killed process has asked, Postgres would still do."""
        while await self._watcher.fetchval(f"SELECT count(pg_terminate_backend(pid)) {_WAITING}", self._pid):
            await asyncio.sleep(0.01)


_WAITING = "FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid))"


def _fsck(url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.session_service.fsck"]
    environment = {"DATABASE_URL": url, "ENVIRONMENT": "test", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@asynccontextmanager
async def stack_of(database_url: str, upstream: TestUpstream, folder: Path, **settings: str) -> AsyncIterator[Stack]:
    """A stack, both of its services started, with these settings."""
    with ExitStack() as started:
        stack = Stack(database_url, upstream, folder, started, settings)
        stack.start_store()
        stack.start_relay()
        base = f"{stack.store.url}/api/v1"
        async with (
            client_of(stack.relay, folder) as stack.http,
            httpx.AsyncClient(base_url=base, timeout=30, trust_env=False) as stack.sessions,
        ):
            yield stack


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process does nothing while inside; what is sent to it waits."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def frozen_upstream(upstream: TestUpstream) -> Iterator[None]:
    """Upstream takes requests and answers none; it cannot be scripted or asked meanwhile."""
    assert upstream._process is not None
    with frozen(upstream._process.pid):
        yield
