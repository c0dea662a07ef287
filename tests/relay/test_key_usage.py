"""What a key is told to have used: what its requests really used, at the list's price, whatever came of them.

Its one invariant: a key's figures are the sums of its turns' figures in session_service.
"""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import genai_prices
import httpx
import pytest
import pytest_asyncio

from tests.processes import Process, ServiceProcess
from tests.relay.calls import Json, start_relay, upstream_settings
from tests.relay.key_calls import Admin, Caller, fine, open_db, open_http, use_row
from tests.session_service.calls import TIME
from tests.upstream.client import TestUpstream

MODEL = "claude-sonnet-4-5"
LONG = "word " * 60
CACHED: Json = {
    "input_tokens": 11,
    "output_tokens": 222,
    "cache_read_input_tokens": 33_333,
    "cache_creation_input_tokens": 4_444,
    "cache_creation": {"ephemeral_5m_input_tokens": 444, "ephemeral_1h_input_tokens": 4_000},
}
CLASSES = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
LIMITED: Json = {"concurrencyLimit": 100, "tokenLimit": 10**9, "dailyCostLimit": 10**6}


def price(usage: Json, model: str = MODEL) -> float:
    """What the library says: to it all that is read or written is input, and what is written for an hour written."""
    read, written = usage.get("cache_read_input_tokens", 0), usage.get("cache_creation_input_tokens", 0)
    counted = genai_prices.Usage(
        input_tokens=usage["input_tokens"] + read + written,
        output_tokens=usage["output_tokens"],
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=usage.get("cache_creation", {}).get("ephemeral_1h_input_tokens", 0),
    )
    cost = genai_prices.calc_price(counted, model_ref=model, provider_id="anthropic").total_price
    return float(round(cost, 6))


def tokens(usage: Json) -> int:
    return sum(usage.get(name, 0) for name in CLASSES)


@dataclass(frozen=True)
class Used:
    """A key, and where to look at what it has used."""

    admin: Admin
    sessions: httpx.AsyncClient
    key: Caller

    async def turns(self, session: str) -> list[Json]:
        """The session's turns, newest first."""
        query: dict[str, str | int] = {"user_id": self.key.id, "page_size": 100}
        turns: list[Json] = fine(await self.sessions.get(f"/sessions/{session}/turns", params=query))["turns"]
        return turns

    async def check(self, session: str, requests: int) -> tuple[int, float]:
        """Tokens and cost of the key, which are those of all turns of its only session."""
        used = await self.admin.used(self.key.id)
        turns = await self.turns(session)
        assert used[0] == requests == len(turns)
        assert used[1] == sum(tokens(turn["usage"] or {}) for turn in turns)
        cost = sum(Decimal(str(turn["cost_usd"] or 0)) for turn in turns)
        assert used[2] == float(cost)
        return used[1:]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def bare(relay: Process) -> AsyncIterator[httpx.AsyncClient]:
    async with open_http(relay) as http:
        yield http


@pytest.fixture
def admin(bare: httpx.AsyncClient, data_dir: Path, upstream: TestUpstream) -> Admin:
    return Admin.of(bare, data_dir)


@pytest_asyncio.fixture(params=["limited", "unlimited"], loop_scope="session")
async def used(request: pytest.FixtureRequest, admin: Admin, sessions: httpx.AsyncClient) -> Used:
    """A new key, with limits that are far away or without any: its use is written on different ways."""
    return Used(admin, sessions, await admin.make(**(LIMITED if request.param == "limited" else {})))


Ask = Callable[..., Awaitable[Any]]


def ways(key: Caller) -> dict[str, Ask]:
    return {"plain": key.ask, "streamed": key.stream_whole, "left": key.leave}


@pytest.mark.parametrize("way", ["plain", "streamed"])
async def test_a_whole_answer(used: Used, upstream: TestUpstream, way: str) -> None:
    """Tokens of all classes, each at its price; the same without a session."""
    upstream.script({"usage": CACHED, "repeat": -1})
    ask, session = ways(used.key)[way], uuid.uuid4().hex
    assert (await used.admin.key(used.key.id))["lastUsedAt"] is None
    assert (await ask(session=session, model=MODEL)).status_code == 200
    cost = price(CACHED)
    assert cost > 0.03
    assert await used.check(session, 1) == (tokens(CACHED), cost)
    assert (await used.turns(session))[0]["cost_usd"] == cost
    stored = fine(await used.sessions.get(f"/sessions/{session}", params={"user_id": used.key.id}))
    assert stored["total_cost"] == cost
    first = (await used.admin.key(used.key.id))["lastUsedAt"]
    assert TIME.fullmatch(first)
    assert (await ask(session=session, model=MODEL)).status_code == 200
    assert await used.check(session, 2) == (2 * tokens(CACHED), round(2 * cost, 6))
    assert (await ask(model=MODEL)).status_code == 200
    assert await used.admin.used(used.key.id) == (3, 3 * tokens(CACHED), round(3 * cost, 6))
    assert (await used.admin.key(used.key.id))["lastUsedAt"] > first


@pytest.mark.parametrize("answered", ["claude-haiku-4-5-20251001", "claude-opus-4-1"])
async def test_the_price_is_that_of_the_model_that_answered(used: Used, upstream: TestUpstream, answered: str) -> None:
    upstream.script({"usage": CACHED, "model": answered, "repeat": -1})
    session = uuid.uuid4().hex
    assert (await used.key.ask(session=session, model=MODEL)).status_code == 200
    cost = price(CACHED, answered)
    assert cost not in {0, price(CACHED)}
    assert await used.check(session, 1) == (tokens(CACHED), cost)


