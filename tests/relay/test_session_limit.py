"""The limit of active sessions, by itself, against a real session_service that nobody else uses."""

import asyncio
import os
import re
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import httpx
import pytest

from services.relay.errors import TooManySessions, claude_body
from services.relay.session_limit import SessionLimit, Times
from services.session_service.settings import SessionServiceSettings
from shared import wire
from shared.discovery import Instances
from shared.errors import SessionServiceUnavailable
from shared.session_client import SessionClient, SessionKey
from tests.processes import Process, free_port, start_session_service

USER = "user"
# As the usual times, sixteen times as fast; so is the store.
QUICK = Times(count_seconds=0.3, fresh_seconds=0.1, oldest_seconds=0.4)
STORE_SECONDS = "0.3"


@pytest.fixture(scope="module")
def url(make_database: Callable[[], str]) -> str:
    return make_database()


@pytest.fixture(scope="module")
def own_store(url: str, scratch: Path) -> Iterator[Process]:
    with start_session_service(url, scratch, free_port(), STATS_CACHE_SECONDS=STORE_SECONDS) as process:
        yield process


@pytest.fixture(scope="module")
def own_exact_store(url: str, scratch: Path) -> Iterator[Process]:
    with start_session_service(url, scratch, free_port(), STATS_CACHE_SECONDS="0") as process:
        yield process


@pytest.fixture
def store(own_store: Process) -> Process:
    """A store without sessions, and whose count says so."""
    return emptied(own_store)


@pytest.fixture
def exact_store(own_exact_store: Process) -> Process:
    """One that counts anew each time it is asked."""
    return emptied(own_exact_store)


def emptied(store: Process) -> Process:
    with httpx.Client(base_url=f"{store.url}/api/v1", timeout=30, trust_env=False) as http:
        http.delete(f"/users/{USER}").raise_for_status()
        while http.get("/sessions/stats").json()["active_sessions"]:
            sleep(0.02)
    return store


STATS, SESSION = "/api/v1/sessions/stats", "/api/v1/sessions/{session_id}"


class Relay:
    """What a relay does with its limit, one turn after the other."""

    def __init__(self, instances: Instances, client: SessionClient, max_sessions: int, times: Times) -> None:
        self.instances = instances
        self.client = client
        self.limit = SessionLimit(client, max_sessions=max_sessions, times=times)

    async def turn(self, key: SessionKey, *, is_new: bool = False, if_exists: wire.IfExists = "restart") -> None:
        """A whole turn in this session, made or brought back where need be; raises TooManySessions."""
        request = wire.OpenTurn(
            messages=[wire.NewMessage(role="user", content="Hi")],
            create_session=wire.CreateSessionInTurn(if_exists=if_exists),
        )
        await self.limit.check(key, is_new=is_new)
        try:
            opened = await self.client.open_turn(key, request)
            self.limit.opened(opened.session)
        finally:
            self.limit.leave(key)
        answer = wire.NewMessage(role="assistant", content="Hello")
        done = wire.CompleteTurn(lease_token=opened.lease_token, status="completed", messages=[answer])
        await self.client.complete_turn(key, opened.turn_id, done)

    async def close(self, key: SessionKey) -> None:
        await self.client.end_session(key)
        self.limit.closed()


MakeRelay = Callable[..., Relay]


@asynccontextmanager
async def relays(store: Process, max_sessions: int = 2) -> AsyncIterator[MakeRelay]:
    """Makes relays in front of this store."""
    instances = Instances([store.url])
    client = SessionClient(instances, timeout_seconds=5, connect_timeout_seconds=1)
    try:
        yield lambda max_sessions=max_sessions, times=QUICK: Relay(instances, client, max_sessions, times)
    finally:
        await client.close()


@asynccontextmanager
async def counting(limit: SessionLimit) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(limit.keep_counting())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def new_key() -> SessionKey:
    return SessionKey(USER, f"s-{uuid.uuid4().hex[:12]}")


async def refused(turn: Awaitable[None]) -> TooManySessions:
    with pytest.raises(TooManySessions) as raised:
        await turn
    return raised.value


