"""The chat door: the seed's dialogue, streams, conversations, and who may use it."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.processes import Process, ServiceProcess
from tests.relay.calls import admin_headers, client_of, error_of, start_relay, upstream_settings
from tests.relay.key_calls import latin
from tests.upstream.client import TestUpstream

Json = dict[str, Any]


@pytest.fixture(scope="module")
def demo_relay(database_url: str, session_service: ServiceProcess, scratch: Path) -> Any:
    """A relay with the demo account alone, in a schema-sharing database of its own folder."""
    with start_relay(database_url, session_service.url, scratch / "chat", {}) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def demo(demo_relay: Process, scratch: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(demo_relay, scratch / "chat") as client:
        yield client


def new_id() -> str:
    return f"conv_{uuid.uuid4().hex[:12]}"


async def say(client: httpx.AsyncClient, message: str, conversation_id: str | None = None, **fields: Any) -> Json:
    body = {"message": message, **({"conversation_id": conversation_id} if conversation_id else {}), **fields}
    answer = await client.post("/api/chat", json={"model": "demo", **body})
    assert answer.status_code == 200, answer.text
    told: Json = answer.json()
    assert answer.headers["x-session-id"] == told["session_id"] == told["conversation_id"]
    return told


async def stream(client: httpx.AsyncClient, **body: Any) -> tuple[httpx.Response, list[Json]]:
    answer = await client.post("/api/chat/stream", json={"model": "demo", **body})
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    return answer, events


async def test_the_seeds_dialogue(demo: httpx.AsyncClient) -> None:
    """The first conversation knows the name, another does not."""
    first, second = new_id(), new_id()
    assert "张三" in (await say(demo, "你好，我叫张三", first))["response"]
    stranger = (await say(demo, "我是谁？", second))["response"]
    assert "张三" not in stranger
    assert "我不知道你的名字" in stranger
    assert "张三" in (await say(demo, "我是谁？", first))["response"]
    assert "张三" in (await say(demo, "我叫什么名字？", first))["response"]
    assert (await say(demo, "我叫什么？", first))["response"].startswith("你叫张三。")
    assert (await say(demo, "我叫什么？", new_id()))["response"].startswith("我不知道你的名字")


async def test_the_dialogue_in_english(demo: httpx.AsyncClient) -> None:
    first, second = new_id(), new_id()
    await say(demo, "Hello, my name is Alice", first)
    await say(demo, "Hello, my name is Bob", second)
    assert "Alice" in (await say(demo, "What is my name?", first))["response"]
    assert "Bob" in (await say(demo, "What is my name?", second))["response"]
    unknown = (await say(demo, "What is my name?"))["response"]
    assert "Alice" not in unknown
    assert "Bob" not in unknown


async def test_a_hundred_conversations_never_mix(demo: httpx.AsyncClient) -> None:
    async def talk(number: int) -> None:
        name, conversation = f"Name{number:03}", new_id()
        await say(demo, f"My name is {name}", conversation)
        await say(demo, "How are you?", conversation)
        await say(demo, "Tell me something", conversation)
        last = await say(demo, "What is my name?", conversation)
        assert name in last["response"]
        assert last["message_count"] == 8

    await asyncio.gather(*(talk(number) for number in range(100)))


async def test_what_an_answer_tells(demo: httpx.AsyncClient, sessions: httpx.AsyncClient) -> None:
    told = await say(demo, "Hello")
    assert set(told) == {
        *("conversation_id", "session_id", "message_id", "response", "model", "usage", "message_count"),
    }
    assert (told["model"], told["message_count"]) == ("demo", 2)
    assert told["usage"]["output_tokens"] > 0
    path = f"/sessions/{told['session_id']}/messages/{told['message_id']}"
    stored = (await sessions.get(path, params={"user_id": "dev"})).json()
    assert (stored["role"], stored["content"]) == ("assistant", told["response"])


async def test_a_stream(demo: httpx.AsyncClient) -> None:
    conversation = new_id()
    answer, events = await stream(demo, message="你好，我叫张三", conversation_id=conversation)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-session-id"] == conversation
    *contents, done = events
    assert len(contents) > 1
    assert all(set(each) == {"type", "content"} and each["type"] == "content" for each in contents)
    assert done.pop("type") == "done"
    assert done["response"] == "".join(each["content"] for each in contents)
    assert (done["conversation_id"], done["session_id"], done["message_count"]) == (conversation, conversation, 2)
    assert done["usage"]["output_tokens"] > 0
    assert "张三" in (await say(demo, "我叫什么名字？", conversation))["response"]


async def test_a_stream_that_breaks(make_relay: Callable[..., Process], upstream: TestUpstream, data_dir: Path) -> None:
    relay = make_relay(RELAY_RETRY_WAIT_SECONDS="0", RELAY_CHAT_MODEL="test-model")
    async with client_of(relay, data_dir) as http:
        upstream.script({"text": "word " * 40, "cut_after_events": 8})
        body = {"message": "Hello"}
        answer = await http.post("/api/chat/stream", json=body)
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        assert events[0]["type"] == "content"
        assert events[-1]["type"] == "error"
        assert events[-1]["error"]["type"] == "overloaded_error"
        httpx.post(f"{relay.url}/admin/accounts/anthropic/enable", headers=admin_headers(data_dir), trust_env=False)
        upstream.script({"status": 529})
        error_of(await http.post("/api/chat/stream", json=body), 529, "overloaded_error")


async def test_conversations_are_listed_and_deleted(demo: httpx.AsyncClient, sessions: httpx.AsyncClient) -> None:
    mine = new_id()
    await say(demo, "Hello", mine)
    listed = (await demo.get("/api/sessions", params={"page_size": 1})).json()
    assert listed["total"] >= 1
    assert listed["sessions"][0]["session_id"] == mine
    assert set(listed["sessions"][0]) == {"session_id", "created_at", "last_accessed", "message_count"}
    seen = await demo.get(f"/api/sessions/{mine}")
    assert seen.json() == listed["sessions"][0]
    gone = await demo.delete(f"/api/sessions/{mine}")
    assert gone.json() == {"message": "会话已删除", "session_id": mine}
    for call in (demo.get, demo.delete):
        error_of(await call(f"/api/sessions/{mine}"), 404, "not_found_error")
    stored = await sessions.get(f"/sessions/{mine}/messages", params={"user_id": "dev"})
    assert stored.json()["total"] == 2
    again = await say(demo, "What is my name?", mine)
    assert again["message_count"] == 2


async def test_an_expired_conversation_begins_anew(
    make_relay: Callable[..., Process], data_dir: Path, sessions: httpx.AsyncClient
) -> None:
    relay = make_relay(RELAY_SESSION_IDLE_SECONDS="1", RELAY_UPSTREAM_URL="", RELAY_UPSTREAM_API_KEY="")
    async with client_of(relay, data_dir) as http:
        mine = new_id()
        await say(http, "My name is Ada", mine)
        await asyncio.sleep(1.2)
        assert (await http.get(f"/api/sessions/{mine}")).status_code == 404
        assert "Ada" not in (await say(http, "What is my name?", mine))["response"]
        kept = await sessions.get(f"/sessions/{mine}/messages", params={"user_id": "dev", "include_superseded": True})
        assert kept.json()["total"] == 4


WRONG: list[dict[str, str]] = [
    {"x-api-key": "cr_wrong"},
    {"x-api-key": "\xff"},
    {"authorization": "Bearer cr_wrong"},
    {"authorization": "cr_wrong"},
    {"authorization": "Bearer"},
    {"authorization": "Basic YTpi"},
]
"""A key in a wrong form is a wrong one, not none."""


async def test_who_may_chat(demo: httpx.AsyncClient, demo_relay: Process, sessions: httpx.AsyncClient) -> None:
    """In development callers without a key are one user, 'anonymous'; a wrong key is refused all the same."""
    mine = new_id()
    async with httpx.AsyncClient(base_url=demo_relay.url, trust_env=False) as nobody:
        await say(nobody, "My name is Eve", mine)
        assert (await sessions.get(f"/sessions/{mine}", params={"user_id": "anonymous"})).status_code == 200
        assert (await demo.get(f"/api/sessions/{mine}")).status_code == 404
        for headers in WRONG:
            for content in (b'{"message": "Hello"}', b'{"message": 5}', b"{", b""):
                for path in ("/api/chat", "/api/chat/stream"):
                    wrong = await nobody.post(path, content=content, headers=latin(headers))
                    error_of(wrong, 401, "authentication_error")
            for path in ("/api/sessions", "/api/sessions?page=x", f"/api/sessions/{mine}"):
                error_of(await nobody.get(path, headers=latin(headers)), 401, "authentication_error")
        for blank in ({"x-api-key": ""}, {"authorization": ""}):
            assert (await nobody.get("/api/sessions", headers=blank)).status_code == 200
        error_of(await nobody.post("/v1/messages", json={}), 401, "authentication_error")


async def test_anonymous_chat_can_be_switched_off(make_relay: Callable[..., Process]) -> None:
    relay = make_relay(RELAY_ANONYMOUS_CHAT="false")
    async with httpx.AsyncClient(base_url=relay.url, trust_env=False) as nobody:
        for answer in (
            await nobody.post("/api/chat", json={"message": "Hello"}),
            await nobody.post("/api/chat/stream", content=b"{"),
            await nobody.post("/sessions/any/summarize", content=b"{"),
            await nobody.get("/api/sessions"),
        ):
            error_of(answer, 401, "authentication_error")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "message"),
        ({"message": ""}, "message"),
        ({"message": " \n"}, "message"),
        ({"message": 3}, "message"),
        ({"message": "x", "conversation_id": "a/b"}, "conversation_id"),
        ({"message": "x", "conversation_id": ""}, "conversation_id"),
        ({"message": "x", "conversation_id": 3}, "conversation_id"),
        ({"message": "x", "model": ""}, "model"),
        ({"message": "x", "system": 3}, "system"),
        ([], "body"),
    ],
)
async def test_bad_bodies(demo: httpx.AsyncClient, body: Any, field: str) -> None:
    for path in ("/api/chat", "/api/chat/stream"):
        assert field in error_of(await demo.post(path, json=body), 400, "invalid_request_error")


async def test_a_system_prompt_and_a_model(
    make_relay: Callable[..., Process], upstream: TestUpstream, data_dir: Path
) -> None:
    """They go upstream; the system prompt is no message of the conversation."""
    async with client_of(make_relay(**upstream_settings(upstream.url)), data_dir) as http:
        told = (
            await http.post("/api/chat", json={"message": "Hi", "system": "Be brief", "model": "test-model"})
        ).json()
        asked = upstream.requests()[-1]["json"]
        assert (asked["system"], asked["model"]) == ("Be brief", "test-model")
        assert asked["messages"] == [{"role": "user", "content": "Hi"}]
        assert (told["model"], told["message_count"]) == ("test-model", 2)


async def test_web_pages(demo: httpx.AsyncClient, make_relay: Callable[..., Process], data_dir: Path) -> None:
    """Pages of the allowed origins may call and read the session's id; others may not."""
    page = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    asked = await demo.options("/api/chat", headers=page)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "http://localhost:3000"
    answer = await demo.post("/api/chat", json={"message": "Hi"}, headers={"origin": page["origin"]})
    assert "X-Session-ID" in answer.headers["access-control-expose-headers"]
    foreign = await demo.post("/api/chat", json={"message": "Hi"}, headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in foreign.headers
    async with client_of(make_relay(RELAY_CORS_ORIGINS="https://app.example"), data_dir) as http:
        allowed = await http.get("/api/sessions", headers={"origin": "https://app.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        local = await http.get("/api/sessions", headers={"origin": "http://localhost:3000"})
        assert "access-control-allow-origin" not in local.headers


async def test_a_chat_and_the_claude_door_share_a_history(demo: httpx.AsyncClient) -> None:
    mine = new_id()
    await say(demo, "My name is Grace", mine)
    asked = {"model": "demo", "max_tokens": 100, "messages": [{"role": "user", "content": "What is my name?"}]}
    answer = await demo.post("/v1/messages", json={**asked, "metadata": {"session_id": mine}})
    assert "Grace" in answer.text
    assert (await say(demo, "Thanks", mine))["message_count"] == 6


async def test_an_idempotency_key(demo: httpx.AsyncClient) -> None:
    mine, headers = new_id(), {"idempotency-key": uuid.uuid4().hex}
    body = {"message": "Hello", "conversation_id": mine, "model": "demo"}
    first = await demo.post("/api/chat", json=body, headers=headers)
    again = await demo.post("/api/chat", json=body, headers=headers)
    assert again.headers["idempotent-replayed"] == "true"
    for name in ("response", "message_count", "session_id"):
        assert first.json()[name] == again.json()[name]
