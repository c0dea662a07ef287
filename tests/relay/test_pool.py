"""Which account a request goes to: by priority, load, weight and affinity; waiting for one; half-open accounts."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.relay.calls import Chat, Json, error_of
from tests.relay.stage import KIRO, Operator, Stage, staged, until
from tests.upstream.client import TestUpstream


@pytest_asyncio.fixture(loop_scope="session")
async def stage(patient: Operator, upstream: TestUpstream) -> AsyncIterator[Stage]:
    async with staged(patient, upstream) as stage:
        yield stage


async def running(stage: Stage, count: int, **fields: Any) -> list[asyncio.Task[httpx.Response]]:
    """So many more requests that upstream does not answer, begun one after the other."""
    stage.upstream.script({"match": {"model": stage.model}, "repeat": count, "hang_seconds": 30})
    tasks = []
    for _ in range(count):
        before = stage.upstream.state()["running"]
        tasks.append(asyncio.create_task(stage.ask(**fields)))
        await stage.upstream.until(lambda state, before=before: state["running"] == before + 1)  # type: ignore[misc]
    return tasks


async def let_go(stage: Stage, tasks: list[asyncio.Task[httpx.Response]]) -> None:
    """Their clients hang up."""
    before = stage.upstream.state()["running"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await stage.upstream.until(lambda state: state["running"] <= before - len(tasks))


# ── choosing ────────────────────────────────────────────────────────────────────────────────────


async def test_the_lowest_priority_number_is_first(stage: Stage) -> None:
    """Whatever the load and the weight; the next number only while none of the lower is eligible."""
    await stage.add("first", priority=-1)
    await stage.add("second", priority=0, weight=1000)
    await stage.add("third", priority=1, weight=1000)
    tasks = await running(stage, 4)
    assert stage.asked() == ["first"] * 4
    await let_go(stage, tasks)
    await stage.post("first", "disable")
    assert await stage.is_served()
    await stage.post("second", "disable")
    assert await stage.is_served()
    await stage.post("first", "enable")
    assert await stage.is_served()
    assert stage.asked()[4:] == ["second", "third", "first"]


@pytest.mark.parametrize(
    ("weights", "count"), [({"a": 1, "b": 1}, 4), ({"a": 3, "b": 1}, 8), ({"a": 0.5, "b": 1, "c": 0.5}, 8)]
)
async def test_in_turns_by_weight(stage: Stage, weights: dict[str, float], count: int) -> None:
    """Equally loaded accounts come as often as their weights say, the heavier ones not all at once."""
    for name, weight in weights.items():
        await stage.add(name, weight=weight)
    for _ in range(count):
        assert await stage.is_served()
    whole = sum(weights.values())
    assert Counter(stage.asked()) == {name: count * weight / whole for name, weight in weights.items()}
    half = stage.asked()[: count // 2]
    assert Counter(half) == {name: count * weight / whole / 2 for name, weight in weights.items()}


async def test_the_least_loaded_by_weight(stage: Stage) -> None:
    """Three times the weight: three times the requests at once; who is idle is next, whoever's turn it would be."""
    await stage.add("a", weight=1)
    await stage.add("b", weight=3)
    tasks = await running(stage, 8)
    assert Counter(stage.asked()) == {"a": 2, "b": 6}
    told = {each["name"]: each["in_flight"] for each in (await stage.get("a"), await stage.get("b"))}
    assert told == {"a": 2, "b": 6}
    await let_go(stage, tasks)
    await stage.change("b", weight=1)
    await stage.post("a", "disable")
    tasks = await running(stage, 2)
    await stage.post("a", "enable")
    for _ in range(4):
        assert await stage.is_served()
    assert stage.asked()[8:] == ["b", "b", "a", "a", "a", "a"]
    await let_go(stage, tasks)


async def test_a_full_account_is_passed_by(stage: Stage) -> None:
    """Its slots are taken: others serve, whatever their priority; when all are full, requests wait for a slot."""
    await stage.add("first", max_concurrency=2, priority=0)
    await stage.add("second", max_concurrency=1, priority=1)
    tasks = await running(stage, 3)
    assert stage.asked() == ["first", "first", "second"]
    waiting = asyncio.create_task(stage.ask())
    await asyncio.sleep(0.3)
    assert len(stage.asked()) == 3
    await let_go(stage, tasks[2:])
    assert (await waiting).status_code == 200
    assert stage.asked()[3:] == ["second"]
    await let_go(stage, tasks[:2])


# ── affinity ────────────────────────────────────────────────────────────────────────────────────


def chat_on(stage: Stage, sessions: httpx.AsyncClient) -> Chat:
    return Chat(stage.operator.http, sessions)


