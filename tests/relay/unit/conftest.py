"""The real test upstream, one process for all unit tests of the relay."""

from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import settings

from services.relay.upstream.client import Client, create_client
from tests.upstream.client import TestUpstream

settings.register_profile("unit", deadline=None)  # a busy machine is no failure
settings.load_profile("unit")


@pytest.fixture(scope="session")
def upstream_process() -> Iterator[TestUpstream]:
    with TestUpstream.started() as upstream:
        yield upstream


@pytest.fixture
def upstream(upstream_process: TestUpstream) -> TestUpstream:
    upstream_process.reset()
    return upstream_process


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with create_client() as client:
        yield client
