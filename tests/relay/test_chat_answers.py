"""What the chat door makes of what upstream says: refusals, odd answers, answers given again or kept on disk."""

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.relay.calls import MODEL, Json
from tests.relay.key_calls import seconds_until
from tests.relay.stack import stack_of
from tests.upstream.client import TestUpstream

PATHS = ("/api/chat", "/api/chat/stream")


def body(**fields: Any) -> Json:
    return {"message": "Hello", "model": MODEL, **fields}


def events_of(answer: httpx.Response) -> list[Json]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]


async def told(http: httpx.AsyncClient, path: str, **request: Any) -> Json:
    """What the answer tells, without its type; a stream's contents are its response."""
    answer = await http.post(path, **request)
    if path == PATHS[0]:
        assert answer.status_code == 200, answer.text
        return dict(answer.json())
    *contents, done = events_of(answer)
    assert done.pop("type") == "done", done
    assert {each["type"] for each in contents} <= {"content"}
    joined = "".join(each["content"] for each in contents)
    assert joined.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") == done["response"]
    return done


# ── refusals ────────────────────────────────────────────────────────────────────────────────────

REFUSAL = {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long"}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("status", "content"), [(400, REFUSAL), (404, REFUSAL), (422, REFUSAL), (413, "too large")])
async def test_a_refusal_is_passed_on_as_it_is(
    http: httpx.AsyncClient, upstream: TestUpstream, path: str, status: int, content: Any
) -> None:
    """It is no answer, not even an empty one; nothing of the exchange stays in the conversation."""
    upstream.script({"status": status, "body": content})
    conversation = uuid.uuid4().hex
    answer = await http.post(path, json=body(conversation_id=conversation))
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("application/json")
    assert (answer.json() if isinstance(content, dict) else answer.text) == content
    assert (await told(http, path, json=body(conversation_id=conversation)))["message_count"] == 2


# ── odd answers ─────────────────────────────────────────────────────────────────────────────────


def sse(*events: Json) -> list[str]:
    return [f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events]


def start(message: Any = None, **block: Any) -> list[Json]:
    message = {"id": "m", "type": "message", "role": "assistant", "model": MODEL, "content": [], **(message or {})}
    return [
        {"type": "message_start", "message": {"usage": {"input_tokens": 3, "output_tokens": 1}, **message}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "", **block}},
    ]


def said(text: str) -> Json:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


def end(usage: Any) -> list[Json]:
    return [
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop"},
    ]


COUNTS = {"output_tokens": 5}


@pytest.mark.parametrize(("events", "text", "output_tokens"), [
    ([*start(), said("a \ud800 b"), *end(COUNTS)], "a \ud800 b", 5),
    ([*start(), said("\ud83d"), said("\ude00"), *end(COUNTS)], "😀", 5),
    ([*start(), said("a\0b"), *end(COUNTS)], "a\0b", 5),
    ([*start(text="Hel"), said("lo"), *end(COUNTS)], "Hello", 5),
    ([*start(), said("x"), *end([1])], "x", 1),
    ([*start({"usage": [1]}), said("x"), *end(COUNTS)], "x", 5),
])  # fmt: skip
async def test_an_odd_stream_is_told_to_its_end(
    http: httpx.AsyncClient, upstream: TestUpstream, events: list[Json], text: str, output_tokens: int
) -> None:
    upstream.script({"raw_events": sse(*events)})
    done = await told(http, PATHS[1], json=body())
    assert (done["response"], done["usage"]["output_tokens"], done["message_count"]) == (text, output_tokens, 2)


@pytest.mark.parametrize("error", [None, "boom", {"type": "overloaded_error", "message": "busy"}])
async def test_an_error_in_the_stream_is_told_as_one(
    http: httpx.AsyncClient, upstream: TestUpstream, error: Any
) -> None:
    upstream.script({"raw_events": sse(*start(), said("x"), {"type": "error", "error": error})})
    events = events_of(await http.post(PATHS[1], json=body()))
    known = error if isinstance(error, dict) else {"type": "api_error", "message": "The upstream failed to answer"}
    expected = {"type": "error", "error": known, "message": known["message"]}
    assert events == [{"type": "content", "content": "x"}, expected]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", ["a \ud800 b", "whole at once"])
async def test_an_answer_that_comes_as_a_whole(
    http: httpx.AsyncClient, upstream: TestUpstream, path: str, text: str
) -> None:
    """Also where a stream was asked for; a usage that upstream does not tell is the estimated one."""
    message = {"id": "m", "type": "message", "role": "assistant", "model": MODEL, "stop_reason": "end_turn"}
    upstream.script({"body": message | {"content": [{"type": "text", "text": text}]}})
    done = await told(http, path, json=body())
    assert (done["response"], done["model"], done["message_count"]) == (text, MODEL, 2)
    assert done["usage"]["output_tokens"] > 0


# ── given again, and kept on disk ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", PATHS)
async def test_an_answer_given_again_is_the_same(
    http: httpx.AsyncClient, sessions: httpx.AsyncClient, upstream: TestUpstream, path: str
) -> None:
    request = {"json": body(conversation_id=uuid.uuid4().hex), "headers": {"idempotency-key": uuid.uuid4().hex}}
    first = await told(http, path, **request)
    for again in PATHS:
        assert await told(http, again, **request) == first
    assert len(upstream.requests("/v1/messages")) == 1
    place = f"/sessions/{first['session_id']}/messages/{first['message_id']}"
    assert (await sessions.get(place, params={"user_id": "dev"})).json()["content"] == first["response"]


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_told_of_an_answer_that_waits_on_disk_becomes_true(
    own_database: str, upstream: TestUpstream, scratch: Path, path: str
) -> None:
    """The store goes while upstream answers, and comes back."""
    said = body(conversation_id=uuid.uuid4().hex)
    async with stack_of(own_database, upstream, scratch / f"chat-{uuid.uuid4().hex[:8]}") as stack:

        async def lose_store() -> None:
            await upstream.until(lambda state: state["running"] == 1)
            stack.store.kill()

        async def is_delivered() -> bool:
            return not stack.spooled()

        assert (await told(stack.http, path, json=said))["message_count"] == 2
        upstream.script({"delay_ms": 400})
        losing = asyncio.create_task(lose_store())
        done = await told(stack.http, path, json=said)
        await losing
        assert len(stack.spooled()) == 1
        stack.start_store()
        await seconds_until(is_delivered)
        place = f"/sessions/{said['conversation_id']}"
        stored = await stack.sessions.get(f"{place}/messages/{done['message_id']}", params={"user_id": "dev"})
        assert (stored.json()["role"], stored.json()["content"]) == ("assistant", done["response"])
        seen = await stack.http.get(f"/api{place}")
        assert seen.json()["message_count"] == done["message_count"] == 4
