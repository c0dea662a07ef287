"""Who may do what with a conversation: keys of users, keys of conversations, and ids that none can have."""

import socket
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from tests.processes import Process
from tests.relay.conftest import MakeUser
from tests.relay.conversing import Conversation, User, fine, refused, say

RUNTIME = [
    ("POST", "/api/conversations/{id}/pause", {}),
    ("POST", "/api/conversations/{id}/run", {}),
    ("POST", "/api/conversations/{id}/events/respond_to_confirmation", {"accept": True}),
    ("GET", "/api/vscode/url", None),
]
USERS = [
    ("POST", "/api/v1/app-conversations", {}),
    ("POST", "/api/v1/app-conversations/stream-start", {}),
    ("GET", "/api/v1/app-conversations?ids={id}", None),
    ("GET", "/api/v1/app-conversations/search", None),
    ("GET", "/api/v1/app-conversations/count", None),
    ("GET", "/api/v1/app-conversations/start-tasks?ids={id}", None),
    ("GET", "/api/v1/app-conversations/start-tasks/search", None),
    ("GET", "/api/v1/app-conversations/start-tasks/count", None),
    ("GET", "/api/v1/sandboxes?id={id}", None),
    ("POST", "/api/v1/sandboxes/{id}/pause", {}),
    ("POST", "/api/v1/sandboxes/{id}/resume", {}),
    ("GET", "/api/v1/events/count?conversation_id__eq={id}", None),
    ("POST", "/api/conversations", {}),
    ("GET", "/api/conversations", None),
    ("GET", "/api/conversations/{id}", None),
    ("PATCH", "/api/conversations/{id}", {"title": "x"}),
    ("DELETE", "/api/conversations/{id}", None),
    ("POST", "/api/conversations/{id}/start", {}),
    ("POST", "/api/conversations/{id}/stop", None),
]
EITHER = [
    ("GET", "/api/conversations/{id}/config", None),
    ("GET", "/api/conversations/{id}/trajectory", None),
    ("GET", "/api/conversations/{id}/events", None),
    ("POST", "/api/conversations/{id}/events", say("x", run=False)),
    ("POST", "/api/conversations/{id}/message", {"message": "x"}),
    ("GET", "/api/conversations/{id}/vscode-url", None),
    ("GET", "/api/conversations/{id}/web-hosts", None),
    ("GET", "/api/conversations/{id}/microagents", None),
    ("POST", "/api/conversations/{id}/submit-feedback", {"a": 1}),
]


async def call(base: Any, method: str, path: str, body: Any, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=30) as client:
        return await client.request(method, path, json=body, headers=headers)


@pytest.mark.parametrize(("method", "path", "body"), RUNTIME)
async def test_runtime_calls_take_the_conversations_own_key_only(
    caller: User, method: str, path: str, body: Any
) -> None:
    mine, other = await caller.conversation(), await caller.conversation()
    base, url = caller.http.base_url, path.format(id=mine.id)
    login = caller.http.headers["x-api-key"]
    for headers in ({}, {"x-session-api-key": ""}, {"x-session-api-key": "wrong"}, {"x-api-key": login}):
        refused(await call(base, method, url, body, **headers), 401)
        refused(await call(base, method, url, [], **headers), 401)
    if "{id}" in path:
        refused(await call(base, method, url, body, **other.headers), 401)
        unknown = path.format(id="0" * 32)
        refused(await call(base, method, unknown, body, **mine.headers), 404)
    assert (await call(base, method, url, body, **mine.headers)).status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), USERS)
async def test_user_calls_take_a_users_key(caller: User, method: str, path: str, body: Any) -> None:
    base, url = caller.http.base_url, path.format(id="0" * 32)
    refused(await call(base, method, url, body, **{"x-api-key": "cr_wrong"}), 401)
    refused(await call(base, method, url, body, authorization="Bearer cr_wrong"), 401)
    refused(await call(base, method, url, body, authorization="Basic abc"), 401)


