"""Idempotency-Key through the relay: one question, one answer and one call of upstream, however often it is sent."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import pytest_asyncio

from tests.relay.calls import Chat, Json, assistant, error_of, events_of, streamed_text, text_of, user
from tests.relay.stack import Stack, frozen, frozen_upstream, stack_of
from tests.relay.test_turn_status import key_of
from tests.upstream.client import TestUpstream

LONG = "word " * 60
PATH = "/v1/messages"


@dataclass(frozen=True)
class Request:
    """One request under one key, however often it is sent. `chat` is where it goes; it names no session by itself."""

    chat: Chat
    body: Json
    headers: dict[str, str] = field(default_factory=dict)
    key: str = field(default_factory=lambda: f"key-{uuid.uuid4().hex}")

    async def send(self, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
        """The whole answer, whatever it is."""
        sent = {"idempotency-key": self.key, **self.headers, **(headers or {})}
        return await self.chat.http.post(PATH, json=self.body | changes, headers=sent)

    async def until_answered(self, seconds: float = 20) -> httpx.Response:
        """Sends it until it is neither running elsewhere nor in want of the store."""
        deadline = asyncio.get_running_loop().time() + seconds
        while (answer := await self.send()).status_code in {409, 529}:
            assert int(answer.headers["retry-after"]) >= 1
            assert asyncio.get_running_loop().time() < deadline, answer.text
            await asyncio.sleep(0.05)
        return answer

    async def leave(self) -> None:
        """Sends it as a stream, and hangs up in the middle of the answer."""
        async with httpx.AsyncClient(base_url=self.chat.http.base_url, trust_env=False) as client:
            headers = {**self.chat.http.headers, "idempotency-key": self.key, **self.headers}
            async with client.stream("POST", PATH, json=self.body | {"stream": True}, headers=headers) as answer:
                seen = b""
                async for chunk in answer.aiter_raw():
                    seen += chunk
                    if seen.count(b"content_block_delta") >= 4:
                        return


def asking(chat: Chat, *messages: str | Json, **fields: Any) -> Request:
    """A request in the chat's session."""
    return Request(chat, chat.body(*messages, **fields))


def asking_elsewhere(chat: Chat, *messages: str | Json, **headers: str) -> Request:
    """A request that names no session in its body."""
    body = chat.body(*messages)
    del body["metadata"]
    return Request(chat, body, {name.replace("_", "-"): value for name, value in headers.items()})


def replayed(again: httpx.Response, first: httpx.Response) -> httpx.Response:
    """The second answer, which must be the first one given again."""
    assert again.status_code == 200, again.text
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    for name in ("x-session-id", "x-turn-id"):
        assert again.headers.get(name) == first.headers.get(name)
    assert again.headers["x-relay-attempts"] == "0"
    return again


def in_session_of(chat: Chat, answer: httpx.Response) -> Chat:
    return replace(chat, session_id=answer.headers["x-session-id"])


def message_of(stream: bytes) -> Json:
    """Id, text and ends of the message that a whole stream holds."""
    events = events_of(stream)
    assert events[-1] == ("message_stop", {"type": "message_stop"})
    start = next(data["message"] for name, data in events if name == "message_start")
    end = next(data for name, data in events if name == "message_delta")
    found = {name: start[name] for name in ("id", "type", "role", "model")}
    return found | {"text": streamed_text(stream), "stop_reason": end["delta"]["stop_reason"], "usage": end["usage"]}


def same_of(message: Json) -> Json:
    """What `message_of` tells, of a plain answer."""
    found = {name: message[name] for name in ("id", "type", "role", "model", "stop_reason", "usage")}
    return found | {"text": text_of(message)}


# ── a completed answer ──────────────────────────────────────────────────────────────────────────


