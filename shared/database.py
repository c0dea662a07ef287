"""The asyncpg pool, and running SQLAlchemy Core statements on it.

Its one invariant: nothing asyncpg raises leaves this file; callers see rows, DatabaseUnavailable,
or Violation with the constraint's name.

A statement is a module constant, compiled once for the pool's schema into its SQL text and the order of
its parameters. A statement run on `database` is a transaction by itself; `database.transact` runs several
in one, again from the start when Postgres asks for it (serialization failure, deadlock, stale plan).
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import asyncpg
import structlog
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect
from sqlalchemy.sql import ClauseElement

from shared import embedded_postgres
from shared.errors import DatabaseUnavailable
from shared.json import dump_text, loads
from shared.settings import SharedSettings

Row = asyncpg.Record
T = TypeVar("T")

log = structlog.get_logger(__name__)

_DIALECT = asyncpg_dialect.dialect()  # type: ignore[no-untyped-call]
_TRANSACTION_TRIES: Final = 5
# A new connection learns types and statements anew, for which requests wait; an old one carries nothing that grows.
_MOST_QUERIES: Final = 2**31

# Classes of SQLSTATE that mean "not now": connection, resources, operator intervention, timeouts.
_AWAY = ("08", "53", "57", "25006", "55P03")
_AGAIN = frozenset({"40001", "40P01"})
_AWAY_TYPES = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class Violation(Exception):
    """A constraint said no; `constraint` is its name."""

    def __init__(self, constraint: str) -> None:
        self.constraint = constraint
        super().__init__(constraint)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A statement's SQL text and the names of its parameters in the order of $1, $2 …"""

    sql: str
    names: tuple[str, ...]
    constants: dict[str, Any]

    def arguments(self, values: dict[str, Any]) -> list[Any]:
        return [values[name] if name in values else self.constants[name] for name in self.names]


def compile_statement(statement: ClauseElement, schema: str) -> Compiled:
    compiled = statement.compile(dialect=_DIALECT, schema_translate_map={None: schema}, render_schema_translate=True)
    names = tuple(getattr(compiled, "positiontup", None) or ())
    required = {name for name, bind in compiled.binds.items() if bind.required}  # type: ignore[attr-defined]
    constants = {name: value for name, value in compiled.params.items() if name not in required}
    return Compiled(str(compiled), names, constants)


class _Executor(Protocol):
    async def fetch(self, query: str, *args: Any) -> list[Row]: ...


class Conn:
    """A database connection for statements; several run in order, in whatever transaction it stands in."""

    def __init__(self, executor: _Executor, compiled: dict[ClauseElement, Compiled], schema: str) -> None:
        self._executor = executor
        self._compiled = compiled
        self._schema = schema

    def sql(self, statement: ClauseElement) -> Compiled:
        known = self._compiled.get(statement)
        if known is None:
            known = self._compiled[statement] = compile_statement(statement, self._schema)
        return known

    async def rows(self, statement: ClauseElement, **values: Any) -> list[Row]:
        compiled = self.sql(statement)
        return await self._executor.fetch(compiled.sql, *compiled.arguments(values))

    async def row(self, statement: ClauseElement, **values: Any) -> Row | None:
        """The only row, or None; statements used here give one at most."""
        found = await self.rows(statement, **values)
        return found[0] if found else None

    async def value(self, statement: ClauseElement, **values: Any) -> Any:
        found = await self.row(statement, **values)
        return None if found is None else found[0]


def _translated(error: Exception) -> Exception:
    if isinstance(error, asyncpg.PostgresError):
        if isinstance(error, asyncpg.IntegrityConstraintViolationError) and error.constraint_name:
            return Violation(error.constraint_name)
        if (error.sqlstate or "").startswith(_AWAY):
            return DatabaseUnavailable()
        return error
    if isinstance(error, _AWAY_TYPES):
        return DatabaseUnavailable()
    return error


class Writer(Protocol):
    """Where a noun's writes go: to the database itself, or to it together with a record of the answer."""

    async def write(self, work: Callable[[Conn], Awaitable[T]]) -> T: ...

    async def transact(self, work: Callable[[Conn], Awaitable[T]]) -> T: ...


class _Connection(asyncpg.Connection):
    """Sessions of the server carry no state of ours, so there is nothing to reset (and no round trip for it)."""

    def get_reset_query(self) -> str:
        return ""


