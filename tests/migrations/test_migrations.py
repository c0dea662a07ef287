"""Migrations: up and down with data in the tables, equal to the metadata, safe for several processes at once."""

import ast
import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import services.relay.attachment_schema
import services.relay.conversation_schema  # noqa: F401 - tables of the same metadata
from services.relay.schema import metadata as relay_metadata
from services.session_service.schema import metadata as session_metadata
from shared.http_client import http_client
from tests.conftest import migrate
from tests.processes import ROOT, free_port, start_session_service
from tests.session_service.calls import Chat, Db, Json, User, fine, said

VERSIONS = ROOT / "migrations" / "versions"
TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = $1 ORDER BY 1"


@pytest.fixture
def empty_database(postgres_url: str, make_database: Callable[[], str]) -> str:
    """A database without any schema of ours."""
    url = make_database()

    async def drop() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute("DROP SCHEMA dev CASCADE")
        await connection.close()

    asyncio.run(drop())
    return url


def alembic(url: str, *arguments: str, schema: str = "dev") -> "subprocess.Popen[str]":
    """Alembic as a process of its own, just begun."""
    environment = {**os.environ, "DATABASE_URL": url, "DB_SCHEMA": schema}
    command = [sys.executable, "-m", "alembic", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


async def tables_of(db: Db, schema: str = "dev") -> list[str]:
    return [row[0] for row in await db.fetch(TABLES, schema)]


async def talk(url: str, scratch: Path, text: str, schema: str = "dev") -> Json:
    """A service on this schema takes a turn, a memory and a keyed message; gives what it then shows."""
    with start_session_service(url, scratch, free_port(), DB_SCHEMA=schema) as service:
        async with http_client(read_seconds=20, connect_seconds=5) as http:
            http.base_url = httpx.URL(f"{service.url}/api/v1/")
            chat = Chat(User(http, "user"), "session")
            turn = await chat.open(said(text), create_session={})
            await turn.complete(said("answer", "assistant"), usage={"output_tokens": 3}, cost_usd=0.5)
            await chat.remember(text)
            fine(await chat.call("POST", "/messages", json=said("keyed"), headers={"Idempotency-Key": "k"}))
            return await chat.messages()


# ── up and down ─────────────────────────────────────────────────────────────────────────────────


async def test_down_and_up_again_with_data(empty_database: str, scratch: Path) -> None:
    url = empty_database
    migrate(url)
    shown = await talk(url, scratch, "before")
    assert shown["total"] == 3
    db = await asyncpg.connect(url)
    head = await db.fetchval("SELECT version_num FROM dev.alembic_version")
    revisions = sorted(path.name.split("_")[0] for path in VERSIONS.glob("*.py"))
    assert head == revisions[-1]
    assert await tables_of(db) == sorted(["alembic_version", *session_metadata.tables, *relay_metadata.tables])
    # Step by step: what a later migration takes away is not what an earlier one made.
    for revision in revisions[-2::-1]:
        migrate(url, "downgrade", revision)
        assert await db.fetchval("SELECT version_num FROM dev.alembic_version") == revision
        assert await db.fetchval("SELECT count(*) FROM dev.session_messages") == 3
    migrate(url, "downgrade", "base")
    assert await tables_of(db) == ["alembic_version"]
    left = "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'dev'"
    assert await db.fetchval(left) == 2  # Alembic's own table and its key
    assert (
        await db.fetchval(
            "SELECT count(*) FROM pg_type t JOIN pg_namespace n ON n.oid = typnamespace WHERE nspname = 'dev'"
        )
        == 2
    )
    migrate(url)
    assert (await talk(url, scratch, "after"))["total"] == 3
    await db.close()


async def test_upgrade_again_changes_nothing(own: str) -> None:
    db = await asyncpg.connect(own)
    before = await shape(db, "dev")
    migrate(own)
    assert await shape(db, "dev") == before
    await db.close()


async def test_one_who_was_given_a_schema_need_not_be_able_to_make_one(empty_database: str) -> None:
    role = f"role_{uuid.uuid4().hex[:12]}"
    owner = await asyncpg.connect(empty_database)
    await owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{role}'")
    try:
        address = urlsplit(empty_database)
        host = address.netloc.rpartition("@")[2]
        url = address._replace(netloc=f"{role}:{role}@{host}").geturl()
        refused = await asyncio.to_thread(finish, alembic(url, "upgrade", "head"))
        assert "permission denied for database" in refused
        await owner.execute(f"CREATE SCHEMA dev AUTHORIZATION {role}")
        await asyncio.to_thread(migrate, url)
        assert "sessions" in await tables_of(owner)
    finally:
        await owner.execute(f"DROP OWNED BY {role} CASCADE")
        await owner.execute(f"DROP ROLE {role}")
        await owner.close()


def finish(process: "subprocess.Popen[str]") -> str:
    """What a process that fails has written."""
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode not in {0, None}, stdout + stderr
    return stdout + stderr


async def test_a_database_of_a_newer_version_is_refused_by_name(own: str) -> None:
    db = await asyncpg.connect(own)
    await db.execute("UPDATE dev.alembic_version SET version_num = '9999'")
    before = await shape(db, "dev")
    refused = await asyncio.to_thread(finish, alembic(own, "upgrade", "head"))
    assert "the database was migrated by a newer version of this project" in refused
    assert "'9999'" in refused
    assert await shape(db, "dev") == before
    await db.close()


# ── equal to the metadata ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def own(make_database: Callable[[], str]) -> str:
    """A migrated database for this test alone."""
    return make_database()


async def shape(db: Db, schema: str) -> dict[str, list[tuple[Any, ...]]]:
    """All that Postgres knows of a schema's tables: columns, constraints, indexes, by name and definition."""
    queries = {
        "columns": "SELECT table_name, column_name, data_type, udt_name, is_nullable, column_default, collation_name,"
        " numeric_precision, numeric_scale FROM information_schema.columns WHERE table_schema = $1",
        "constraints": "SELECT conrelid::regclass::text, conname, contype, pg_get_constraintdef(c.oid)"
        " FROM pg_constraint c JOIN pg_namespace n ON n.oid = connamespace WHERE nspname = $1 AND contype <> 'n'",
        "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = $1",
        "storage": "SELECT relname, reloptions::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
        " WHERE nspname = $1 AND relkind IN ('r', 'i')",
    }
    found = {}
    for name, query in queries.items():
        rows = [tuple(str(value).replace(f"{schema}.", "") for value in row) for row in await db.fetch(query, schema)]
        found[name] = sorted(row for row in rows if "alembic_version" not in row[0])
    return found


async def test_the_head_is_the_metadata(own: str) -> None:
    """To the last constraint: a schema made from the metadata is the same as the migrated one."""
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(own), poolclass=NullPool
    )
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE SCHEMA made"))
        translated = await connection.execution_options(schema_translate_map={None: "made"})
        for metadata in (session_metadata, relay_metadata):
            await translated.run_sync(metadata.create_all)
    await engine.dispose()
    db = await asyncpg.connect(own)
    made, migrated = await shape(db, "made"), await shape(db, "dev")
    await db.close()
    for part, rows in made.items():
        assert migrated[part] == rows, part
    for table, name, *_ in migrated["constraints"]:
        assert name.startswith(table), "every constraint has a name of its own"