async def served_by(stage: Stage, chat: Chat, text: str = "Hello") -> str:
    """The account that serves the session's next turn."""
    await chat.say(text, model=stage.model)
    return stage.asked()[-1]


async def test_a_session_stays_with_its_account(stage: Stage, sessions: httpx.AsyncClient) -> None:
    """Over its turns, plain and streamed, while other requests go in turns as ever."""
    await stage.add("a", "b")
    chats = [chat_on(stage, sessions) for _ in range(4)]
    first = [await served_by(stage, chat) for chat in chats]
    assert Counter(first) == {"a": 2, "b": 2}
    for _ in range(2):
        assert await stage.is_served()
        assert [await served_by(stage, chat) for chat in reversed(chats)] == first[::-1]
    for chat in chats:
        await chat.stream_whole("Again", model=stage.model)
    assert stage.asked()[-4:] == first


async def test_affinity_is_a_preference(stage: Stage, sessions: httpx.AsyncClient) -> None:
    """It wins over priority, and gives way where the account is not eligible or does not serve the model."""
    await stage.add("a")
    chat = chat_on(stage, sessions)
    assert await served_by(stage, chat) == "a"
    await stage.add("b", priority=-5)
    assert await served_by(stage, chat) == "a"
    await stage.change("a", models=["something-else"])
    assert await served_by(stage, chat) == "b"
    await stage.change("a", models=[stage.model], priority=-9)
    assert await served_by(stage, chat) == "b"
    await stage.post("b", "disable")
    assert await served_by(stage, chat) == "a"


@pytest.mark.parametrize("step", [{"status": 500}, {"status": 429}, {"status": 403}, {"close": True}])
async def test_a_session_moves_when_its_account_fails_and_stays_there(
    stage: Stage, sessions: httpx.AsyncClient, step: Json
) -> None:
    """Its old account does not get it back by being well again."""
    await stage.add("a", "b")
    chat = chat_on(stage, sessions)
    old = await served_by(stage, chat)
    (new,) = {"a", "b"} - {old}
    stage.script(old, step)
    assert await served_by(stage, chat) == new
    assert stage.asked()[-2:] == [old, new]
    await stage.post(old, "enable")
    for _ in range(3):
        assert await served_by(stage, chat) == new


async def test_a_session_whose_account_is_deleted_goes_on(stage: Stage, sessions: httpx.AsyncClient) -> None:
    await stage.add("a", "b")
    chat = chat_on(stage, sessions)
    old = await served_by(stage, chat)
    await stage.delete(old)
    (new,) = {"a", "b"} - {old}
    assert await served_by(stage, chat) == new


async def test_another_relay_knows_a_sessions_account(
    stage: Stage, deaf: Operator, sessions: httpx.AsyncClient, sql: asyncpg.Connection
) -> None:
    """From the table; in an order that taking turns would not give."""
    await stage.add("a", "b")

    async def deaf_knows() -> bool:
        return await stage.at(deaf).is_served()

    await until(deaf_knows)
    chats = [chat_on(stage, sessions) for _ in range(6)]
    first = [await served_by(stage, chat) for chat in chats]

    async def is_saved() -> bool:
        query = "SELECT count(*) FROM relay_affinities WHERE session_id = ANY($1::text[])"
        return bool(await sql.fetchval(query, [chat.session_id for chat in chats]) == 6)

    await until(is_saved)
    order = sorted(range(6), key=lambda number: (first[number], number))
    there = stage.at(deaf)
    assert [await served_by(there, chat_like(chats[number], deaf)) for number in order] == sorted(first)


def chat_like(chat: Chat, operator: Operator) -> Chat:
    """The same session through another relay."""
    return Chat(operator.http, chat.sessions, chat.session_id)


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_short_limit_of_the_only_account_is_waited_out(stage: Stage) -> None:
    """429 with a short retry-after: the client waits, and gets its answer."""
    await stage.add("a")
    stage.script("a", {"status": 429, "headers": {"retry-after": "1"}})
    answer = await stage.ask()
    assert answer.status_code == 200
    assert answer.headers["x-relay-attempts"] == "2"
    first, second = stage.entries()
    assert second["received_at"] - first["ended_at"] >= 0.9


async def test_a_long_limit_is_not_waited_out(stage: Stage) -> None:
    """Longer than RELAY_RETRY_WAIT_SECONDS: the client is told at once, also who comes later."""
    await stage.add("a")
    stage.script("a", {"status": 429, "headers": {"retry-after": "60"}})
    for attempts in ("1", "0"):
        answer = await asyncio.wait_for(stage.ask(), 8)
        error_of(answer, 429, "rate_limit_error")
        assert 40 < int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-relay-attempts"] == attempts
        assert answer.headers.get("x-should-retry") == ("false" if attempts == "1" else None)
    answer = await stage.ask(path=KIRO)
    assert answer.status_code == 429
    assert answer.json() == {"type": "error", "error": {"type": "rate_limit", "message": "请求过于频繁"}}
    assert len(stage.asked()) == 1