def calls_of(store: Process, path: str, method: str = "GET") -> int:
    """How often the store was asked this."""
    metrics = httpx.get(f"{store.url}/metrics", timeout=5, trust_env=False).text
    pattern = (
        rf'^sessions_http_request_duration_seconds_count{{method="{method}",route="{re.escape(path)}",[^}}]*}} ([\d.]+)'
    )
    return sum(int(float(count)) for count in re.findall(pattern, metrics, re.MULTILINE))


@contextmanager
def frozen(process: Process) -> Iterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


# ── one relay ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("are_new", [True, False])
async def test_the_third_is_refused_the_two_go_on_and_one_closed_makes_room(store: Process, are_new: bool) -> None:
    async with relays(store) as make:
        relay = make()
        assert (relay.limit.max, relay.limit.active) == (2, None)
        first, second, third, fourth = (new_key() for _ in range(4))
        await relay.turn(first, is_new=are_new)
        assert relay.limit.active == 1
        await relay.turn(second, is_new=are_new)
        assert relay.limit.active == 2
        error = await refused(relay.turn(third, is_new=are_new))
        assert error.headers() == {"retry-after": "5"}
        assert claude_body(error, "r")["error"]["type"] == "rate_limit_error"
        for _ in range(3):
            await relay.turn(first)
            await relay.turn(second)
        assert relay.limit.active == 2
        await refused(relay.turn(third, is_new=are_new))
        await relay.close(first)
        assert relay.limit.active == 1
        await relay.turn(third, is_new=are_new)
        await refused(relay.turn(fourth, is_new=are_new))
        await refused(relay.turn(first))  # it is closed, so that it would be a third one
        await relay.close(second)
        await relay.turn(first)
        assert relay.limit.active == 2


async def test_it_stays_exact_whatever_the_age_of_the_stores_count(store: Process) -> None:
    async with relays(store) as make:
        relay = make()
        async with counting(relay.limit):
            keys = [new_key(), new_key()]
            for key in keys:
                await relay.turn(key)
            deadline = monotonic() + 2.5  # several counts of the store's and askings, at any distance from each other
            while monotonic() < deadline:
                assert relay.limit.active == 2
                await refused(relay.turn(new_key(), is_new=True))
                await relay.close(keys[0])
                keys[0] = new_key()
                await relay.turn(keys[0])
                await relay.turn(keys[1])
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("are_new", [True, False])
async def test_of_many_at_once_as_many_get_in_as_may(store: Process, are_new: bool) -> None:
    async with relays(store) as make:
        relay = make(3)
        results = await asyncio.gather(
            *(relay.turn(new_key(), is_new=are_new) for _ in range(20)), return_exceptions=True
        )
        assert results.count(None) == 3
        assert all(isinstance(result, TooManySessions | None) for result in results)
        assert relay.limit.active == 3


async def test_turns_in_an_active_session_take_no_room_from_new_ones(store: Process) -> None:
    async with relays(store) as make:
        relay = make()
        first = new_key()
        await relay.turn(first)
        for _ in range(5):
            keys = [new_key() for _ in range(2)]
            results = await asyncio.gather(
                relay.turn(first), *(relay.turn(key) for key in keys), return_exceptions=True
            )
            assert results[0] is None
            assert sorted(map(type, results[1:]), key=str) == [type(None), TooManySessions]
            await relay.close(keys[0] if results[1] is None else keys[1])


@pytest.mark.parametrize("if_exists", ["restart", "resume"])
async def test_a_session_that_is_brought_back_counts(store: Process, if_exists: wire.IfExists) -> None:
    async with relays(store) as make:
        relay = make(1)
        first, second = new_key(), new_key()
        await relay.turn(first)
        await relay.close(first)
        await relay.turn(first, if_exists=if_exists)
        await refused(relay.turn(second))
        await relay.close(first)
        await relay.turn(second)


async def test_a_turn_that_does_not_open_gives_its_room_back(store: Process) -> None:
    async with relays(store) as make:
        relay = make(1)
        for _ in range(3):
            key = new_key()
            await relay.limit.check(key, is_new=True)
            await relay.limit.check(key, is_new=True)
            await refused(relay.limit.check(new_key(), is_new=False))
            for _ in range(2):
                relay.limit.leave(key)
            assert relay.limit.active == 0
        await relay.turn(new_key())
        assert relay.limit.active == 1


