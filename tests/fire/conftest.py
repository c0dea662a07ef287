"""What the short runs share: a Postgres with tables that each may copy, and a world for those that break nothing."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared import embedded_postgres
from tests.conftest import migrate
from tests.fire.world import World, world


@pytest.fixture(scope="session")
def migrated(scratch: Path) -> Path:
    """The folder of a stopped Postgres that has the tables."""
    path = scratch / "migrated"
    migrate(embedded_postgres.start(path))
    embedded_postgres.stop(path)
    return path


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def calm(migrated: Path) -> AsyncIterator[World]:
    """A world that nobody breaks."""
    async with world(migrated=migrated) as made:
        yield made