async def test_others_are_asked_rather_than_waited_for(stage: Stage) -> None:
    await stage.add("a")
    await stage.add("b", priority=1)
    stage.script("a", {"status": 429, "headers": {"retry-after": "2"}})
    answer = await stage.ask()
    assert answer.status_code == 200
    assert stage.asked() == ["a", "b"]
    first, second = stage.entries()
    assert second["received_at"] - first["ended_at"] < 1.5


async def test_an_account_that_comes_ends_the_wait(stage: Stage) -> None:
    """Enabled, or made, while requests wait for another."""
    await stage.add("a", max_concurrency=1)
    tasks = await running(stage, 1)
    waiting = asyncio.create_task(stage.ask())
    await asyncio.sleep(0.2)
    await stage.add("b")
    assert (await waiting).status_code == 200
    assert stage.asked() == ["a", "b"]
    await let_go(stage, tasks)


# ── half open ───────────────────────────────────────────────────────────────────────────────────


async def fail_before(stage: Stage, sql: asyncpg.Connection, *others: Operator) -> None:
    """The account `a` has failed before, all these relays know it, and its rest is over."""
    failed = "failures_in_row = 1, cooldown_reason = 'failing', cooldown_until = now() + make_interval(secs => $2)"
    await sql.execute(f"UPDATE relay_accounts SET {failed} WHERE id = $1", stage.id("a"), 3.0 if others else 0.5)
    stages = [stage, *map(stage.at, others)]

    async def all_say(reason: str | None) -> bool:
        return {(await each.get("a"))["ineligible_reason"] for each in stages} == {reason}

    await until(lambda: all_say("failing"))
    await until(lambda: all_say(None))


async def test_one_request_probes_and_the_others_wait(stage: Stage, deaf: Operator, sql: asyncpg.Connection) -> None:
    """Of all requests at two relays one is sent after a failure; when it fails too, one again, then all."""
    await stage.add("a")
    await fail_before(stage, sql, deaf)
    stage.script("a", {"delay_ms": 400, "status": 500}, {"delay_ms": 400})
    answers = await asyncio.gather(*((stage if number % 2 else stage.at(deaf)).ask() for number in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert sorted(answer.headers["x-relay-attempts"] for answer in answers) == ["1"] * 7 + ["2"]
    entries = stage.entries()
    assert len(entries) == 9
    failed, probe, *others = entries
    assert (failed["status"], probe["status"]) == (500, 200)
    assert probe["received_at"] - failed["ended_at"] >= 0.9  # the second failure in a row: 1 s
    assert min(each["received_at"] for each in others) >= probe["ended_at"]
    assert (await stage.get("a"))["failures_in_row"] == 0


async def test_a_refusal_of_the_clients_request_ends_a_probe(stage: Stage, sql: asyncpg.Connection) -> None:
    """Upstream answered: the account works."""
    await stage.add("a")
    await fail_before(stage, sql)
    stage.script("a", {"status": 400})
    assert (await stage.ask()).status_code == 400
    assert (await stage.get("a"))["failures_in_row"] == 0


async def test_a_probing_stream_lets_others_in_when_it_begins(stage: Stage, sql: asyncpg.Connection) -> None:
    """A long answer does not keep its account half open."""
    await stage.add("a")
    await fail_before(stage, sql)
    stage.script("a", {"hang_seconds": 30, "after_events": 5})
    async with stage.operator.http.stream("POST", "/v1/messages", json=stage.request(stream=True)) as stream:
        assert stream.status_code == 200
        pieces = stream.aiter_bytes()
        assert await anext(pieces)
        assert (await asyncio.wait_for(stage.ask(), 5)).status_code == 200
        assert stage.upstream.state()["running"] == 1
        await pieces.aclose()  # type: ignore[attr-defined]


async def test_a_client_that_gives_up_its_probe_makes_room(stage: Stage, sql: asyncpg.Connection) -> None:
    await stage.add("a")
    await fail_before(stage, sql)
    tasks = await running(stage, 1)
    waiting = asyncio.create_task(stage.ask())
    await asyncio.sleep(0.2)
    assert len(stage.asked()) == 1
    await let_go(stage, tasks)
    assert (await asyncio.wait_for(waiting, 5)).status_code == 200