async def test_a_plain_answer_is_given_again(chat: Chat, upstream: TestUpstream) -> None:
    request = asking(chat, "Hello")
    first = await request.send()
    assert first.status_code == 200
    again = replayed(await request.send(), first)
    assert again.content == first.content
    assert again.headers["content-type"] == "application/json"
    assert again.headers["x-session-persisted"] == "yes"
    reordered = dict(reversed(request.body.items()))
    assert replayed(await replace(request, body=reordered).send(), first).content == first.content
    stream = replayed(await request.send(stream=True), first)
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert message_of(stream.content) == same_of(first.json())
    assert len(upstream.requests(PATH)) == 1
    assert await chat.history() == [("user", "Hello"), ("assistant", text_of(first.json()))]
    # Another key, or none, is another request.
    assert "idempotent-replayed" not in (await replace(request, key="other").send()).headers
    assert len(upstream.requests(PATH)) == 2


async def test_a_stream_is_given_again(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": LONG, "stop_reason": "max_tokens"})
    request = asking(chat, "Hello", stream=True)
    first = await request.send()
    assert first.headers["content-type"] == "text/event-stream; charset=utf-8"
    again = replayed(await request.send(), first)
    assert again.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert message_of(again.content) == message_of(first.content)
    plain = replayed(await request.send(stream=False), first)
    assert same_of(plain.json()) == message_of(first.content)
    assert len(upstream.requests(PATH)) == 1
    assert await chat.history() == [("user", "Hello"), ("assistant", LONG)]


async def test_answers_that_are_more_than_a_text(chat: Chat, upstream: TestUpstream) -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
        {"type": "tool_use", "id": "t1", "name": "clock", "input": {"zone": "Europe/Berlin", "at": [1, {"é": None}]}},
    ]
    upstream.script({"blocks": blocks, "repeat": 2})
    for streams in (False, True):
        request = asking(chat, "What time is it?", stream=streams)
        first = await request.send()
        plain = replayed(await request.send(stream=False), first)
        assert plain.json()["content"] == blocks
        assert plain.json()["stop_reason"] == "tool_use"
        upstream.reset()
        upstream.script({"blocks": blocks})


async def test_a_session_that_was_made_for_the_request(chat: Chat, upstream: TestUpstream) -> None:
    request = asking_elsewhere(chat, "Hello")
    first = await request.send()
    again = replayed(await request.send(), first)
    assert again.content == first.content
    assert len(await in_session_of(chat, first).history()) == 2
    assert len(upstream.requests(PATH)) == 1


async def test_without_a_session(chat: Chat, upstream: TestUpstream) -> None:
    request = asking_elsewhere(chat, "Hello", x_session_id="none")
    upstream.script({"status": 400})
    assert (await request.send()).status_code == 400
    first = await request.send()
    assert first.headers["x-session-persisted"] == "none"
    assert "x-session-id" not in first.headers
    assert replayed(await request.send(), first).content == first.content
    assert len(upstream.requests(PATH)) == 2


