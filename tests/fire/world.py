"""A whole stack as it runs in production: Postgres, Consul, an upstream, any number of stores and relays.

`program` gives what a part's command is started by, for its name and log. `migrated` is the folder of a stopped
Postgres that has the tables, to be copied; without it one is made.

Its one invariant: a part that is started again has the address and the state on disk of the one before. Its secrets
are known here, so that they can be looked for where they must not be.
"""

import asyncio
import base64
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import httpx

from shared import embedded_postgres
from shared.http_client import http_client
from tests.processes import ROOT, Process, free_port, running, start_consul
from tests.relay.stack import RUN_OUT
from tests.session_service.test_outages import processes_of
from tests.upstream.client import TestUpstream

Json = dict[str, Any]
Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

MODEL = "test-model"
SETTINGS = {
    "LOG_LEVEL": "DEBUG",
    "DRAIN_SECONDS": "0",
    "DATABASE_TIMEOUT_SECONDS": "3",
    "DATABASE_CONNECT_TIMEOUT_SECONDS": "2",
    "SWEEP_INTERVAL_SECONDS": "1",
    "NEWS_INTERVAL_SECONDS": "0.2",
    "RELAY_LEASE_SECONDS": "5",
    "RELAY_COMPLETE_TIMEOUT_SECONDS": "2",
    "RELAY_STORE_TIMEOUT_SECONDS": "10",
    "RELAY_RETRY_WAIT_SECONDS": "1",
    "RELAY_REQUESTS_PER_SECOND": "0",
}


def _secret(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(16)}"


@dataclass
class Secrets:
    """Everything that nobody may ever read anywhere; `issued` are the API keys of users."""

    store_token: str = field(default_factory=lambda: _secret("store"))
    admin_token: str = field(default_factory=lambda: _secret("admin"))
    pepper: str = field(default_factory=lambda: _secret("pepper"))
    encryption_key: str = field(default_factory=lambda: base64.b64encode(secrets.token_bytes(32)).decode())
    upstream_keys: list[str] = field(default_factory=lambda: [_secret("upstream") for _ in range(2)])
    issued: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def all(self) -> list[str]:
        fixed = [self.store_token, self.admin_token, self.pepper, self.encryption_key]
        return [*fixed, *self.upstream_keys, *self.issued, *self.others]


@dataclass
class Part:
    """A process that can be killed and started again."""

    name: str
    start_anew: Callable[[], AbstractContextManager[Process]]
    process: Process | None = None

    @property
    def is_up(self) -> bool:
        return self.process is not None and self.process.popen.poll() is None