async def test_an_unknown_model_costs_nothing(used: Used, upstream: TestUpstream, relay: Process) -> None:
    """Its tokens count all the same; it is named in the log once."""
    upstream.script({"usage": CACHED, "repeat": -1})
    session, model = uuid.uuid4().hex, f"unheard-of-{uuid.uuid4().hex}"
    for _ in range(2):
        assert (await used.key.ask(session=session, model=model)).status_code == 200
        assert (await used.key.stream_whole(session=session, model=model)).status_code == 200
    assert await used.check(session, 4) == (4 * tokens(CACHED), 0)
    named = [line for line in relay.logged().splitlines() if model in line]
    assert len(named) == 1
    assert "model_without_price" in named[0]


@pytest.mark.parametrize("way", ["plain", "streamed"])
async def test_what_upstream_does_not_tell_is_estimated(used: Used, upstream: TestUpstream, way: str) -> None:
    upstream.script({"usage": None, "text": LONG})
    session = uuid.uuid4().hex
    assert (await ways(used.key)[way](session=session, model=MODEL)).status_code == 200
    usage = (await used.turns(session))[0]["usage"]
    assert usage["output_tokens"] >= 60
    assert await used.check(session, 1) == (tokens(usage), price(usage))


@pytest.mark.parametrize("way", ["streamed", "left"])
async def test_a_part_of_an_answer(used: Used, upstream: TestUpstream, way: str) -> None:
    """Of an answer that broke off, or whose client hung up, what came is paid for."""
    fault = {"cut_after_events": 8} if way == "streamed" else {"event_delay_ms": 5}
    upstream.script({"text": LONG, "usage": CACHED, **fault})
    session = uuid.uuid4().hex
    await ways(used.key)[way](session=session, model=MODEL)
    assert (await used.key.ask(session=session, model="unpriced")).status_code == 200  # comes after the first has ended
    last, turn = await used.turns(session)
    assert turn["status"] == "interrupted"
    assert turn["usage"]["cache_read_input_tokens"] == 33_333
    assert 1 < turn["usage"]["output_tokens"] < 222
    cost = price(turn["usage"])
    assert turn["cost_usd"] == cost > 0.03
    assert await used.check(session, 2) == (tokens(turn["usage"]) + tokens(last["usage"]), cost)


EARLY: Json = {"error_event": {"type": "error", "error": {"type": "overloaded_error"}}, "after_events": 1}
NO_ANSWER: list[tuple[str, Json, int, str]] = [
    *((way, {"status": 400}, 400, "refused") for way in ("plain", "streamed")),
    *((way, {"status": 503, "repeat": -1}, 529, "failed") for way in ("plain", "streamed")),
    ("plain", {"status": 429, "repeat": -1}, 429, "failed"),
    ("streamed", {"text": LONG, "usage": CACHED, "repeat": -1, **EARLY}, 529, "failed"),
]


@pytest.mark.parametrize(("way", "fault", "status", "outcome"), NO_ANSWER)
async def test_an_answer_that_never_came_costs_nothing(
    used: Used, upstream: TestUpstream, way: str, fault: Json, status: int, outcome: str
) -> None:
    """It counts as a request."""
    upstream.script(fault)
    session = uuid.uuid4().hex
    assert (await ways(used.key)[way](session=session, model=MODEL)).status_code == status
    assert await used.check(session, 1) == (0, 0)
    assert (await used.turns(session))[0]["status"] == outcome


async def test_what_never_became_a_turn_is_not_counted(used: Used, upstream: TestUpstream) -> None:
    """A bad request, a conflict, a session id that is none."""
    session = uuid.uuid4().hex
    assert (await used.key.ask(session=session, model=MODEL)).status_code == 200
    before = await used.check(session, 1)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    conflict = {"x-session-conflict": "reject"}
    assert (await used.key.ask(session=session, messages=talk, headers=conflict)).status_code == 409
    assert (await used.key.ask(session=session, messages=[])).status_code == 400
    assert (await used.key.ask(session="a/b")).status_code == 400
    assert await used.check(session, 1) == before
    assert len(upstream.requests("/v1/messages")) == 1


async def test_a_request_that_is_tried_again_pays_for_each_answer(used: Used, upstream: TestUpstream) -> None:
    """With an Idempotency-Key the failed try costs nothing, and the answer that is given again neither."""
    upstream.script({"status": 400}, {"usage": CACHED})
    session, again = uuid.uuid4().hex, {"idempotency-key": uuid.uuid4().hex}
    answers = [await used.key.ask(session=session, model=MODEL, headers=again) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [400, 200, 200, 200]
    assert await used.admin.used(used.key.id) == (2, tokens(CACHED), price(CACHED))


async def test_a_relay_that_stops_loses_nothing(
    database_url: str, session_service: ServiceProcess, upstream: TestUpstream, data_dir: Path
) -> None:
    """SIGTERM right after the answers: all of them are on record."""
    upstream.script({"usage": CACHED, "repeat": -1})
    with start_relay(database_url, session_service.url, data_dir, upstream_settings(upstream.url)) as relay:
        async with open_http(relay) as http:
            keys = [await Admin.of(http, data_dir).make(**fields) for fields in ({}, LIMITED)]
            for key in keys:
                for _ in range(5):
                    assert (await key.ask(model=MODEL)).status_code == 200
        assert relay.stop() == 0
    async with open_db(database_url) as db:
        for key in keys:
            row = await use_row(db, key.id)
            assert (row["requests"], row["tokens"], row["in_flight"]) == (5, 5 * tokens(CACHED), 0)
            assert float(row["cost"]) == round(5 * price(CACHED), 6)
