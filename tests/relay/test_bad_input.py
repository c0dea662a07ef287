"""Requests that cannot be served: 400 naming the field, nothing stored, upstream not asked."""

import json
from typing import Any

import httpx
import pytest

from tests.processes import Process, log_of_one_who_leaves
from tests.relay.calls import Chat, error_of, user
from tests.upstream.client import TestUpstream

GOOD: dict[str, Any] = {"model": "test-model", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}]}
DEEP = "[" * 300 + "]" * 300

CASES: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": None}),
    ("model", {"model": ""}),
    ("model", {"model": 7}),
    ("stream", {"stream": "yes"}),
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "Hi"}),
    ("messages", {"messages": [{"role": "assistant", "content": "Hi"}]}),
    ("messages.0", {"messages": ["Hi"]}),
    ("messages.0.role", {"messages": [{"content": "Hi"}]}),
    ("messages.0.role", {"messages": [{"role": "tool", "content": "Hi"}]}),
    ("messages.0.role", {"messages": [{"role": ["user"], "content": "Hi"}]}),
    ("messages.0.content", {"messages": [{"role": "user"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": 7}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": " \n "}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": []}]}),
    ("messages.0.content.1", {"messages": [user([{"type": "text", "text": "a"}, "b"])]}),
    ("messages.0.content.0", {"messages": [user([{"text": "a"}])]}),
    ("messages.1.content", {"messages": [user("a"), user([{"type": "tool_result", "content": "x"}])]}),
    ("messages", {"messages": [user("a"), {"role": "assistant", "content": "b"}] * 5000 + [user("a")]}),
    ("messages", {"messages": [user("a")] * 100_001}),
    ("metadata.session_id", {"metadata": {"session_id": 7}}),
    ("metadata.session_id", {"metadata": {"session_id": ""}}),
    ("metadata.session_id", {"metadata": {"session_id": "a/b"}}),
    ("metadata.session_id", {"metadata": {"session_id": "stats"}}),
    ("metadata.session_id", {"metadata": {"session_id": "x" * 256}}),
    ("metadata.session_id", {"metadata": {"session_id": "a\nb"}}),
]


@pytest.mark.parametrize(("field", "wrong"), CASES)
async def test_the_field_is_named(chat: Chat, upstream: TestUpstream, field: str, wrong: dict[str, Any]) -> None:
    body = GOOD | {"metadata": {"session_id": chat.session_id}} | wrong
    message = error_of(await chat.http.post("/v1/messages", json=body), 400, "invalid_request_error")
    assert message.startswith(f"{field}: "), message
    assert await chat.stored() == []
    assert upstream.requests() == []


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_a_query_over_the_limit(chat: Chat, upstream: TestUpstream, path: str) -> None:
    body = GOOD | {"metadata": {"session_id": chat.session_id}}
    assert (await chat.http.post(f"{path}?{'x' * 64_000}", json=body)).status_code == 200
    assert [len(entry["query"]) for entry in upstream.requests()] == [64_000]
    stored = await chat.stored()
    message = error_of(await chat.http.post(f"{path}?{'x' * 64_001}", json=body), 400, "invalid_request_error")
    assert message.startswith("query: ")
    assert await chat.stored() == stored
    assert len(upstream.requests()) == 1


async def test_a_session_id_is_one_that_utf8_can_hold(chat: Chat, upstream: TestUpstream) -> None:
    content = json.dumps(GOOD | {"metadata": {"session_id": "a\ud800"}})
    answer = await chat.http.post("/v1/messages", content=content.encode())
    assert error_of(answer, 400, "invalid_request_error").startswith("metadata.session_id: ")
    assert upstream.requests() == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        json.dumps(GOOD).encode("utf-16"),
        json.dumps(GOOD).encode().replace(b"Hi", b"\xff"),
        json.dumps(GOOD).encode().replace(b"10", b"NaN"),
        json.dumps(GOOD).encode().replace(b"10", b"Infinity"),
        json.dumps(GOOD).encode().replace(b'"Hi"', b'"Hi\\ud800"').replace(b"10", b"NaN"),
        json.dumps(GOOD).encode().replace(b'"Hi"', b'"Hi", "x": ' + DEEP.encode()),
        json.dumps(GOOD).encode().replace(b'"Hi"', b'"Hi\\ud800", "x": ' + DEEP.encode()),
        json.dumps(GOOD).encode() + b"x",
    ],
)
async def test_what_is_no_json_object(chat: Chat, upstream: TestUpstream, content: bytes) -> None:
    headers = {"content-type": "application/json", "x-session-id": chat.session_id}
    answer = await chat.http.post("/v1/messages", content=content, headers=headers)
    assert error_of(answer, 400, "invalid_request_error").startswith("body: ")
    assert await chat.stored() == []
    assert upstream.requests() == []


