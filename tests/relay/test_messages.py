"""POST /v1/messages, plain and streamed: what passes on, what is stored, what the headers say."""

import json
import uuid
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.relay.calls import UPSTREAM_KEY, Chat, assistant, events_of, streamed_text, text_of, user
from tests.upstream.client import TestUpstream

PATHS = ("/v1/messages", "/api/v1/messages", "/claude-kiro-oauth/v1/messages", "/api/v1/claude-kiro-oauth/v1/messages")
WEATHER = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm", "big": 2**70, "f": 1.0}}


async def test_a_plain_answer_passes_on_byte_for_byte_and_is_stored(chat: Chat, upstream: TestUpstream) -> None:
    exact = (
        '{ "id":"msg_1","type":"message","role":"assistant","model":"m-1",\n'
        '"content":[{"type":"text","text":"H\\u00e9!"}],"stop_reason":"end_turn","usage":{"input_tokens":7,"output_tokens":5,"odd":1.50}}'
    )
    upstream.script({"body": exact, "headers": {"anthropic-ratelimit-requests-remaining": "5", "request-id": "req_9"}})
    answer = await chat.ask("Hello")
    assert answer.content == exact.encode()
    assert answer.status_code == 200
    assert answer.headers["request-id"] == "req_9"
    assert "anthropic-ratelimit-requests-remaining" not in answer.headers
    stored = await chat.stored()
    assert [(each["role"], each["content"], each["tokens_used"]) for each in stored] == [
        ("user", "Hello", 0),
        ("assistant", "Hé!", 12),
    ]
    turn = (await chat.turns())[0]
    assert (turn["status"], turn["stop_reason"], turn["model"]) == ("completed", "end_turn", "m-1")
    assert turn["usage"] == {"input_tokens": 7, "output_tokens": 5, "odd": 1.5}
    assert turn["upstream"] == {"account": "anthropic", "attempts": 1, "request_id": "req_9", "status": 200}
    assert turn["turn_id"] == answer.headers["x-turn-id"]


async def test_a_stream_passes_on_byte_for_byte_and_is_stored(chat: Chat, upstream: TestUpstream) -> None:
    whole = await chat.stream_whole("Hello", metadata={"user_id": "u"})
    sent = upstream.requests("/v1/messages")[0]
    assert sent["outcome"] == "finished"
    assert len(whole) == sent["bytes_sent"]
    assert events_of(whole)[0][0] == "message_start"
    assert events_of(whole)[-1][0] == "message_stop"
    assert await chat.history() == [("user", "Hello"), ("assistant", streamed_text(whole))]
    assert (await chat.stored())[1]["tokens_used"] > 0


def event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n"


@pytest.mark.parametrize("chunk_bytes", [1, 7, None])
async def test_odd_events_and_line_ends_pass_on(chat: Chat, upstream: TestUpstream, chunk_bytes: int | None) -> None:
    message = {"id": "m", "role": "assistant", "content": [], "model": "m", "usage": {"input_tokens": 1}}
    events = [
        ": a comment\n\n",
        event("message_start", message=message).replace("\n", "\r\n"),
        event("something_new", x=[1]),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": "é!"}),
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}),
        event("message_stop") + ": the end\n\n",
    ]
    upstream.script({"raw_events": events, "chunk_bytes": chunk_bytes})
    assert await chat.stream_whole("Hello") == "".join(events).encode()
    assert await chat.history() == [("user", "Hello"), ("assistant", "é!")]


async def test_the_second_turn_knows_the_first_and_another_session_does_not(chat: Chat) -> None:
    assert "Ada" in await chat.say("My name is Ada", model="demo")
    assert "Your name is Ada" in await chat.say("What is my name?", model="demo")
    other = Chat(chat.http, chat.sessions)
    assert "I do not know your name" in await other.say("What is my name?", model="demo")
    assert len(await chat.stored()) == 4


