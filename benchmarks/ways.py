"""One set of services, and the ways to their upstream: through them, directly, and through a bare pass-through.

Its one invariant: each part starts when it is first asked for, and lives as long as the set.
"""

from contextlib import ExitStack
from functools import cache, cached_property
from typing import Any

from benchmarks import load
from benchmarks.load import Result
from benchmarks.stack import USER, Stack
from tests.processes import Process
from tests.relay.calls import UPSTREAM_KEY
from tests.upstream.client import TestUpstream


class Ways:
    """A database, a session_service, a relay, the test upstream and the pass-through."""

    def __init__(self, stack: Stack, started: ExitStack) -> None:
        self._stack = stack
        self._started = started

    @cached_property
    def database_url(self) -> str:
        return self._stack.database()

    @cached_property
    def store(self) -> Process:
        return self._started.enter_context(self._stack.store(self.database_url))

    @cached_property
    def upstream(self) -> TestUpstream:
        return self._started.enter_context(self._stack.upstream())

    @cached_property
    def relay(self) -> Process:
        relay = self._stack.relay(self.database_url, self.store, self.upstream.url)
        return self._started.enter_context(relay)

    @cached_property
    def bare(self) -> Process:
        module = self._stack.module("benchmarks.passthrough", "/ready", UPSTREAM_URL=self.upstream.url)
        return self._started.enter_context(module)

    @cached_property
    def thin(self) -> Process:
        module = self._stack.module("benchmarks.thin", "/ready", DATABASE_URL=self.database_url)
        return self._started.enter_context(module)

    def stored(self, work: str, **plan: Any) -> Result:
        """Through the relay; every turn is stored, and looked for afterwards."""
        url = self.relay.url
        return load.run(work, url, api_key=self._stack.key, store=self.store.url, user_id=USER, **plan)

    def direct(self, work: str, **plan: Any) -> Result:
        return load.run(work, self.upstream.url, api_key=UPSTREAM_KEY, **plan)

    def passed(self, work: str, **plan: Any) -> Result:
        return load.run(work, self.bare.url, api_key=UPSTREAM_KEY, **plan)

    @cache  # noqa: B019 - there are two sets in a run
    def warm(self) -> None:
        """Has every way and pool in use, and what was written before indexed, before anything is measured."""
        for work in ("plain", "stream"):
            for run in (self.stored, self.direct, self.passed):
                run(work, workers=32, seconds=60, count=200)
        self._stack.wait_for_index(self.database_url)


@cache
def shared(stack: Stack) -> Ways:
    """The set that most benchmarks share, one after the other."""
    return Ways(stack, stack.kept)