@pytest.mark.parametrize(("method", "path", "body"), EITHER)
async def test_calls_that_take_either_key(caller: User, make_user: MakeUser, method: str, path: str, body: Any) -> None:
    mine, other = await caller.conversation(), await caller.conversation()
    base, url = caller.http.base_url, path.format(id=mine.id)
    for headers in ({"x-session-api-key": ""}, {"x-session-api-key": "wrong"}, other.headers, {"x-api-key": "wrong"}):
        refused(await call(base, method, url, body, **headers), 401)
    stranger = await make_user()
    refused(await call(base, method, url, body, **{"x-api-key": stranger.http.headers["x-api-key"]}), 404)
    fine(await call(base, method, url, body, **mine.headers))
    fine(await call(base, method, url, body, **{"x-api-key": caller.http.headers["x-api-key"]}))


async def test_a_stranger_sees_nothing(caller: User, make_user: MakeUser) -> None:
    mine, stranger = await caller.conversation(title="Secret"), await make_user()
    app = await mine.app()
    get = stranger.http.get
    assert fine(await get("/api/v1/app-conversations", params={"ids": mine.id})) == [None]
    assert fine(await get("/api/v1/app-conversations/search"))["items"] == []
    assert fine(await get("/api/v1/app-conversations/count")) == 0
    assert fine(await get("/api/v1/sandboxes", params={"id": app["sandbox_id"]})) == [None]
    assert fine(await get("/api/conversations"))["results"] == []
    assert fine(await get(mine.path)) is None
    assert fine(await stranger.http.delete(mine.path)) is False
    refused(await stranger.http.patch(mine.path, json={"title": "x"}), 404)
    for action in ("start", "stop"):
        refused(await stranger.http.post(f"{mine.path}/{action}", json={}), 404)
    refused(await stranger.http.post(f"/api/v1/sandboxes/{app['sandbox_id']}/pause", json={}), 404)
    refused(await stranger.http.post("/api/v1/app-conversations", json={"parent_conversation_id": mine.id}), 404)
    refused(await get("/api/v1/events/count", params={"conversation_id__eq": mine.id}), 404)
    assert (await mine.app())["title"] == "Secret"


async def test_a_key_without_the_permission(make_user: MakeUser) -> None:
    user = await make_user(permissions=["messages", "chat"])
    refused(await user.http.post("/api/v1/app-conversations", json={}), 403)
    refused(await user.http.get("/api/conversations"), 403)


async def test_anonymous_users_in_development(relay: Process) -> None:
    async with httpx.AsyncClient(base_url=relay.url, trust_env=False) as nobody:
        task = fine(await nobody.post("/api/v1/app-conversations", json={"llm_model": "demo"}))
        assert task["created_by_user_id"] == "anonymous"


async def test_runtime_keys_are_stored_nowhere(caller: User, database_url: str) -> None:
    mine = await caller.conversation()
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch("SELECT c::text FROM dev.relay_conversations c WHERE id = $1", mine.id)
        tasks = await connection.fetch("SELECT t::text FROM dev.relay_start_tasks t")
    finally:
        await connection.close()
    stored = "".join(row[0] for row in [*rows, *tasks])
    assert mine.id in stored
    assert mine.secret not in stored
    assert mine.secret.encode().hex() not in stored


# ── ids ─────────────────────────────────────────────────────────────────────────────────────────


def raw_status(base: Any, method: str, target: str) -> tuple[int, bytes]:
    """Status and body of a request whose target is sent exactly so."""
    address = urlsplit(str(base))
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        head = f"{method} {target} HTTP/1.1\r\nhost: relay\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        connection.sendall(head.encode("latin-1"))
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head_bytes, _, body = answer.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), body