async def test_being_cancelled_while_the_store_is_asked_leaves_nothing_behind(exact_store: Process) -> None:
    async with relays(exact_store) as make:
        relay = make(1)
        await relay.turn(new_key())
        for is_new in (True, False):
            await asyncio.sleep(QUICK.fresh_seconds)  # so that it asks again
            with frozen(exact_store):
                asking = [asyncio.create_task(relay.limit.check(new_key(), is_new=is_new)) for _ in range(5)]
                await asyncio.sleep(0.05)
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
            assert all(task.cancelled() for task in asking)
            assert relay.limit.active == 1
        await refused(relay.turn(new_key()))


# ── what it costs ───────────────────────────────────────────────────────────────────────────────


async def test_with_ample_room_nobody_is_asked(store: Process) -> None:
    async with relays(store) as make:
        relay = make(1000)
        keys = [new_key() for _ in range(10)]
        counts, looks = calls_of(store, STATS), calls_of(store, SESSION)
        for number, key in enumerate([*keys, *keys]):
            await relay.turn(key, is_new=number == 3)
        assert calls_of(store, STATS) == counts + 1
        assert calls_of(store, SESSION) == looks
        assert relay.limit.active == 10  # those that it made, once each, though nobody was asked
        nearly_full = make(20)
        for key in keys:
            await nearly_full.turn(key)
        assert calls_of(store, SESSION) == looks + 10


async def test_at_the_limit_all_who_come_cost_one_count_now_and_then(exact_store: Process) -> None:
    async with relays(exact_store) as make:
        relay = make(1)
        await relay.turn(new_key())
        counts, looks = calls_of(exact_store, STATS), calls_of(exact_store, SESSION)
        began = monotonic()
        while (took := monotonic() - began) < 5 * QUICK.fresh_seconds:
            await asyncio.gather(*(refused(relay.turn(new_key(), is_new=True)) for _ in range(20)))
        assert 1 <= calls_of(exact_store, STATS) - counts <= took / QUICK.fresh_seconds + 1
        assert calls_of(exact_store, SESSION) == looks


# ── what others do ──────────────────────────────────────────────────────────────────────────────


async def test_what_others_do_is_seen_when_it_matters(exact_store: Process) -> None:
    async with relays(exact_store) as make:
        relay, other = make(), make(10)
        theirs = [new_key(), new_key()]
        for key in theirs:
            await other.turn(key)
        await refused(relay.turn(new_key()))  # it asks before the first
        await relay.turn(theirs[0])
        assert relay.limit.active == 2
        await other.client.end_session(theirs[0])
        await asyncio.sleep(QUICK.fresh_seconds)
        await relay.turn(new_key())
        await refused(relay.turn(new_key()))


async def test_keep_counting_sees_what_others_do(exact_store: Process) -> None:
    async with relays(exact_store) as make:
        relay, other = make(times=replace(QUICK, longest_call_seconds=0.2)), make(10)
        await other.turn(new_key())
        async with counting(relay.limit) as task:
            await _until(relay.limit, 1)
            await other.turn(new_key())
            await _until(relay.limit, 2)
            with frozen(exact_store):
                await asyncio.sleep(1)  # askings that get no answer
                assert relay.limit.active == 2
                assert not task.done()
            await other.turn(new_key())
            await _until(relay.limit, 3)


async def _until(limit: SessionLimit, active: int) -> None:
    deadline = monotonic() + 10
    while limit.active != active:
        assert monotonic() < deadline, f"{limit.active} are active"
        await asyncio.sleep(0.02)


async def test_a_store_that_is_away_is_the_turns_affair(store: Process) -> None:
    async with relays(store) as make:
        relay, fresh = make(1), make(1)
        first = new_key()
        await relay.turn(first)
        relay.instances.replace([f"http://127.0.0.1:{free_port()}"])
        await refused(relay.limit.check(new_key(), is_new=True))
        with pytest.raises(SessionServiceUnavailable):
            await relay.limit.check(first, is_new=False)
        assert relay.limit.active == 1
        await fresh.limit.check(new_key(), is_new=True)  # it knows of none
        assert fresh.limit.active is None


def test_the_usual_times_allow_for_the_age_of_the_stores_count() -> None:
    assert Times().oldest_seconds > SessionServiceSettings.model_fields["stats_cache_seconds"].default