async def test_the_demo_streams(chat: Chat) -> None:
    assert "张三" in streamed_text(await chat.stream_whole("我叫张三", model="demo"))
    assert "你叫张三" in streamed_text(await chat.stream_whole("我是谁？", model="demo"))


async def test_blocks_are_stored_as_they_are(chat: Chat, upstream: TestUpstream) -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
    blocks = [thinking, {"type": "text", "text": "Let me look."}, WEATHER]
    upstream.script({"blocks": blocks, "stop_reason": "tool_use"}, {"text": "Sunny"})
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    question = [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}, image]
    await chat.ask(user(question))
    result = [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "18°"}]
    assert await chat.say(user(result)) == "Sunny"
    sent = upstream.requests("/v1/messages")[1]["json"]["messages"]
    assert sent == [user(question), assistant(blocks), user(result)]


async def test_upstream_gets_the_clients_request(chat: Chat, upstream: TestUpstream) -> None:
    extra = {
        "system": [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}],
        "temperature": 0.5,
        "unknown_field": {"deep": [1, 2.5, None, 2**80]},
        "metadata": {"user_id": "somebody"},
    }
    body = chat.body("Hi", **extra)
    del body["max_tokens"]
    headers = {"anthropic-version": "2023-01-01", "anthropic-beta": "a,b", "x-secret": "s", "user-agent": "mine"}
    answer = await chat.http.post("/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200
    sent = upstream.requests("/v1/messages")[0]
    expected = {**body, "max_tokens": 4096, "metadata": {"user_id": "somebody"}}
    assert json.loads(sent["body"]) == expected
    assert sent["query"] == "beta=true"
    assert sent["headers"]["anthropic-version"] == "2023-01-01"
    assert sent["headers"]["anthropic-beta"] == "a,b"
    assert sent["headers"]["x-api-key"] == UPSTREAM_KEY
    assert sent["headers"]["user-agent"].startswith("session-relay/")
    assert "x-secret" not in sent["headers"]


async def test_metadata_goes_when_only_the_session_was_in_it(chat: Chat, upstream: TestUpstream) -> None:
    await chat.say("Hi")
    assert "metadata" not in upstream.requests("/v1/messages")[0]["json"]


@pytest.mark.parametrize("path", PATHS)
async def test_the_aliases(chat: Chat, path: str) -> None:
    answer = await chat.http.post(path, json=chat.body("Hi"))
    assert answer.status_code == 200
    assert answer.headers["x-session-id"] == chat.session_id
    counted = await chat.http.post(f"{path}/count_tokens", json=chat.body("Hi"))
    assert counted.json()["input_tokens"] > 0
    assert len(await chat.stored()) == 2


async def test_headers_of_answers(chat: Chat) -> None:
    plain = await chat.ask("Hi")
    told = {name: plain.headers[name] for name in ("x-session-id", "x-session-persisted", "x-relay-attempts")}
    assert told == {"x-session-id": chat.session_id, "x-session-persisted": "yes", "x-relay-attempts": "1"}
    assert plain.headers["x-turn-id"]
    assert plain.headers["request-id"].startswith("req_test")
    assert plain.headers["x-request-id"]
    async with chat.stream("again") as answer:
        assert answer.headers["x-session-persisted"] == "pending"
        assert answer.headers["x-session-id"] == chat.session_id
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        await answer.aread()


# ── which session ───────────────────────────────────────────────────────────────────────────────


async def post(chat: Chat, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "test-model", "max_tokens": 10, "messages": [user("Hi")], **fields}
    answer = await chat.http.post("/v1/messages", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


async def test_a_session_is_made_where_none_is_named(chat: Chat) -> None:
    made = (await post(chat)).headers["x-session-id"]
    assert uuid.UUID(made).version == 7
    assert len(await Chat(chat.http, chat.sessions, made).stored()) == 2


async def test_where_the_session_id_may_stand(chat: Chat) -> None:
    ids = {name: f"{name}-{uuid.uuid4().hex[:8]}" for name in ("body", "header", "code", "other", "webui")}
    in_uuid = str(uuid.uuid4())
    in_json = {"user_id": json.dumps({"device_id": "d", "account_uuid": "", "session_id": in_uuid})}
    in_text = {"user_id": f"user_{'0' * 64}_account__session_{in_uuid}"}
    cases: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        (ids["body"], {"metadata": {"session_id": ids["body"]}}, {"x-session-id": ids["header"]}),
        (ids["header"], {}, {"x-session-id": ids["header"], "x-claude-code-session-id": ids["code"]}),
        (ids["code"], {"metadata": in_text}, {"x-claude-code-session-id": ids["code"], "session-id": ids["other"]}),
        (ids["other"], {}, {"session-id": ids["other"], "x-openwebui-chat-id": ids["webui"]}),
        (ids["webui"], {}, {"x-openwebui-chat-id": ids["webui"]}),
        (in_uuid, {"metadata": in_text}, {}),
        (in_uuid, {"metadata": in_json}, {}),
    ]
    for expected, fields, headers in cases:
        assert (await post(chat, headers, **fields)).headers["x-session-id"] == expected


@pytest.mark.parametrize("session_id", ["会话-é", "100%", "a%20b", "tilde~ and blank"])
async def test_ids_that_headers_cannot_hold_are_percent_encoded(chat: Chat, session_id: str) -> None:
    session_id += uuid.uuid4().hex[:6]
    answer = await post(chat, metadata={"session_id": session_id})
    told = answer.headers["x-session-id"]
    assert told == (session_id if session_id.isascii() and "%" not in session_id else quote(session_id, safe=" "))
    again = await post(chat, {"x-session-id": told})
    assert again.headers["x-session-id"] == told
    assert len(await Chat(chat.http, chat.sessions, session_id).stored()) == 4


async def test_no_session_stores_nothing(chat: Chat) -> None:
    answer = await post(chat, {"x-session-id": "none"}, metadata={"session_id": chat.session_id, "user_id": "u"})
    assert answer.headers["x-session-persisted"] == "none"
    assert "x-session-id" not in answer.headers
    assert "x-turn-id" not in answer.headers
    assert await chat.stored() == []


async def test_a_look_at_a_session_and_closing_it(chat: Chat) -> None:
    await chat.say("My name is Ada", model="demo")
    shown = (await chat.http.get(f"/sessions/{chat.session_id}")).json()
    assert list(shown) == [
        *("session_id", "status", "created_at", "last_activity", "expires_at", "message_count", "total_tokens"),
    ]
    assert (shown["status"], shown["message_count"]) == ("active", 2)
    closed = (await chat.http.post(f"/api/v1/sessions/{chat.session_id}/close")).json()
    assert closed == shown | {"status": "ended"}
    assert (await chat.http.get(f"/api/v1/sessions/{chat.session_id}")).json() == closed
    # The id may be used again: it begins anew, and what was said before stays stored.
    assert "I do not know" in await chat.say("What is my name?", model="demo")
    assert len(await chat.stored()) == 2
    assert len(await chat.stored(include_superseded=True)) == 4


async def test_models(chat: Chat) -> None:
    listed = (await chat.http.get("/v1/models")).json()
    assert "demo" in [each["id"] for each in listed["data"]]
    assert text_of((await chat.ask("Hi", model="demo")).json())


async def test_heads_of_answers(chat: Chat) -> None:
    """As those who watch over services ask for them."""
    for path, status in {"/": 200, "/health": 200, "/v1/models": 200, "/sessions/nobody-has-it": 404}.items():
        asked, whole = await chat.http.head(path), await chat.http.get(path)
        assert (asked.status_code, asked.content) == (status, b""), path
        for name in ("content-type", "content-length"):
            assert asked.headers[name] == whole.headers[name]
    assert (await chat.http.head("/v1/messages")).status_code == 405