async def test_alembic_check(own: str) -> None:
    assert "No new upgrade operations detected" in migrate(own, "check").stdout
    db = await asyncpg.connect(own)
    await db.execute("ALTER TABLE dev.sessions ADD COLUMN forgotten text")
    await db.close()
    with pytest.raises(subprocess.CalledProcessError) as failed:
        migrate(own, "check")
    assert "forgotten" in failed.value.stdout + failed.value.stderr


# ── at once, and beside others ──────────────────────────────────────────────────────────────────


async def test_five_at_once(empty_database: str) -> None:
    processes = [alembic(empty_database, "upgrade", "head") for _ in range(5)]
    for process in processes:
        _, errors = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0, errors
    db = await asyncpg.connect(empty_database)
    assert len(await db.fetch("SELECT version_num FROM dev.alembic_version")) == 1
    assert "session_messages" in await tables_of(db)
    held = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND datname = current_database()"
    assert await db.fetchval(f"{held} WHERE locktype = 'advisory'") == 0
    await db.close()


async def test_a_migration_does_not_wait_for_a_lock_for_long(own: str) -> None:
    """It fails, changes nothing, and can be run again; until then nobody queues behind it for longer."""
    blocker, db = await asyncpg.connect(own), await asyncpg.connect(own)
    tables, head = await tables_of(db), await db.fetchval("SELECT version_num FROM dev.alembic_version")
    async with blocker.transaction():
        for table in tables:
            await blocker.execute(f"SELECT FROM dev.{table} LIMIT 0")
        began = time.monotonic()
        process = alembic(own, "downgrade", "base")
        _, errors = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode != 0
        assert "lock timeout" in errors
        assert time.monotonic() - began < 20
    assert (await tables_of(db), await db.fetchval("SELECT version_num FROM dev.alembic_version")) == (tables, head)
    migrate(own, "downgrade", "base")
    assert await tables_of(db) == ["alembic_version"]
    for each in (blocker, db):
        await each.close()


