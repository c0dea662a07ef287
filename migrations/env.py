"""Runs the migrations of both services on the schema that DB_SCHEMA names.

Its one invariant: several processes may start it at once; one migrates, the others wait for it and find it done.
"""

import asyncio
import sys

import asyncpg
import sqlalchemy as sa
from alembic import context
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

import services.relay.attachment_schema
import services.relay.conversation_schema  # noqa: F401 - tables of the same metadata
from services.relay.schema import metadata as relay_metadata
from services.session_service.schema import metadata as session_metadata
from shared import embedded_postgres
from shared.service import read_settings
from shared.settings import SharedSettings

# Any number that nothing else in the database uses as a lock; this one spells "sess".
_LOCK = 0x73657373
_LOCK_TIMEOUT = "5s"
_POLL_SECONDS = 0.2

settings = read_settings(SharedSettings, "migrations")
schema = settings.db_schema


def _migrate(connection: Connection) -> None:
    # Even IF NOT EXISTS it takes the right to make schemas, which who was given one need not have.
    if not connection.scalar(sa.text("SELECT 1 FROM pg_namespace WHERE nspname = :schema"), {"schema": schema}):
        connection.execute(sa.text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
    # A migration that waits for a lock makes everyone queue behind it: better to fail, and be run again.
    connection.execute(sa.text(f"SET lock_timeout = '{_LOCK_TIMEOUT}'"))
    # Migrations name no schema, so that one set of files serves any.
    connection.execute(sa.text(f'SET search_path TO "{schema}"'))
    connection.commit()
    connection.dialect.default_schema_name = schema
    context.configure(
        connection=connection,
        target_metadata=[session_metadata, relay_metadata],
        transaction_per_migration=True,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def _wait_for_others(guard: AsyncConnection) -> None:
    """Holds the lock until the transaction of `guard` ends.

    Neither waiting for it nor holding it may keep a snapshot: CREATE INDEX CONCURRENTLY waits for all there are.
    """
    while not await guard.scalar(sa.text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _LOCK}):
        await guard.rollback()
        await asyncio.sleep(_POLL_SECONDS)
    # Besides what it says: a statement's snapshot stays until the next statement, and this one has none.
    await guard.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))


async def _main() -> None:
    url = settings.database_url.get_secret_value() or embedded_postgres.start(settings.local_state / "postgres")
    # asyncpg reads the URL itself, as it does in the services.
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url), poolclass=NullPool
    )
    try:
        # The lock has a connection of its own: it must hold across the migrations' transactions.
        async with engine.connect() as guard, engine.connect() as connection:
            await _wait_for_others(guard)
            await connection.run_sync(_migrate)
    except CommandError as error:
        if not isinstance(error.__cause__, ResolutionError):
            raise
        raise CommandError(f"the database was migrated by a newer version of this project ({error})") from None
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        raise CommandError(f"Postgres cannot be used: {str(error) or type(error).__name__}") from None
    finally:
        await engine.dispose()


if context.is_offline_mode():
    sys.exit("Migrations need a database; there is no SQL-only mode.")
asyncio.run(_main())