class World:
    """`parts` are stores, relays and Consul by name (`store-0`, `relay-1`, `consul`); Postgres goes by `postgres`."""

    def __init__(
        self,
        *,
        stores: int = 1,
        relays: int = 1,
        with_consul: bool = False,
        source: Path = ROOT,
        settings: dict[str, str] | None = None,
        program: Callable[[str, Path], list[str]] = lambda _name, _log: [],
        migrated: Path | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fire-"))
        self.folder.chmod(0o755)
        self.source = source
        self.secrets = Secrets()
        self.settings = {**SETTINGS, **(settings or {})}
        self.postgres_dir = self.folder / "pg"
        self.upstream: TestUpstream
        self.http: httpx.AsyncClient
        self.sql_url = ""
        self.database_url = ""  # what services are told; a scenario may put a link before it
        self.upstream_url = ""
        self.store_url = ""
        self._started = ExitStack()
        self._program = program
        self._migrated = migrated
        self.store_ports = [free_port() for _ in range(stores)]
        self.relay_ports = [free_port() for _ in range(relays)]
        self.consul_port = free_port() if with_consul else 0
        self.parts: dict[str, Part] = {}
        if with_consul:
            self._add("consul", lambda: start_consul(self.folder, self.consul_port))
        for number in range(stores):
            self._add(f"store-{number}", lambda number=number: self._store(number))  # type: ignore[misc]
        for number in range(relays):
            self._add(f"relay-{number}", lambda number=number: self._relay(number))  # type: ignore[misc]

    def _add(self, name: str, start_anew: Callable[[], AbstractContextManager[Process]]) -> None:
        self.parts[name] = Part(name, start_anew)

    # ── addresses ───────────────────────────────────────────────────────────────────────────────

    def store(self, number: int = 0) -> str:
        return f"http://127.0.0.1:{self.store_ports[number]}"

    def relay(self, number: int = 0) -> str:
        return f"http://127.0.0.1:{self.relay_ports[number]}"

    @property
    def store_headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets.store_token}"}

    @property
    def admin_headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets.admin_token}"}

    def data_dir(self, relay: int = 0) -> Path:
        return self.folder / f"relay-{relay}"

    def spooled(self) -> list[Path]:
        """Completions that wait on disk. (Drafts of a relay that was killed are none: nobody was told of them.)"""
        return [path for number in range(len(self.relay_ports)) for path in self.data_dir(number).glob("spool/*.json")]

    def set_aside(self) -> list[str]:
        """Completions that the store has refused for good, as they were kept."""
        folders = [self.data_dir(number) / "spool" / "refused" for number in range(len(self.relay_ports))]
        return [path.read_text() for folder in folders for path in folder.glob("*.json")]

    # ── processes ───────────────────────────────────────────────────────────────────────────────

    def _environment(self) -> dict[str, str]:
        consul = {"CONSUL_HOST": "127.0.0.1", "CONSUL_PORT": str(self.consul_port)} if self.consul_port else {}
        return {
            "ENVIRONMENT": "fire",
            "DATABASE_URL": self.database_url or self.sql_url,
            "SESSION_SERVICE_TOKENS": self.secrets.store_token,
            **consul,
            **self.settings,
        }

    def _store(self, number: int) -> AbstractContextManager[Process]:
        port = self.store_ports[number]
        environment = {"SERVICE_PORT": str(port), "DATA_DIR": str(self.folder / f"store-{number}")}
        return self._service("services.session_service.main", port, f"store-{number}", environment)

    def _relay(self, number: int) -> AbstractContextManager[Process]:
        port = self.relay_ports[number]
        environment = {
            "RELAY_PORT": str(port),
            "DATA_DIR": str(self.data_dir(number)),
            "SESSION_SERVICE_URL": self.store_url or self.store(),
            "RELAY_ADMIN_TOKEN": self.secrets.admin_token,
            "RELAY_KEY_PEPPER": self.secrets.pepper,
            "RELAY_ENCRYPTION_KEYS": f"k1:{self.secrets.encryption_key}",
        }
        return self._service("services.relay.main", port, f"relay-{number}", environment)

    def _service(
        self, module: str, port: int, name: str, environment: dict[str, str]
    ) -> AbstractContextManager[Process]:
        log = self.folder / f"{name}.log"
        command = [*self._program(name, log), sys.executable, "-m", module]
        return running(command, port, log, {**self._environment(), **environment}, cwd=self.source)

    async def start(self, name: str, *, wait: bool = True) -> None:
        """Starts the part, and returns once it can serve (a relay: once it answers)."""
        if name == "postgres":
            await asyncio.to_thread(embedded_postgres.start, self.postgres_dir)
            return
        part = self.parts[name]
        if not part.is_up:
            begun = part.start_anew()
            part.process = await asyncio.to_thread(self._started.enter_context, begun)
        if wait and name != "consul":
            assert part.process is not None
            await asyncio.to_thread(part.process.wait_until, "/health/ready", 60)

    def is_up(self, name: str) -> bool:
        return embedded_postgres.is_running(self.postgres_dir) if name == "postgres" else self.parts[name].is_up

    def kill(self, name: str) -> None:
        """SIGKILL; of Postgres all processes, frozen before, so that none writes what another's death told it to."""
        if name == "postgres":
            doomed = processes_of(self.postgres_dir)
            for process in doomed:
                with suppress(Exception):
                    process.suspend()
            for process in doomed:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            return
        process = self.parts[name].process
        if process is not None:
            process.kill()

    def process(self, name: str) -> Process:
        process = self.parts[name].process
        assert process is not None
        return process

    async def revive(self) -> None:
        """Starts what does not run; returns once all of it can serve."""
        await self.start("postgres")
        if "consul" in self.parts:
            await self.start("consul")
        await asyncio.gather(*map(self.start, self.parts))

    # ── state ───────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def sql(self) -> AsyncIterator[Sql]:
        connection = await asyncpg.connect(self.sql_url)
        try:
            yield connection
        finally:
            await connection.close()

    async def leases_run_out(self) -> None:
        """As if whatever is held by lease now had been left by its holder long ago."""
        async with self.sql() as connection:
            for statement in RUN_OUT:
                await connection.execute(statement)

    def fsck(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "services.session_service.fsck"]
        environment = {"DATABASE_URL": self.sql_url, "ENVIRONMENT": "test", "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    async def make_key(self, user_id: str, **fields: Any) -> str:
        """A new API key of this user."""
        body = {"name": f"key of {user_id}"[:100], "userId": user_id, **fields}
        answer = await self.http.post(f"{self.relay()}/admin/api-keys", json=body, headers=self.admin_headers)
        assert answer.status_code == 200, answer.text
        key = str(answer.json()["data"]["apiKey"])
        self.secrets.issued.append(key)
        return key

    async def make_account(self, number: int, **fields: Any) -> None:
        body = {
            "id": f"account-{number}",
            "name": f"account {number}",
            "base_url": self.upstream_url or self.upstream.url,
            "api_key": self.secrets.upstream_keys[number],
            **fields,
        }
        answer = await self.http.post(f"{self.relay()}/admin/accounts", json=body, headers=self.admin_headers)
        assert answer.status_code == 200, answer.text

    def logs(self) -> dict[str, str]:
        return {path.name: path.read_text(errors="replace") for path in self.folder.glob("*.log")}

    # ── life ────────────────────────────────────────────────────────────────────────────────────

    async def _open(self) -> None:
        if self._migrated is not None:
            copy = ["cp", "-a", str(self._migrated), str(self.postgres_dir)]
            await asyncio.to_thread(lambda: subprocess.run(copy, check=True))
        self.sql_url = await asyncio.to_thread(embedded_postgres.start, self.postgres_dir)
        if self._migrated is None:
            await self._migrate()
        self.upstream = self._started.enter_context(TestUpstream.started())

    async def _migrate(self) -> None:
        migration = [sys.executable, "-m", "alembic", "upgrade", "head"]
        environment = {**os.environ, "DATABASE_URL": self.sql_url, "DB_SCHEMA": "dev"}
        done = await asyncio.to_thread(
            subprocess.run,
            migration,
            cwd=self.source,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    async def close(self) -> None:
        await self.http.aclose()
        for name in self.parts:
            self.kill(name)  # nothing of it is needed any more
        await asyncio.to_thread(self._started.close)
        await asyncio.to_thread(embedded_postgres.stop, self.postgres_dir)


@asynccontextmanager
async def world(
    *, prepare: Callable[[World], Any] | None = None, accounts: int = 2, keep: bool = False, **options: Any
) -> AsyncIterator[World]:
    """A world, all of it started, with accounts; `prepare` may put links before its parts begin."""
    made = World(**options)
    made.http = http_client(read_seconds=30, connect_seconds=3)
    try:
        await made._open()
        if prepare is not None:
            await prepare(made)
        await made.revive()
        for number in range(accounts):
            await made.make_account(number)
        yield made
    finally:
        await made.close()
        if not keep:
            shutil.rmtree(made.folder, ignore_errors=True)


def new_marker() -> str:
    """A text that belongs to one user alone and can be found anywhere."""
    return f"mk{uuid.uuid4().hex[:16]}km"