async def test_an_index_on_a_table_that_is_there_waits_for_whoever_reads_and_stops_nobody(own: str) -> None:
    """For longer than a lock may be waited for; what a run that was broken off has left is replaced."""
    migrate(own, "downgrade", "0004")
    reader, db = await asyncpg.connect(own), await asyncpg.connect(own)
    await db.execute("CREATE INDEX session_turns_by_turn_id_idx ON dev.session_turns (user_id)")
    await db.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'dev.session_turns_by_turn_id_idx'::regclass"
    )
    async with reader.transaction(isolation="repeatable_read"):
        await reader.execute("SELECT FROM dev.session_turns")
        others = [alembic(own, "upgrade", "head") for _ in range(2)]
        await asyncio.sleep(7)
        assert [process.poll() for process in others] == [None, None]
        async with asyncio.timeout(1):
            await db.execute("UPDATE dev.session_turns SET user_id = user_id")
    for process in others:
        _, errors = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0, errors
    made = "SELECT indisvalid, pg_get_indexdef(indexrelid) FROM pg_index WHERE indexrelid = $1::regclass"
    is_valid, definition = await db.fetchrow(made, "dev.session_turns_by_turn_id_idx") or (None, None)
    assert is_valid
    assert str(definition).endswith("(user_id, turn_id)")
    for each in (reader, db):
        await each.close()


async def test_two_schemas_side_by_side(empty_database: str, scratch: Path) -> None:
    url = empty_database
    for schema in ("one", "two"):
        migrate(url, schema=schema)
    shown = [await talk(url, scratch, f"in {schema}", schema) for schema in ("one", "two")]
    assert [each["messages"][0]["content"] for each in shown] == ["in one", "in two"]
    assert [each["total"] for each in shown] == [3, 3]
    db = await asyncpg.connect(url)
    assert await tables_of(db, "one") == await tables_of(db, "two")
    assert await tables_of(db, "public") == await tables_of(db, "dev") == []
    migrate(url, "downgrade", "base", schema="one")
    assert await tables_of(db, "one") == ["alembic_version"]
    assert await db.fetchval("SELECT count(*) FROM two.session_messages") == 3
    await db.close()


async def test_no_database() -> None:
    process = alembic("postgresql://someone:hunter2@127.0.0.1:9/none", "upgrade", "head")
    output, errors = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode != 0
    assert "Postgres cannot be used" in output + errors
    assert "hunter2" not in output + errors
    assert "Traceback" not in output + errors


# ── what every migration keeps to ───────────────────────────────────────────────────────────────


def calls_in(path: Path, name: str) -> list[ast.Call]:
    """The calls of `op.name` in a migration's upgrade."""
    tree = ast.parse(path.read_text())
    upgrade = next(each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == "upgrade")
    calls = [each for each in ast.walk(upgrade) if isinstance(each, ast.Call)]
    return [each for each in calls if isinstance(each.func, ast.Attribute) and each.func.attr == name]


def first_text(call: ast.Call, place: int) -> object:
    argument = call.args[place]
    return argument.value if isinstance(argument, ast.Constant) else None


@pytest.mark.parametrize("path", sorted(VERSIONS.glob("*.py")), ids=lambda path: path.stem)
def test_indexes_on_tables_that_are_there_are_made_concurrently(path: Path) -> None:
    made = {first_text(call, 0) for call in calls_in(path, "create_table")}
    for call in calls_in(path, "create_index"):
        options = {each.arg: each.value for each in call.keywords}
        assert first_text(call, 1) in made or "postgresql_concurrently" in options, ast.unparse(call)


@pytest.mark.parametrize("path", sorted(VERSIONS.glob("*.py")), ids=lambda path: path.stem)
def test_no_type_is_changed_in_place(path: Path) -> None:
    """Prepared statements of running services would be broken for good."""
    for call in calls_in(path, "alter_column"):
        assert "type_" not in {each.arg for each in call.keywords}, ast.unparse(call)
    assert not calls_in(path, "drop_column")