class Database(Conn):
    """A pool of connections; usable once `open` has returned, `close` waits for what is running."""

    def __init__(
        self,
        url: str,
        *,
        schema: str,
        pool_size: int = 16,
        timeout_seconds: float = 10,
        connect_timeout_seconds: float = 3,
        pooler: str = "none",
        application_name: str = "session-relay",
    ) -> None:
        super().__init__(self, {}, schema)
        self._url = url
        self._pool_size = pool_size
        self._timeout_seconds = timeout_seconds
        self._connect_timeout_seconds = connect_timeout_seconds
        self._pooler = pooler
        self._application_name = application_name
        self._pool: asyncpg.Pool[Row] | None = None

    @property
    def url(self) -> str:
        """Where it is, password included."""
        return self._url

    @property
    def schema(self) -> str:
        return self._schema

    @property
    def is_open(self) -> bool:
        return self._pool is not None

    def pool_use(self) -> tuple[int, int, int]:
        """Connections open, of these idle, and the most there may be."""
        if self._pool is None:
            return 0, 0, self._pool_size
        return self._pool.get_size(), self._pool.get_idle_size(), self._pool_size

    async def open(self) -> None:
        """Connects; raises DatabaseUnavailable when Postgres cannot be reached."""
        timeout_ms = int(self._timeout_seconds * 1000)
        # Behind a pooler in transaction mode the role carries these timeouts: it refuses server_settings.
        server_settings = {
            "application_name": self._application_name,
            "statement_timeout": str(timeout_ms),
            "lock_timeout": str(timeout_ms),
            "idle_in_transaction_session_timeout": str(timeout_ms),
            "timezone": "UTC",
        }
        try:
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=min(2, self._pool_size),
                max_size=self._pool_size,
                timeout=self._connect_timeout_seconds,
                # The server's own timeout speaks first; this one is for a server that no longer speaks.
                command_timeout=self._timeout_seconds + 1,
                server_settings=None if self._pooler == "transaction" else server_settings,
                connection_class=_Connection,
                max_queries=_MOST_QUERIES,
                init=_prepare_codecs,
            )
        except Exception as error:
            raise _translated(error) from error

    async def close(self, timeout_seconds: float = 5) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            await asyncio.wait_for(pool.close(), timeout_seconds)
        except TimeoutError:
            pool.terminate()

    def _opened(self) -> "asyncpg.Pool[Row]":
        if self._pool is None:
            raise DatabaseUnavailable
        return self._pool

    async def fetch(self, query: str, *args: Any) -> list[Row]:
        """Rows of one statement that is a transaction by itself."""
        try:
            async with self._opened().acquire(timeout=self._timeout_seconds) as connection:
                return await connection.fetch(query, *args)
        except Exception as error:
            raise _translated(error) from error

    async def write(self, work: Callable[[Conn], Awaitable[T]]) -> T:
        """Runs `work`, whose statements are transactions by themselves, and only the last of them writes.

        As with `transact`, it may run several times.
        """
        return await _again_if_wanted(lambda: work(self))

    async def transact(self, work: Callable[[Conn], Awaitable[T]]) -> T:
        """Runs `work` in one transaction and gives its value after the commit; raising rolls back.

        `work` may run several times, so it must not reach outside the database.
        """

        async def once() -> T:
            async with (
                self._opened().acquire(timeout=self._timeout_seconds) as connection,
                connection.transaction(),
            ):
                return await work(Conn(connection, self._compiled, self._schema))

        return await _again_if_wanted(once)


async def _again_if_wanted(run: Callable[[], Awaitable[T]]) -> T:
    for attempt in range(1, _TRANSACTION_TRIES + 1):
        try:
            return await run()
        except Exception as error:
            if not _wants_again(error) or attempt == _TRANSACTION_TRIES:
                raise _translated(error) from error
            log.info("transaction_again", attempt=attempt, error=type(error).__name__)
            await asyncio.sleep(0.01 * attempt)
    raise AssertionError("unreachable")


def _wants_again(error: Exception) -> bool:
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return True
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate in _AGAIN


async def _prepare_codecs(connection: "asyncpg.Connection[Row]") -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=dump_text, decoder=loads)


def from_settings(settings: SharedSettings, application_name: str) -> Database:
    """The database that the settings name; the embedded one, started if need be, where they name none."""
    return Database(
        settings.database_url.get_secret_value() or embedded_postgres.start(settings.local_state / "postgres"),
        schema=settings.db_schema,
        pool_size=settings.database_pool_size,
        timeout_seconds=settings.database_timeout_seconds,
        connect_timeout_seconds=settings.database_connect_timeout_seconds,
        pooler=settings.database_pooler,
        application_name=application_name,
    )