@pytest.mark.parametrize("below", ["", "/config", "/events", "/pause"])
@pytest.mark.parametrize(
    ("sent", "detail"),
    [
        ("a" * 101, "Conversation ID is too long"),
        ("%00" + "a" * 101, "Conversation ID is too long"),
        ("a%00b", "Conversation ID contains invalid characters"),
        ("..%00", "Conversation ID contains invalid characters"),
        ("..", "Conversation ID contains invalid path characters"),
        ("a..b", "Conversation ID contains invalid path characters"),
        ("%2e%2e", "Conversation ID contains invalid path characters"),
        ("a%2Fb", "Conversation ID contains invalid path characters"),
        ("a\\b", "Conversation ID contains invalid path characters"),
        ("a%5cb%0a", "Conversation ID contains invalid path characters"),
        ("a%0ab", "Conversation ID contains control characters"),
        ("a%7f", "Conversation ID contains control characters"),
        ("a%1f", "Conversation ID contains control characters"),
    ],
)
def test_ids_that_no_conversation_can_have(relay: Process, sent: str, detail: str, below: str) -> None:
    method = "POST" if below == "/pause" else "GET"
    status, body = raw_status(relay.url, method, f"/api/conversations/{sent}{below}")
    assert status == 400
    assert f'"detail":"{detail}"'.encode() in body
    assert f'"message":"{detail}"'.encode() in body


@pytest.mark.parametrize("sent", ["a" * 100, "none", "%25", "0" * 32, "00000000-0000-0000-0000-000000000000", "é"])
async def test_other_ids_are_just_unknown(caller: User, sent: str) -> None:
    assert fine(await caller.http.get(f"/api/conversations/{sent}")) is None
    assert fine(await caller.http.delete(f"/api/conversations/{sent}")) is False
    refused(await caller.http.patch(f"/api/conversations/{sent}", json={"title": "x"}), 404)
    refused(await caller.http.get(f"/api/conversations/{sent}/config"), 404)


async def test_both_forms_of_an_id(caller: User) -> None:
    mine = await caller.conversation()
    hyphenated = mine.session_id
    for form in (mine.id, hyphenated, mine.id.upper(), hyphenated.upper()):
        assert (await caller.app(form))["id"] == mine.id
        assert fine(await caller.http.get(f"/api/conversations/{form}"))["conversation_id"] == mine.id
        fine(await Conversation(caller, form, mine.secret).call("pause"))


async def test_sockets_refuse_by_their_close_code(caller: User) -> None:
    mine, other = await caller.conversation(), await caller.conversation()
    for conversation, secret, code in (
        (mine, "wrong", 4001),
        (mine, "", 4001),
        (mine, other.secret, 4001),
        (Conversation(caller, "0" * 32, ""), mine.secret, 4004),
        (Conversation(caller, "nonsense", ""), "wrong", 4004),
    ):
        with pytest.raises(ConnectionClosed) as closed:
            async with conversation.socket(session_api_key=secret) as refusing:
                await refusing.next()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == code


async def test_pages_may_send_the_runtime_key(relay: Process) -> None:
    async with httpx.AsyncClient(base_url=relay.url, trust_env=False) as client:
        headers = {
            "origin": "http://localhost:3001",
            "access-control-request-method": "POST",
            "access-control-request-headers": "x-session-api-key",
        }
        for path in ("/api/conversations/x/run", "/api/conversations/a%2Fb/run", "/api/file/upload/%2Fworkspace%2Fa"):
            answer = await client.options(path, headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] in {"*", headers["origin"]}
            assert "x-session-api-key" in answer.headers["access-control-allow-headers"].lower()


@pytest.mark.parametrize(
    ("method", "path", "status", "size_bytes"),
    [
        ("GET", "/api/conversations/a%2Fb", 400, 0),
        ("POST", "/api/conversations/x/run", 401, 0),
        ("PUT", "/api/conversations", 405, 0),
        ("POST", "/api/conversations", 413, 33 * 2**20),
        ("GET", "/api/v1/app-conversations?ids=x", 422, 0),
    ],
)
async def test_pages_read_what_was_refused(
    relay: Process, method: str, path: str, status: int, size_bytes: int
) -> None:
    async with httpx.AsyncClient(base_url=relay.url, trust_env=False) as client:
        headers = {"origin": "http://localhost:3001"}
        answer = await client.request(method, path, headers=headers, content=b" " * size_bytes)
        refused(answer, status)
        assert answer.headers["access-control-allow-origin"] in {"*", "http://localhost:3001"}
