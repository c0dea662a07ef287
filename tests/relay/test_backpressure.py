"""More than the relay may serve: who waits, who is sent away with what, and that every place comes back."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.processes import Process, ServiceProcess, free_port, start_session_service
from tests.relay.calls import Chat, Json, assistant, error_of, start_relay, text_of, upstream_settings
from tests.relay.stack import frozen, stack_of
from tests.upstream.client import TestUpstream

PATH = "/v1/messages"
KIRO = "/claude-kiro-oauth/v1/messages"
LONG = "word " * 60


async def queue_of(chat: Chat) -> Json:
    answer = await chat.http.get("/queue/health", headers={"x-api-key": ""})
    assert answer.status_code == 200
    told: Json = answer.json()
    assert list(told) == ["status", "in_flight", "queued", "max_in_flight", "accounts", "sessions"]
    return told


async def until_busy(chat: Chat, in_flight: int, queued: int, seconds: float = 20) -> Json:
    """What the queue tells once so many have a place and so many wait."""
    deadline = time.monotonic() + seconds
    while ((told := await queue_of(chat))["in_flight"], told["queued"]) != (in_flight, queued):
        assert time.monotonic() < deadline, told
        await asyncio.sleep(0.01)
    return told


@asynccontextmanager
async def held(chat: Chat, upstream: TestUpstream) -> AsyncIterator[None]:
    """A stream that has its place and its session for as long as one is inside; then its client leaves."""
    upstream.script({"match": {"contains": "hold"}, "text": LONG, "hang_seconds": 120, "after_events": 6})
    async with chat.stream("hold") as answer:
        assert answer.status_code == 200
        yield


def other(chat: Chat) -> Chat:
    """Another session at the same relay."""
    return Chat(chat.http, chat.sessions)


def sent_away(answer: httpx.Response) -> int:
    """For how many seconds a 429 of the relay itself sends away."""
    error_of(answer, 429, "rate_limit_error")
    assert "x-turn-id" not in answer.headers
    return int(answer.headers["retry-after"])


async def is_untouched(chat: Chat) -> bool:
    """Whether nothing at all was stored for this session."""
    return await chat.turns() == [] and await chat.stored() == []


async def leave(task: "asyncio.Task[Any]") -> None:
    """Hangs up."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# ── places ──────────────────────────────────────────────────────────────────────────────────────