async def test_an_answer_whose_client_has_left_is_its_next_tries(
    chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    chat: Chat = await chat_at(make_relay(RELAY_ON_DISCONNECT="drain"))
    upstream.script({"text": LONG, "event_delay_ms": 5})
    request = asking(chat, "Hello")
    await request.leave()
    answer = await request.until_answered()
    assert answer.headers["idempotent-replayed"] == "true"
    assert text_of(answer.json()) == LONG
    assert len(upstream.requests(PATH)) == 1
    assert await chat.history() == [("user", "Hello"), ("assistant", LONG)]


# ── refused ─────────────────────────────────────────────────────────────────────────────────────


async def test_another_request_under_the_same_key(chat: Chat, upstream: TestUpstream) -> None:
    request = asking(chat, "Hello")
    await request.send()
    other_session = replace(request, body=Chat(chat.http, chat.sessions).body("Hello"))
    for other in (replace(request, body=chat.body("Bye")), other_session, replace(request, headers={"x": "y"})):
        for streams in (False, True):
            answer = await other.send(stream=streams)
            if other.headers:  # only the body and the session count
                assert answer.headers["idempotent-replayed"] == "true"
            else:
                assert "Idempotency-Key" in error_of(answer, 422, "invalid_request_error")
    error_of(await request.send(max_tokens=7), 422, "invalid_request_error")
    assert len(upstream.requests(PATH)) == 1
    assert len(await chat.history()) == 2


@pytest.mark.parametrize("key", [b"", b"two words", b"tab\there", b"x" * 256, "schlüssel".encode(), "键".encode()])
async def test_a_key_that_is_none(chat: Chat, upstream: TestUpstream, key: bytes) -> None:
    headers = [(b"idempotency-key", key)]
    answer = await chat.http.post(PATH, json=chat.body("Hello"), headers=headers)
    assert error_of(answer, 400, "invalid_request_error").startswith("Idempotency-Key: ")
    assert upstream.requests() == []
    assert await chat.stored() == []


async def test_two_keys_at_once_are_none(chat: Chat) -> None:
    headers = [(b"idempotency-key", b"one"), (b"idempotency-key", b"two")]
    answer = await chat.http.post(PATH, json=chat.body("Hello"), headers=headers)
    assert error_of(answer, 400, "invalid_request_error").startswith("Idempotency-Key: ")


async def test_another_users_same_key_is_another(
    chat: Chat, upstream: TestUpstream, user_id: str, database_url: str, data_dir: Path
) -> None:
    request = asking(chat, "Hello")
    first = await request.send()
    stranger = {"x-api-key": await asyncio.to_thread(key_of, user_id, database_url, data_dir)}
    theirs = await request.send(headers=stranger)
    assert theirs.status_code == 200
    assert "idempotent-replayed" not in theirs.headers
    assert theirs.headers["x-turn-id"] != first.headers["x-turn-id"]
    error_of(await request.send(headers=stranger, max_tokens=7), 422, "invalid_request_error")
    assert replayed(await request.send(headers=stranger), theirs).content == theirs.content
    assert replayed(await request.send(), first).content == first.content
    assert len(upstream.requests(PATH)) == 2


async def test_one_that_runs_is_not_run_again(chat: Chat, upstream: TestUpstream) -> None:
    request = asking(chat, "Hello")
    upstream.script({"text": LONG, "hang_seconds": 30, "after_events": 6})
    async with chat.http.stream(
        "POST", PATH, json=request.body | {"stream": True}, headers={"idempotency-key": request.key}
    ) as first:
        assert first.status_code == 200
        for streams in (False, True):
            answer = await request.send(stream=streams)
            error_of(answer, 409, "invalid_request_error")
            assert int(answer.headers["retry-after"]) >= 1
        error_of(await request.send(max_tokens=7), 422, "invalid_request_error")
    upstream.reset()
    # Its client has left: what came of it is stored, and the next one takes its place.
    answer = await request.until_answered()
    assert "idempotent-replayed" not in answer.headers
    assert await chat.history() == [("user", "Hello"), ("assistant", text_of(answer.json()))]


@pytest.mark.parametrize("is_named", [True, False])
async def test_of_twenty_at_once_one_is_served(chat: Chat, upstream: TestUpstream, is_named: bool) -> None:
    request = asking(chat, "Hello") if is_named else asking_elsewhere(chat, "Hello")
    upstream.script({"delay_ms": 200})
    answers = await asyncio.gather(*(request.send(stream=number % 3 == 0) for number in range(20)))
    served = [answer for answer in answers if answer.status_code == 200]
    [first] = [answer for answer in served if "idempotent-replayed" not in answer.headers]
    for answer in answers:
        if answer.status_code == 200:
            assert answer.headers["x-turn-id"] == first.headers["x-turn-id"]
        else:
            error_of(answer, 409, "invalid_request_error")
            assert int(answer.headers["retry-after"]) >= 1
    assert len(upstream.requests(PATH)) == 1
    there = in_session_of(chat, first)
    assert len(await there.turns()) == 1
    assert [role for role, _ in await there.history()] == ["user", "assistant"]
    replayed(await request.send(), first)


# ── tries that came to nothing ──────────────────────────────────────────────────────────────────

TRIES: dict[str, Json] = {
    "failed": {"status": 500},
    "refused": {"status": 400},
    "interrupted": {"text": LONG, "cut_after_events": 6},
    "left": {"text": LONG, "event_delay_ms": 10},
}


async def begun(chat: Chat, upstream: TestUpstream) -> list[Json]:
    """A conversation of one turn; the client's array of it."""
    upstream.script({"text": "a1"})
    assert await chat.say("u1") == "a1"
    return [user("u1"), assistant("a1")]


async def try_in_vain(request: Request, upstream: TestUpstream, came_to: str) -> None:
    """One try that ends so; its partial answer, if there is one, is stored when this returns."""
    upstream.script(TRIES[came_to])
    if came_to == "left":
        await request.leave()
        await upstream.until(lambda state: state["running"] == 0)
        while (answer := await request.send(max_tokens=8)).status_code == 409:  # 422 in any case: it tells when it ends
            await asyncio.sleep(0.02)
        error_of(answer, 422, "invalid_request_error")
        return
    answer = await request.send(stream=came_to == "interrupted")
    assert answer.status_code == {"failed": 529, "refused": 400, "interrupted": 200}[came_to]
    assert "idempotent-replayed" not in answer.headers


@pytest.mark.parametrize("came_to", [("failed", "interrupted"), ("left", "refused")])
@pytest.mark.parametrize("sends", ["new", "whole", "first", "prefill", "fresh", "implied", "alone"])
async def test_a_try_that_came_to_nothing_is_run_again_in_its_place(
    chat: Chat, upstream: TestUpstream, rest: Callable[[], None], sends: str, came_to: tuple[str, str]
) -> None:
    """Twice in vain, then with success: in the end the question is there once, as if the first had succeeded."""
    before = await begun(chat, upstream) if sends in {"new", "whole", "prefill"} else []
    question = user("u2")
    match sends:
        case "new" | "first":
            request = asking(chat, question)
        case "whole":
            request = asking(chat, *before, question)
        case "prefill":
            request = asking(chat, *before, question, assistant("I would say"))
        case "fresh":
            request = asking_elsewhere(chat, question)
        case "implied":
            request = asking_elsewhere(chat, question, x_claude_code_session_id=str(uuid.uuid4()))
        case _:
            request = asking_elsewhere(chat, question, x_session_id="none")
    for each in came_to:
        await try_in_vain(request, upstream, each)
        rest()
    asked = len(upstream.requests(PATH))
    upstream.script({"text": " a2" if sends == "prefill" else "a2"})
    answer = await request.send()
    assert (answer.status_code, text_of(answer.json())) == (200, " a2" if sends == "prefill" else "a2")
    assert "idempotent-replayed" not in answer.headers
    last = upstream.requests(PATH)[-1]["json"]["messages"]
    assert last == [*before, question, *([assistant("I would say")] if sends == "prefill" else [])] or sends == "new"
    assert [each["role"] for each in last].count("user") == len(before) // 2 + 1
    assert replayed(await request.send(), answer).content == answer.content
    assert len(upstream.requests(PATH)) == asked + 1
    if sends == "alone":
        assert "x-turn-id" not in answer.headers
        return
    there = in_session_of(chat, answer)
    told = [(each["role"], each["content"]) for each in [*before, question]]
    assert await there.history() == [*told, ("assistant", "I would say a2" if sends == "prefill" else "a2")]
    statuses = [turn["status"] for turn in await there.turns()][:3]
    ends = [{"left": "interrupted"}.get(each, each) for each in came_to]
    assert statuses == ["completed", *reversed(ends)]


async def test_what_was_written_after_a_failed_try_stays(
    chat: Chat, upstream: TestUpstream, rest: Callable[[], None]
) -> None:
    """Only its own messages are ever taken back for a try, and not from under somebody else's."""
    request = asking(chat, "u1")
    await try_in_vain(request, upstream, "failed")
    rest()
    upstream.script({"text": "b"}, {"text": "a1"})
    assert await chat.say("another") == "b"
    assert text_of((await request.send()).json()) == "a1"
    assert await chat.history() == [
        *[("user", "u1"), ("user", "another"), ("assistant", "b")],
        *[("user", "u1"), ("assistant", "a1")],
    ]


async def test_a_failed_try_in_a_session_that_was_closed_since(
    chat: Chat, upstream: TestUpstream, rest: Callable[[], None]
) -> None:
    request = asking(chat, "u1")
    await try_in_vain(request, upstream, "interrupted")
    rest()
    await chat.http.post(f"/sessions/{chat.session_id}/close")
    answer = await request.send()
    assert answer.status_code == 200
    assert await chat.history() == [("user", "u1"), ("assistant", text_of(answer.json()))]


async def test_a_fork_is_made_once(chat: Chat, upstream: TestUpstream, rest: Callable[[], None]) -> None:
    await begun(chat, upstream)
    request = asking(chat, user("u1"), assistant("other"), user("u2"))
    request = replace(request, headers={"x-session-conflict": "fork"})
    await try_in_vain(request, upstream, "failed")
    rest()
    upstream.script({"text": "a2"})
    answer = await request.send()
    there = in_session_of(chat, answer)
    assert there.session_id != chat.session_id
    assert await there.history() == [("user", "u1"), ("assistant", "other"), ("user", "u2"), ("assistant", "a2")]
    listed = await chat.sessions.get("/sessions", params={"user_id": "dev", "page_size": 100})
    parents = [(each.get("parent") or {}).get("session_id") for each in listed.json()["sessions"]]
    assert parents.count(chat.session_id) == 1
    replayed(await request.send(), answer)
    assert len(await chat.history()) == 2


# ── relays that are killed, and outages ─────────────────────────────────────────────────────────


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def own_stack(
    make_database: Callable[[], str], upstream_process: TestUpstream, scratch: Path
) -> AsyncIterator[Stack]:
    """In the end, whatever the tests did, its record agrees with itself and nothing waits."""
    async with stack_of(make_database(), upstream_process, scratch / "killed") as stack:
        yield stack
        await stack.check()


@pytest_asyncio.fixture(loop_scope="session")
async def stack(own_stack: Stack, upstream: TestUpstream) -> AsyncIterator[Stack]:
    """A stack whose services run, as usually set, before and after."""
    yield own_stack
    own_stack.revive()


def questions(upstream: TestUpstream) -> list[str]:
    """The last message of each call of upstream."""
    return [each["json"]["messages"][-1]["content"] for each in upstream.requests(PATH)]


async def check_runs_until_its_lease_is_over(stack: Stack, request: Request) -> None:
    answer = await request.send()
    error_of(answer, 409, "invalid_request_error")
    assert int(answer.headers["retry-after"]) >= 1
    await stack.leases_run_out()


TURN_ID = "SELECT turn_id FROM dev.relay_idempotency WHERE key = $1"
RECORD = "SELECT FROM dev.relay_idempotency WHERE key = $1 FOR UPDATE"


@pytest.mark.parametrize("store", ["blocked", "frozen"])
async def test_a_relay_killed_before_its_turn_is_open(stack: Stack, upstream: TestUpstream, store: str) -> None:
    """The store opens that turn afterwards, or does not: the question is there once all the same."""
    chat = stack.chat()
    upstream.script({"text": "a1"})
    await chat.say("u1")
    request = asking(chat, "u2")
    if store == "blocked":
        # As writers lock it: whatever is indexed beside them need not wait, and is not taken for the turn.
        row = "SELECT FROM dev.sessions WHERE session_id = $1 FOR NO KEY UPDATE"
        async with stack.locked(row, chat.session_id) as lock:
            sent = asyncio.create_task(request.send())
            await lock.waited_for()
            stack.relay.kill()
    else:
        async with stack.sql() as sql:
            with frozen(stack.store.pid):
                sent = asyncio.create_task(request.send())
                async with asyncio.timeout(10):
                    while not await sql.fetchval(TURN_ID, request.key):
                        await asyncio.sleep(0.01)
                stack.relay.kill()
    with pytest.raises(httpx.HTTPError):
        await sent
    stack.start_relay()
    await check_runs_until_its_lease_is_over(stack, request)
    upstream.script({"text": "a2"})
    answer = await request.until_answered()
    assert text_of(answer.json()) == "a2"
    assert questions(upstream) == ["u1", "u2"]
    assert await chat.history() == [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    replayed(await request.send(), answer)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_relay_killed_before_its_answer_is_whole(stack: Stack, upstream: TestUpstream, streams: bool) -> None:
    request = asking_elsewhere(stack.chat(), "Hello")
    upstream.script({"text": LONG, "hang_seconds": 30, "after_events": 6 if streams else None})
    sent = asyncio.create_task(request.send(stream=streams))
    await upstream.until(lambda state: state["running"] == 1)
    stack.relay.kill()
    with pytest.raises(httpx.HTTPError):
        await sent
    stack.start_relay()
    await check_runs_until_its_lease_is_over(stack, request)
    answer = await request.until_answered()
    assert "idempotent-replayed" not in answer.headers
    there = in_session_of(request.chat, answer)
    assert await there.history() == [("user", "Hello"), ("assistant", text_of(answer.json()))]
    assert [turn["status"] for turn in await there.turns()] == ["completed", "expired"]
    assert replayed(await request.send(), answer).content == answer.content


@pytest.mark.parametrize("streams", [False, True])
async def test_a_relay_killed_between_the_turns_end_and_the_record(
    stack: Stack, upstream: TestUpstream, streams: bool
) -> None:
    """The answer is found by its turn; the session's id is one that no header holds as it is."""
    chat = replace(stack.chat(), session_id=f"会话-{uuid.uuid4().hex}")
    request = asking(chat, user("Hello"), assistant("I would say"))
    upstream.script({"text": " hello", "stop_reason": "max_tokens"})
    async with AsyncExitStack() as held:
        with frozen_upstream(upstream):
            sent = asyncio.create_task(request.send(stream=streams))
            turn = await request.chat.until_turn("open")
            record = await held.enter_async_context(stack.locked(RECORD, request.key))
        await request.chat.until_turn("completed")
        await record.waited_for()
        stack.relay.kill()
        await record.end_waiting()
    with pytest.raises(httpx.HTTPError):
        await sent
    stack.start_relay()
    await check_runs_until_its_lease_is_over(stack, request)
    answer = await request.until_answered()
    assert answer.headers["idempotent-replayed"] == "true"
    assert answer.headers["x-turn-id"] == turn["turn_id"]
    assert unquote(answer.headers["x-session-id"]) == request.chat.session_id
    assert answer.headers["x-session-persisted"] == "yes"
    assert (text_of(answer.json()), answer.json()["stop_reason"]) == (" hello", "max_tokens")
    assert (await request.send()).content == answer.content
    assert len(upstream.requests(PATH)) == 1
    assert await request.chat.history() == [("user", "Hello"), ("assistant", "I would say hello")]


async def test_killed_at_any_moment(stack: Stack, upstream: TestUpstream) -> None:
    """Forty requests, under two relays that are killed in the middle of twenty each."""
    for told_before in (2, 11):
        requests = []
        for number in range(20):
            chat = stack.chat()
            question = f"question {told_before}.{number}."
            upstream.script({"match": {"contains": question}, "delay_ms": 15 * number, "event_delay_ms": number})
            form = asking if number % 4 else asking_elsewhere
            requests.append(form(chat, user(question)))
        told: dict[str, httpx.Response] = {}

        async def send(request: Request, number: int, told: dict[str, httpx.Response] = told) -> None:
            with contextlib.suppress(httpx.HTTPError):
                answer = await request.send(stream=number % 3 == 0)
                if answer.status_code == 200 and (number % 3 or b"message_stop" in answer.content):
                    told[request.key] = answer

        sent = [asyncio.create_task(send(request, number)) for number, request in enumerate(requests)]
        while len(told) < told_before:
            await asyncio.sleep(0.001)
        stack.relay.kill()
        await asyncio.gather(*sent)
        stack.start_relay()
        await stack.leases_run_out()
        answers = await asyncio.gather(*(request.until_answered() for request in requests))
        asked = questions(upstream)
        for request, answer in zip(requests, answers, strict=True):
            assert answer.status_code == 200
            question = request.body["messages"][0]["content"]
            there = in_session_of(request.chat, answer)
            assert await there.history() == [("user", question), ("assistant", text_of(answer.json()))]
            if first := told.get(request.key):
                replayed(answer, first)
                assert asked.count(question) == 1
            assert (await request.send()).headers["x-turn-id"] == answer.headers["x-turn-id"]
        upstream.reset()


async def test_the_store_away_at_the_end_of_the_turn(stack: Stack, upstream: TestUpstream) -> None:
    """The answer is on record: it is given again while its completion still waits on disk."""
    request = asking(stack.chat(), "Hello")
    with frozen_upstream(upstream):
        sent = asyncio.create_task(request.send())
        await request.chat.until_turn("open")
        stack.store.kill()
    first = await sent
    assert first.headers["x-session-persisted"] == "deferred"
    assert len(stack.spooled()) == 1
    for _ in range(2):
        assert replayed(await request.send(), first).content == first.content
    stack.start_store()
    await request.chat.until_turn("completed", seconds=10)
    assert replayed(await request.send(), first).content == first.content
    assert len(upstream.requests(PATH)) == 1
    assert await request.chat.history() == [("user", "Hello"), ("assistant", text_of(first.json()))]


async def test_the_store_away_and_the_relay_killed_before_the_record(stack: Stack, upstream: TestUpstream) -> None:
    """The answer is on disk only: nothing is asked anew until the store has it, and then it is given."""
    request = asking(stack.chat(), "Hello")
    upstream.script({"text": "kept"})
    async with AsyncExitStack() as held:
        with frozen_upstream(upstream):
            sent = asyncio.create_task(request.send())
            turn = await request.chat.until_turn("open")
            record = await held.enter_async_context(stack.locked(RECORD, request.key))
            stack.store.kill()
        await record.waited_for()
        assert len(stack.spooled()) == 1
        stack.relay.kill()
        await record.end_waiting()
    with pytest.raises(httpx.HTTPError):
        await sent
    stack.start_relay()
    await stack.leases_run_out()
    for _ in range(2):
        away = await request.send()
        error_of(away, 529, "overloaded_error")
        assert int(away.headers["retry-after"]) >= 1
    stack.start_store()
    answer = await request.until_answered()
    assert answer.headers["idempotent-replayed"] == "true"
    assert answer.headers["x-turn-id"] == turn["turn_id"]
    assert text_of(answer.json()) == "kept"
    assert len(upstream.requests(PATH)) == 1
    assert await request.chat.history() == [("user", "Hello"), ("assistant", "kept")]


async def test_records_that_cannot_be_read_or_written(stack: Stack, upstream: TestUpstream) -> None:
    """Without the record nothing is asked upstream; what was asked is not held back for it, and is found later."""
    with stack.relay_with(DATABASE_TIMEOUT_SECONDS="0.5"):
        request = asking(stack.chat(), "Hello")
        async with stack.locked("LOCK TABLE dev.relay_idempotency IN ACCESS EXCLUSIVE MODE"):
            away = await request.send()
            error_of(away, 529, "overloaded_error")
            assert int(away.headers["retry-after"]) >= 1
            assert upstream.requests() == []
            assert await stack.chat().say("without a key")
        assert await request.chat.stored() == []
        upstream.reset()
        async with AsyncExitStack() as held:
            with frozen_upstream(upstream):
                sent = asyncio.create_task(request.send())
                turn = await request.chat.until_turn("open")
                await held.enter_async_context(stack.locked(RECORD, request.key))
            first = await sent
        assert (first.status_code, first.headers["x-turn-id"]) == (200, turn["turn_id"])
        assert first.headers["x-session-persisted"] == "yes"
        await stack.leases_run_out()
        answer = replayed(await request.until_answered(), first)
        assert text_of(answer.json()) == text_of(first.json())
        assert len(upstream.requests(PATH)) == 1
        assert len(await request.chat.history()) == 2