async def test_a_number_out_of_range(chat: Chat) -> None:
    content = json.dumps(GOOD).replace("10", '10, "temperature": 1e999').encode()
    answer = await chat.http.post("/v1/messages", content=content)
    assert error_of(answer, 400, "invalid_request_error") == "temperature: number out of range"


async def test_a_session_id_header_by_the_rules(chat: Chat) -> None:
    answer = await chat.http.post("/v1/messages", json=GOOD, headers={"x-session-id": "a/b"})
    assert error_of(answer, 400, "invalid_request_error").startswith("X-Session-Id: ")


async def test_a_body_over_the_limit(chat: Chat, chat_at: Any, make_relay: Any) -> None:
    small: Chat = await chat_at(make_relay(RELAY_MAX_BODY_BYTES="2000"))
    for length in (3000, 20_000_000):  # whoever still sends hears of it too
        error_of(await small.ask("x" * length), 413, "request_too_large")
    assert await small.stored() == []


async def test_a_client_that_leaves_in_the_middle_of_its_body(chat: Chat, relay: Process) -> None:
    """Nothing is wrong with the relay then, and its log says nothing else."""
    head = f"POST /v1/messages HTTP/1.1\r\nhost: relay\r\nx-api-key: {chat.http.headers['x-api-key']}\r\n"
    await log_of_one_who_leaves(relay, head)


async def test_nulls_where_nothing_is_wished_for(chat: Chat, upstream: TestUpstream) -> None:
    body = GOOD | {"stream": None, "max_tokens": None, "metadata": None}
    assert (await chat.http.post("/v1/messages", json=body)).status_code == 200
    assert upstream.requests()[0]["json"] == body | {"max_tokens": 4096}


async def test_unknown_paths_and_methods(chat: Chat) -> None:
    error_of(await chat.http.get("/nothing/here"), 404, "not_found_error")
    error_of(await chat.http.get("/v1/messages"), 405, "invalid_request_error")
    error_of(await chat.http.get("/sessions/unknown"), 404, "not_found_error")
    error_of(await chat.http.post("/sessions/unknown/close"), 404, "not_found_error")
    error_of(await chat.http.get("/sessions/stats"), 400, "invalid_request_error")
    allowed = {
        "/api/v1/messages": "POST",
        "/api/sessions/x": "DELETE, GET",
        "/admin/accounts/x": "DELETE, GET, PATCH",
        "/admin/api-keys": "GET, POST",
        "/api/conversations/x": "DELETE, GET, PATCH",
        "/api/v1/app-conversations": "GET, POST",
    }
    for path, methods in allowed.items():
        answer = await chat.http.put(path, json={})
        assert (answer.status_code, answer.headers.get_list("allow")) == (405, [methods]), path


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/models", "/sessions/x"])
async def test_a_key_is_needed(chat: Chat, path: str) -> None:
    method = "POST" if "messages" in path else "GET"
    key = chat.http.headers["x-api-key"]
    wrong: list[list[tuple[bytes, bytes]]] = [
        [],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"cr_" + b"0" * 64)],
        [(b"authorization", b"Bearer \xc3\xa9\xff")],
        [(b"authorization", b"Basic " + key.encode())],
    ]
    for headers in wrong:
        request = chat.http.build_request(method, path, content=b"not even JSON")
        del request.headers["x-api-key"]
        request.headers = httpx.Headers([*request.headers.raw, *headers])
        error_of(await chat.http.send(request), 401, "authentication_error")
    request = chat.http.build_request(method, path, json=GOOD, headers={"authorization": f"bearer {key}"})
    del request.headers["x-api-key"]
    assert (await chat.http.send(request)).status_code in {200, 404}