async def test_so_many_are_served_so_many_wait_and_the_rest_are_sent_away(
    chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    relay = make_relay(RELAY_MAX_IN_FLIGHT="2", RELAY_MAX_QUEUED="2", RELAY_MAX_SESSIONS="9000")
    chat: Chat = await chat_at(relay)
    idle = await queue_of(chat)
    assert (idle["status"], idle["in_flight"], idle["queued"], idle["max_in_flight"]) == ("healthy", 0, 0, 2)
    assert idle["accounts"]["available"] == idle["accounts"]["total"] >= 1
    assert (idle["accounts"]["cooling"], idle["accounts"]["disabled"]) == (0, 0)
    second, late = other(chat), other(chat)
    async with held(second, upstream):
        async with held(chat, upstream):
            waiting = [asyncio.create_task(other(chat).ask("wait", stream=streams)) for streams in (False, True)]
            told = await until_busy(chat, 2, 2)
            assert told["accounts"] == idle["accounts"]
            assert told["sessions"]["max"] == 9000
            assert told["sessions"]["active"] >= 2
            metrics = (await chat.http.get("/metrics")).text
            assert "relay_in_flight_requests 2.0" in metrics
            assert "relay_queued_requests 2.0" in metrics
            for path in (PATH, KIRO):
                for streams in (False, True):
                    answer = await chat.http.post(path, json=late.body("too many", stream=streams))
                    assert sent_away(answer) == 1
            counted = await chat.http.post(f"{PATH}/count_tokens", json=late.body("too many"))
            assert sent_away(counted) == 1
            assert len(upstream.requests(PATH)) == 2
        # One place is free now, and serves both who wait.
        answers = await asyncio.gather(*waiting)
        assert [answer.status_code for answer in answers] == [200, 200]
        await until_busy(chat, 1, 0)
        assert (await late.ask("not too many")).status_code == 200
        assert (await late.history())[0] == ("user", "not too many")
    await until_busy(chat, 0, 0)


async def test_a_place_that_does_not_come_free_in_time(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    chat: Chat = await chat_at(make_relay(RELAY_MAX_IN_FLIGHT="1", RELAY_QUEUE_SECONDS="0.3"))
    async with held(chat, upstream):
        unlucky = [other(chat) for _ in range(3)]
        for answer in await asyncio.gather(*(each.ask("wait") for each in unlucky)):
            assert sent_away(answer) >= 1
        alone = await chat.http.post(PATH, json=chat.body("wait"), headers={"x-session-id": "none"})
        assert sent_away(alone) >= 1
        assert [await is_untouched(each) for each in unlucky] == [True] * 3
        await until_busy(chat, 1, 0)
    await until_busy(chat, 0, 0)
    for each in unlucky:
        assert (await each.ask("again")).status_code == 200


async def test_who_leaves_the_queue_leaves_nothing_behind(
    chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    """Whatever it waited for, its place is another's at once, and it is as if it had never asked."""
    chat: Chat = await chat_at(make_relay(RELAY_MAX_IN_FLIGHT="1", RELAY_MAX_QUEUED="1"))
    async with held(chat, upstream):
        for one in (other(chat), chat):  # who waits for a place, and who waits for its session
            for streams in (False, True):
                waiting = asyncio.create_task(one.ask("never mind", stream=streams))
                await until_busy(chat, 1, 1)
                assert sent_away(await other(chat).ask("too many")) == 1
                await leave(waiting)
                await until_busy(chat, 1, 0)
        last = other(chat)
        waiting = asyncio.create_task(last.ask("wait"))
        await until_busy(chat, 1, 1)
    assert (await waiting).status_code == 200
    assert [each["json"]["messages"][-1]["content"] for each in upstream.requests(PATH)] == ["hold", "wait"]
    await chat.until_turn("interrupted")
    assert [content for role, content in await chat.history() if role == "user"] == ["hold"]
    await until_busy(chat, 0, 0)


# ── rate ────────────────────────────────────────────────────────────────────────────────────────


async def test_the_rate_is_kept(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    """A second's worth at once, another while the queue is as long as it may be, the rest are told when to come."""
    chat: Chat = await chat_at(make_relay(RELAY_REQUESTS_PER_SECOND="6", RELAY_QUEUE_SECONDS="1"))
    began_at = time.time()
    headers = {"x-session-id": "none"}
    bodies = [chat.body(f"request {number}") for number in range(30)]
    answers = await asyncio.gather(*(chat.http.post(PATH, json=body, headers=headers) for body in bodies))
    took_seconds = time.time() - began_at
    served = [answer for answer in answers if answer.status_code == 200]
    assert 12 <= len(served) <= 12 + 6 * took_seconds
    for answer in answers:
        if answer not in served:
            assert 1 <= sent_away(answer) <= 2
    arrived = sorted(each["received_at"] for each in upstream.requests(PATH))
    assert len(arrived) == len(served)
    for place, at in enumerate(arrived):
        assert at - began_at > (place - 6) / 6 - 0.01
    waiting = [asyncio.create_task(chat.http.post(PATH, json=chat.body("x"), headers=headers)) for _ in range(4)]
    for task in waiting:
        await leave(task)
    await until_busy(chat, 0, 0)


async def test_who_waits_for_the_rate_and_leaves_takes_nothing(
    chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    """A token every hundred seconds: whoever stayed in the line would be seen there."""
    chat: Chat = await chat_at(make_relay(RELAY_REQUESTS_PER_SECOND="0.01", RELAY_QUEUE_SECONDS="250"))
    assert (await chat.ask("the first")).status_code == 200
    waiting = [asyncio.create_task(other(chat).ask("wait")) for _ in range(2)]
    await until_busy(chat, 0, 2)
    assert 190 <= sent_away(await other(chat).ask("too late")) <= 300
    await leave(waiting[0])
    await until_busy(chat, 0, 1)
    waiting.append(asyncio.create_task(other(chat).ask("wait")))
    await until_busy(chat, 0, 2)
    for task in waiting:
        await leave(task)
    await until_busy(chat, 0, 0)
    assert len(upstream.requests(PATH)) == 1


# ── sessions ────────────────────────────────────────────────────────────────────────────────────


async def test_so_many_sessions_are_active(
    chat_at: Any, make_relay: Any, own_database: str, scratch: Path, upstream: TestUpstream
) -> None:
    with start_session_service(own_database, scratch, free_port(), STATS_CACHE_SECONDS="0") as store:
        chat: Chat = await chat_at(make_relay(session_service_url=store.url, RELAY_MAX_SESSIONS="2"))
        assert (await queue_of(chat))["sessions"] == {"active": 0, "max": 2}
        second, third = other(chat), other(chat)
        assert [(await each.ask("Hello")).status_code for each in (chat, second)] == [200, 200]
        assert (await queue_of(chat))["sessions"] == {"active": 2, "max": 2}
        fresh = {name: value for name, value in chat.body("Hello").items() if name != "metadata"}
        for body in (third.body("Hello"), third.body("Hello", stream=True), fresh):
            for path in (PATH, KIRO):
                assert sent_away(await chat.http.post(path, json=body)) == 5
        # Those that are active go on, and who wants none needs no room.
        assert [(await each.ask("Again")).status_code for each in (chat, second)] == [200, 200]
        assert (await chat.http.post(PATH, json=fresh, headers={"x-session-id": "none"})).status_code == 200
        closed = await chat.http.post(f"/sessions/{chat.session_id}/close")
        assert closed.json()["status"] == "ended"
        assert (await queue_of(chat))["sessions"] == {"active": 1, "max": 2}
        assert (await third.ask("Hello")).status_code == 200
        assert (await queue_of(chat))["sessions"] == {"active": 2, "max": 2}
        assert sent_away(await chat.ask("A closed one would be a third")) == 5
        questions = [each["json"]["messages"][-1]["content"] for each in upstream.requests(PATH)]
        assert questions == ["Hello", "Hello", "Again", "Again", "Hello", "Hello"]


# ── one session ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def two_relays(
    make_database: Callable[[], str], session_service: ServiceProcess, upstream_process: TestUpstream, data_dir: Path
) -> Iterator[list[Process]]:
    url, settings = make_database(), upstream_settings(upstream_process.url)
    with ExitStack() as started:
        relays = [start_relay(url, session_service.url, data_dir, settings) for _ in range(2)]
        yield [started.enter_context(relay) for relay in relays]


@pytest_asyncio.fixture(loop_scope="session")
async def pair(two_relays: list[Process], chat_at: Any) -> tuple[Chat, Chat]:
    """One new session, through two relays."""
    one: Chat = await chat_at(two_relays[0])
    return one, await chat_at(two_relays[1], session_id=one.session_id)


async def answered(chat: Chat, question: str, **fields: Any) -> str:
    answer = await chat.ask(question, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-session-persisted"] == "yes"
    return text_of(answer.json())


def pairs(history: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Questions and their answers, which must take turns."""
    assert [role for role, _ in history] == ["user", "assistant"] * (len(history) // 2)
    texts = [content for _, content in history]
    return list(zip(texts[::2], texts[1::2], strict=True))


async def test_three_hundred_at_once_for_one_session_are_as_many_turns_in_order(
    pair: tuple[Chat, Chat], upstream: TestUpstream
) -> None:
    """In order of arrival: they come in groups of thirty, each when all of the one before are in the line."""
    chat, _ = pair
    sent: list[asyncio.Task[str]] = []
    async with held(chat, upstream):
        for group in range(10):
            sent += [asyncio.create_task(answered(chat, f"{group} {number}")) for number in range(30)]
            await until_busy(chat, 1, len(sent))
        assert len(upstream.requests(PATH)) == 1
    answers = await asyncio.gather(*sent)
    stored = [message for page in (1, 2) for message in await chat.stored(page=page, page_size=500)]
    assert len(stored) == 602
    told = pairs([(each["role"], each["content"]) for each in stored])[1:]
    questions = [f"{group} {number}" for group in range(10) for number in range(30)]
    assert dict(told) == dict(zip(questions, answers, strict=True))
    assert [question[0] for question, _ in told] == [question[0] for question in questions]
    assert [each["seq"] for each in stored] == list(range(1, 603))
    await until_busy(chat, 0, 0)


async def test_two_relays_on_one_session(pair: tuple[Chat, Chat], upstream: TestUpstream) -> None:
    """Forty requests through both at once are forty turns, one after the other."""
    one, two = pair
    questions = [f"question {number}" for number in range(40)]
    asked = [answered((one, two)[number % 2], question) for number, question in enumerate(questions)]
    answers = await asyncio.gather(*asked)
    assert sorted(pairs(await one.history())) == sorted(zip(questions, answers, strict=True))
    assert [turn["status"] for turn in await one.turns()] == ["completed"] * 40


@pytest.mark.parametrize("streams", [False, True])
async def test_a_busy_session_may_be_refused_at_once(
    pair: tuple[Chat, Chat], upstream: TestUpstream, streams: bool
) -> None:
    """By the relay that serves it, and by another one."""
    one, two = pair
    headers = {"x-session-busy": "reject"}
    assert (await one.ask("it is free", headers=headers)).status_code == 200
    async with held(one, upstream):
        for each in (one, two):
            answer = await each.ask("me too", headers=headers, stream=streams)
            error_of(answer, 409, "invalid_request_error")
            assert int(answer.headers["retry-after"]) >= 1
            assert "x-turn-id" not in answer.headers
            await until_busy(each, int(each is one), 0)
        assert (await other(two).ask("another session", headers=headers)).status_code == 200
    await one.until_turn("interrupted")
    assert (await two.ask("it is free", headers=headers, stream=streams)).status_code == 200
    asked = [content for role, content in await one.history() if role == "user"]
    assert asked == ["it is free", "hold", "it is free"]


async def test_who_leaves_behind_another_relays_turn_is_in_nobodys_way(
    pair: tuple[Chat, Chat], upstream: TestUpstream
) -> None:
    """Its place is free within a second, however long that turn goes on, and nothing of it is in the conversation."""
    one, two = pair
    async with held(one, upstream):
        asking = asyncio.create_task(two.ask("too late"))
        await until_busy(two, 1, 0)
        asking.cancel()
        await until_busy(two, 0, 0, seconds=1)
        assert [turn["status"] for turn in await one.turns()] == ["open"]
    await two.say("another")
    assert [content for role, content in await one.history() if role == "user"][1:] == ["another"]


async def test_who_leaves_while_the_store_says_nothing_is_in_nobodys_way(
    own_database: str, upstream: TestUpstream, tmp_path: Path
) -> None:
    async with stack_of(own_database, upstream, tmp_path) as stack:
        chat = stack.chat()
        await chat.say("Hello")
        with frozen(stack.store.pid):
            body = chat.body("implied") | {"metadata": {}}
            for streams in (False, True):
                named = asyncio.create_task(chat.ask("u1", assistant("a"), "u2", stream=streams))
                implied = asyncio.create_task(chat.http.post(PATH, json=body, headers={"session-id": "s"}))
                await until_busy(chat, 1, 1)
                named.cancel()
                implied.cancel()
                await until_busy(chat, 0, 0, seconds=1)
        await chat.say("Goodbye")
        assert [content for role, content in await chat.history() if role == "user"][-1:] == ["Goodbye"]
