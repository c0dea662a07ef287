"""The calls that are served past FastAPI's layers answer as the routes would, which serve them when there is a key."""

import json
import uuid
from typing import Any

import httpx
import pytest

from tests.processes import ServiceProcess, log_of_one_who_leaves
from tests.session_service.calls import Chat, Turn, User, fine, said

CALLS = ["/messages", "/align", "/turns", "/turns/{turn_id}/complete", "/turns/a%20turn/complete"]
BODIES: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b'{"role": "user"',
    b'\xef\xbb\xbf{"role": "user", "content": "x"}',
    b'{"role": "user", "content": "\xff"}',
    b'{"role": "user", "content": "\\u0000"}',
    b'{"role": "someone", "content": 5, "tokens_used": true}',
    b'{"role": "user", "content": "x", "cost_usd": NaN}',
    b'{"hashes": ["no hash"]}',
    b'{"messages": [{"role": "user", "content": "  "}]}',
    b'{"messages": [], "create_session": {"user_id": "another"}}',
    b'{"messages": [], "lease_seconds": 1, "rewind_to_seq": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "rewind_to_seq": 50}',
    b'{"messages": [{"role": "user", "content": "x"}], "context": {"max_tokens": 1}}',
    b'{"lease_token": "wrong", "status": "completed"}',
    b'{"lease_token": "wrong", "status": "open"}',
]


async def both(user: User, method: str, path: str, **options: Any) -> tuple[httpx.Response, httpx.Response]:
    """The answers without a key and with one."""
    headers = options.pop("headers", {})
    plain = await user.http.request(method, path, headers=headers, **options)
    keyed = await user.http.request(method, path, headers=headers | {"Idempotency-Key": str(uuid.uuid4())}, **options)
    return plain, keyed


def same(plain: httpx.Response, keyed: httpx.Response) -> None:
    assert plain.status_code == keyed.status_code, (plain.text, keyed.text)
    assert plain.content == keyed.content
    own = {"x-request-id", "date"}
    assert [name for name in plain.headers if name not in own] == [name for name in keyed.headers if name not in own]


@pytest.fixture
async def turn(user: User) -> Turn:
    chat = await user.chat()
    await chat.append("before")
    return await Chat(user, chat.id).open(said("x"))


@pytest.mark.parametrize("path", CALLS)
async def test_what_is_wrong_with_a_body(user: User, turn: Turn, path: str) -> None:
    place = f"/sessions/{turn.chat.id}{path.format(turn_id=turn.id)}"
    before = await turn.chat.get()
    for body in BODIES:
        plain, keyed = await both(user, "POST", place, params=user.params, content=body)
        same(plain, keyed)
        assert plain.status_code in {400, 404, 409} or path == "/align"  # which writes nothing
    assert await turn.chat.get() == before


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize(
    "change",
    [
        {"params": {}},
        {"params": {"user_id": ""}},
        {"params": {"user_id": " a"}},
        {"params": {"user_id": "a/b"}},
        {"params": [("user_id", "one"), ("user_id", "nobody")]},
        {"session_id": "nobodys"},
        {"session_id": "x" * 256},
        {"session_id": "%20x"},
        {"session_id": "stats"},
        {"session_id": ".."},
        {"method": "PATCH"},
        {"method": "DELETE"},
        {"after": "/"},
    ],
)
async def test_what_is_wrong_with_the_address(user: User, turn: Turn, path: str, change: dict[str, Any]) -> None:
    session_id = change.get("session_id", turn.chat.id)
    place = f"/sessions/{session_id}{path.format(turn_id=turn.id)}{change.get('after', '')}"
    body = {"role": "user", "content": "x", "hashes": [], "lease_token": turn.token, "status": "completed"}
    params = change.get("params", user.params)
    plain, keyed = await both(user, change.get("method", "POST"), place, params=params, json=body)
    same(plain, keyed)
    assert plain.status_code in {307, 400, 404, 405}
    assert (await turn.get())["status"] == "open"


@pytest.mark.parametrize("sent", ["x", '"1', "1.0", '"99"', "99"])
async def test_an_if_match_that_does_not_match(user: User, sent: str) -> None:
    chat = await user.chat()
    body = {"messages": [said("x")]}
    place = f"/sessions/{chat.id}/turns"
    same(*await both(user, "POST", place, params=user.params, json=body, headers={"If-Match": sent}))
    assert (await chat.get())["version"] == 1


async def test_requests_are_counted_under_their_routes(user: User) -> None:
    chat = Chat(user, f"routes-{uuid.uuid4().hex}")
    turn = await chat.open(said("x"), create_session={})
    await turn.complete(said("y", "assistant"))
    await chat.append("z")
    fine(await chat.call("POST", "/align", json={"hashes": []}))
    base = str(user.http.base_url).removesuffix("/api/v1/")
    metrics = (await user.http.get(f"{base}/metrics")).text
    for path in ("/messages", "/align", "/turns", "/turns/{turn_id}/complete"):
        assert f'route="/api/v1/sessions/{{session_id}}{path}"' in metrics


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "page=1&page_size=2",
        "page=2&page_size=2",
        "page=999&page_size=999",
        "after_seq=2&limit=1",
        "before_seq=3&limit=999",
        "after_seq=1&before_seq=3",
        "page=0",
        "page=1000",
        "page_size=1001",
        "page_size=01",
        "page_size=%EF%BC%91",
        "limit=x",
        "limit=",
        "page=1&page=2",
        "order=desc",
        "order=odd",
        "role=user",
        "unknown=1",
        "user_id=nobody",
    ],
)
async def test_reading_messages_is_the_routes_reading(user: User, asked: str) -> None:
    chat = await user.chat()
    for number in range(5):
        await chat.append(f"text {number}")
    path = f"/sessions/{chat.id}/messages?user_id={user.id}&{asked}"
    plain, keyed = await both(user, "GET", path)
    same(plain, keyed)
    assert plain.status_code in {200, 400, 404}


async def test_a_client_that_leaves_in_the_middle_of_its_body(user: User, session_service: ServiceProcess) -> None:
    """It is noted as such at its route, and as no fault."""
    chat = await user.chat()
    target = f"/api/v1/sessions/{chat.id}/messages?user_id={user.id}"
    logged = await log_of_one_who_leaves(session_service, f"POST {target} HTTP/1.1\r\nhost: store\r\n")
    told = [json.loads(line) for line in logged.splitlines() if '"status": 499' in line]
    assert [each["route"] for each in told] == ["/api/v1/sessions/{session_id}/messages"]
