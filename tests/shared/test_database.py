"""Statements on a real Postgres: transactions whole or not at all, again where Postgres asks for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from sqlalchemy.dialects.postgresql import JSON, JSONB

from shared.database import Conn, Database, Violation, compile_statement
from shared.errors import DatabaseUnavailable
from tests.shared.test_json import values

metadata = sa.MetaData()
numbers = sa.Table(
    "numbers",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("value", sa.Numeric),
    sa.Column("doc", JSONB),
    sa.Column("raw", JSON),
    sa.Column("made_at", sa.TIMESTAMP(timezone=True)),
)
CREATE = (
    "CREATE SCHEMA odd_name; CREATE TABLE odd_name.numbers (id integer CONSTRAINT numbers_pk PRIMARY KEY,"
    " value numeric CONSTRAINT numbers_small CHECK (value < 1000), doc jsonb, raw json, made_at timestamptz)"
)
PUT = sa.insert(numbers).values(id=sa.bindparam("id"), value=sa.bindparam("value")).returning(numbers.c.id)
PUT_DOC = sa.insert(numbers).values(
    id=sa.bindparam("id"), doc=sa.bindparam("doc", type_=JSONB), raw=sa.bindparam("raw", type_=JSON)
)
GET = sa.select(numbers.c.value).where(numbers.c.id == sa.bindparam("id"))
GET_DOC = sa.select(numbers.c.doc, numbers.c.raw).where(numbers.c.id == sa.bindparam("id"))
ADD = (
    sa.update(numbers)
    .where(numbers.c.id == sa.bindparam("id"))
    .values(value=numbers.c.value + sa.bindparam("more", type_=sa.Numeric))
    .returning(numbers.c.value)
)
COUNT = sa.select(sa.func.count()).select_from(numbers)
NOW = sa.select(sa.func.now())
SLEEP = sa.select(sa.func.pg_sleep(sa.bindparam("seconds", type_=sa.Float)))


@pytest.fixture(scope="module")
def url(make_database: Callable[[], str]) -> str:
    return make_database()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def database(url: str) -> AsyncIterator[Database]:
    connection = await asyncpg.connect(url)
    await connection.execute(CREATE)
    await connection.close()
    opened = Database(url, schema="odd_name", pool_size=8, timeout_seconds=1.5, connect_timeout_seconds=0.5)
    await opened.open()
    yield opened
    await opened.close()


ids = iter(range(1, 10**9))


async def made(database: Database, value: Any = 0) -> int:
    number = next(ids)
    await database.row(PUT, id=number, value=Decimal(value))
    return number


async def test_rows_and_values(database: Database) -> None:
    number = await made(database, "12.345678")
    assert await database.value(GET, id=number) == Decimal("12.345678")
    assert await database.row(GET, id=-1) is None
    assert await database.value(GET, id=-1) is None
    assert await database.rows(GET, id=-1) == []
    moment = await database.value(NOW)
    assert isinstance(moment, datetime)
    assert moment.utcoffset() == datetime.now(UTC).utcoffset()


def test_statements_are_compiled_for_the_schema_with_their_parameters_in_order() -> None:
    compiled = compile_statement(ADD, "odd_name")
    assert "odd_name.numbers" in compiled.sql
    assert set(compiled.names) == {"id", "more"}
    assert compiled.arguments({"more": 1, "id": 2}) == [{"more": 1, "id": 2}[name] for name in compiled.names]
    with_constant = compile_statement(
        sa.select(numbers.c.id).where(numbers.c.value == 5, numbers.c.id == sa.bindparam("id")), "s"
    )
    assert sorted(with_constant.arguments({"id": 3})) == [3, 5]
    with pytest.raises(KeyError):
        compiled.arguments({"id": 2})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(doc=values.filter(lambda value: value is not None))
async def test_json_columns_give_back_what_was_put_in(database: Database, doc: Any) -> None:
    number = next(ids)
    await database.rows(PUT_DOC, id=number, doc=None, raw={"doc": doc})
    row = await database.row(GET_DOC, id=number)
    assert row is not None
    assert row["doc"] is None
    assert repr(row["raw"]) == repr({"doc": doc})


async def test_a_violated_constraint_is_told_by_its_name(database: Database) -> None:
    number = await made(database)
    with pytest.raises(Violation) as raised:
        await database.row(PUT, id=number, value=Decimal(1))
    assert raised.value.constraint == "numbers_pk"
    with pytest.raises(Violation) as raised:
        await database.row(ADD, id=number, more=Decimal(10_000))
    assert raised.value.constraint == "numbers_small"
    assert await database.value(GET, id=number) == 0


async def test_a_transaction_is_whole_or_not_at_all(database: Database) -> None:
    number = await made(database)

    async def work(conn: Conn) -> None:
        await conn.row(ADD, id=number, more=Decimal(5))
        assert await conn.value(GET, id=number) == 5
        assert await database.value(GET, id=number) == 0
        raise LookupError

    with pytest.raises(LookupError):
        await database.transact(work)
    assert await database.value(GET, id=number) == 0

    async def violate(conn: Conn) -> None:
        await conn.row(ADD, id=number, more=Decimal(5))
        await conn.row(PUT, id=number, value=Decimal(0))

    with pytest.raises(Violation):
        await database.transact(violate)
    assert await database.value(GET, id=number) == 0

    async def fine(conn: Conn) -> int:
        await conn.row(ADD, id=number, more=Decimal(5))
        return 7

    assert await database.transact(fine) == 7
    assert await database.value(GET, id=number) == 5


async def test_a_cancelled_transaction_leaves_nothing_and_gives_its_connection_back(database: Database) -> None:
    number = await made(database)
    for _ in range(20):
        entered = asyncio.Event()

        async def work(conn: Conn, entered: asyncio.Event = entered) -> None:
            await conn.row(ADD, id=number, more=Decimal(5))
            entered.set()
            await conn.rows(SLEEP, seconds=0.5)

        task = asyncio.create_task(database.transact(work))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    values = await asyncio.gather(*(database.value(GET, id=number) for _ in range(20)))
    assert set(values) == {0}


async def test_a_deadlock_is_resolved_by_trying_again(database: Database, url: str) -> None:
    one, two = await made(database), await made(database)
    # Postgres looks for deadlocks after a second, which a statement must be allowed to wait for.
    patient = Database(url, schema="odd_name", pool_size=2, timeout_seconds=20)
    await patient.open()
    both = asyncio.Barrier(2)
    tries: list[int] = []

    def work(first: int, second: int) -> Callable[[Conn], Any]:
        async def locked(conn: Conn) -> None:
            tries.append(first)
            await conn.row(ADD, id=first, more=Decimal(1))
            if len(tries) <= 2:
                await both.wait()
            await conn.row(ADD, id=second, more=Decimal(1))

        return locked

    try:
        await asyncio.gather(patient.transact(work(one, two)), patient.transact(work(two, one)))
    finally:
        await patient.close()
    assert len(tries) == 3
    assert [await database.value(GET, id=each) for each in (one, two)] == [2, 2]


async def test_a_statement_goes_on_after_its_table_was_altered(database: Database, url: str) -> None:
    """Prepared statements of every connection in the pool are stale then."""
    number = await made(database, 3)
    star: sa.Select[Any] = (
        sa.select(sa.literal_column("*")).select_from(numbers).where(numbers.c.id == sa.bindparam("id"))
    )
    await asyncio.gather(*(database.rows(star, id=number) for _ in range(16)))
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER TABLE odd_name.numbers ADD COLUMN more text")
    await connection.close()
    for rows in await asyncio.gather(*(database.rows(star, id=number) for _ in range(16))):
        assert rows[0]["value"] == 3

    async def work(conn: Conn) -> Any:
        return await conn.value(GET, id=number)

    assert await database.transact(work) == 3


async def test_a_statement_that_takes_too_long(database: Database) -> None:
    began = asyncio.get_running_loop().time()
    with pytest.raises(DatabaseUnavailable) as raised:
        await database.rows(SLEEP, seconds=30.0)
    assert asyncio.get_running_loop().time() - began < 4
    assert raised.value.headers() == {"retry-after": "1"}
    assert await database.value(COUNT) >= 0


async def test_more_callers_than_connections_wait_their_turn_and_then_give_up(database: Database) -> None:
    quick = await asyncio.gather(*(database.rows(SLEEP, seconds=0.01) for _ in range(100)))
    assert len(quick) == 100
    answers = await asyncio.gather(*(database.rows(SLEEP, seconds=0.8) for _ in range(24)), return_exceptions=True)
    assert sum(isinstance(each, list) for each in answers) == 16
    assert sum(isinstance(each, DatabaseUnavailable) for each in answers) == 8
    size, idle, most = database.pool_use()
    assert (size <= most, most, idle <= size) == (True, 8, True)


async def test_a_server_that_is_not_there() -> None:
    for url in ("postgresql://postgres@127.0.0.1:1/x", "postgresql://postgres@/x?host=/nowhere"):
        database = Database(url, schema="s", connect_timeout_seconds=1)
        assert not database.is_open
        with pytest.raises(DatabaseUnavailable):
            await database.value(NOW)
        with pytest.raises(DatabaseUnavailable):
            await database.open()
        assert not database.is_open
        await database.close()


async def test_after_closing_there_is_no_database(url: str) -> None:
    database = Database(url, schema="odd_name", pool_size=2)
    await database.open()
    running = asyncio.create_task(database.rows(SLEEP, seconds=0.3))
    await asyncio.sleep(0.05)
    await database.close()
    assert len(await running) == 1
    with pytest.raises(DatabaseUnavailable):
        await database.value(NOW)
    await database.close()
