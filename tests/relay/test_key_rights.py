"""What a key lets its caller do, whose sessions it works on, and what of it never shows."""

import base64
import hashlib
import hmac
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.processes import Process
from tests.relay.calls import Json, error_of, events_of
from tests.relay.key_calls import NO_SESSION, PATH, Admin, Caller, body, fine, latin, open_db, open_http
from tests.session_service.calls import Db
from tests.upstream.client import TestUpstream


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def bare(relay: Process) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shared relay without credentials."""
    async with open_http(relay) as http:
        yield http


@pytest.fixture
def admin(bare: httpx.AsyncClient, data_dir: Path, upstream: TestUpstream) -> Admin:
    return Admin.of(bare, data_dir)


@pytest_asyncio.fixture(loop_scope="session")
async def db(database_url: str) -> AsyncIterator[Db]:
    async with open_db(database_url) as db:
        yield db


# ── what a key may do ───────────────────────────────────────────────────────────────────────────


def doors(key: str, headers: dict[str, str] | None = None) -> list[tuple[str, str, dict[str, str], Json | None]]:
    """Calls that need a key: method, path, headers with this key, body."""
    sent = {"x-api-key": key, **(headers or {})}
    prefixes = ("", "/api", "/claude-kiro-oauth", "/api/v1/claude-kiro-oauth")
    return [
        *(("POST", f"{prefix}/v1/messages", sent, body()) for prefix in prefixes),
        *(("POST", f"{prefix}/v1/messages/count_tokens", sent, body()) for prefix in prefixes),
        ("GET", "/v1/models", sent, None),
        ("GET", "/v1/models/test-model", sent, None),
    ]


async def refused(http: httpx.AsyncClient, key: str, headers: dict[str, str], status: int, kind: str) -> set[str]:
    """What is said to this key at every door, and that it is refused there."""
    messages = set()
    for method, path, sent, content in doors(key, headers):
        answer = await http.request(method, path, headers=sent, json=content)
        messages.add(error_of(answer, status, kind))
    return messages


async def test_keys_that_are_none(admin: Admin, bare: httpx.AsyncClient, upstream: TestUpstream) -> None:
    """401 in the same words for a missing, unknown, revoked, deleted or expired key; upstream hears of none."""
    revoked, deleted = await admin.make(isActive=False), await admin.make()
    expired = await admin.make(expiresAt="2020-01-01T00:00:00Z")
    fine(await admin.call("DELETE", f"/{deleted.id}"))
    messages = set()
    for secret in (revoked.secret, deleted.secret, expired.secret, "", "cr_" + "0" * 64, "cr_", revoked.id, "é" * 9):
        raw = latin({**NO_SESSION, "x-api-key": secret})
        for method, path, _, content in doors(""):
            answer = await bare.request(method, path, headers=raw, json=content)
            messages.add(error_of(answer, 401, "authentication_error"))
    for method, path in (("GET", "/sessions/s"), ("POST", "/sessions/s/close"), ("GET", "/v1/turns/t")):
        answer = await bare.request(method, path, headers={"x-api-key": revoked.secret})
        messages.add(error_of(answer, 401, "authentication_error"))
    assert len(messages) == 1
    # Before anything else is looked at.
    answer = await bare.post(PATH, content=b"{", headers={"x-api-key": revoked.secret})
    error_of(answer, 401, "authentication_error")
    assert upstream.requests() == []


async def test_where_a_key_may_stand(admin: Admin, bare: httpx.AsyncClient) -> None:
    key, other = await admin.make(), await admin.make(isActive=False)
    for headers in (
        {"x-api-key": key.secret},
        {"authorization": f"Bearer {key.secret}"},
        {"authorization": f"bearer  {key.secret}"},
        {"x-api-key": "", "authorization": f"Bearer {key.secret}"},
        {"x-api-key": key.secret, "authorization": f"Bearer {other.secret}"},
    ):
        assert (await bare.post(PATH, json=body(), headers={**NO_SESSION, **headers})).status_code == 200
    for headers in (
        {"authorization": f"Basic {key.secret}"},
        {"authorization": key.secret},
        {"x-api-key": f"Bearer {key.secret}"},
        {"x-api-key": key.secret.upper()},
        {"x-api-key": other.secret, "authorization": f"Bearer {key.secret}"},
    ):
        answer = await bare.post(PATH, json=body(), headers={**NO_SESSION, **headers})
        error_of(answer, 401, "authentication_error")


async def test_a_key_expires_by_the_clock(admin: Admin, db: Db) -> None:
    """Also one that is at hand: nothing tells the relay of that moment."""
    soon = await db.fetchval("SELECT to_char(now() AT TIME ZONE 'UTC' + '2 s', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
    key = await admin.make(expiresAt=soon)
    assert (await key.ask()).status_code == 200
    statuses = []
    while await db.fetchval("SELECT now() < $1::text::timestamptz + interval '0.2 s'", soon):
        statuses.append((await key.ask()).status_code)
    error_of(await key.ask(), 401, "authentication_error")
    assert statuses == sorted(statuses)
    await admin.change(key.id, expiresAt=None)
    assert (await key.ask()).status_code == 200


async def test_permissions(admin: Admin, bare: httpx.AsyncClient, upstream: TestUpstream) -> None:
    """A door that the key has no permission for is 403, on each of its paths, and upstream is not asked."""
    key = await admin.make(permissions=["chat", "conversations"])
    words = "The API key has no permission for messages"
    assert await refused(bare, key.secret, {}, 403, "permission_error") == {words}
    await admin.change(key.id, permissions=[])
    assert await refused(bare, key.secret, {}, 403, "permission_error") == {words}
    assert upstream.requests("/v1/messages") == []
    for permissions in (["messages"], "all", None):
        await admin.change(key.id, permissions=permissions)
        assert (await key.ask()).status_code == 200


async def test_the_chat_has_a_permission_of_its_own(admin: Admin, bare: httpx.AsyncClient) -> None:
    key = await admin.make(permissions=["messages", "conversations"])
    for path in ("/api/chat", "/api/chat/stream"):
        answer = await bare.post(path, json={"message": "Hello"}, headers={"x-api-key": key.secret})
        assert error_of(answer, 403, "permission_error") == "The API key has no permission for chat"
        await admin.change(key.id, permissions=["chat"])
        answer = await bare.post(path, json={"message": "Hello"}, headers={"x-api-key": key.secret})
        assert answer.status_code == 200
        await admin.change(key.id, permissions=["messages", "conversations"])


async def test_a_chat_that_names_no_model_asks_one_that_the_key_may_ask(
    admin: Admin, bare: httpx.AsyncClient, upstream: TestUpstream
) -> None:
    """Whichever is the usual one; a model that is named and not allowed is refused all the same."""
    key = await admin.make(allowedModels=["test-model-9"])
    for path in ("/api/chat", "/api/chat/stream"):
        answer = await bare.post(path, json={"message": "Hello"}, headers={"x-api-key": key.secret})
        assert answer.status_code == 200, answer.text
        assert upstream.requests(PATH)[-1]["json"]["model"] == "test-model-9"
        answer = await bare.post(path, json={"message": "Hello", "model": "other"}, headers={"x-api-key": key.secret})
        error_of(answer, 403, "permission_error")


async def test_allowed_models(
    admin: Admin, bare: httpx.AsyncClient, upstream: TestUpstream, sessions: httpx.AsyncClient
) -> None:
    """Only those named are served, counted and listed; nothing is stored of a request for another."""
    key = await admin.make(allowedModels=["test-model", "claude-haiku-4-5"])
    session = f"s-{uuid.uuid4().hex[:8]}"
    for path in (PATH, f"{PATH}/count_tokens"):
        for model in ("claude-sonnet-4-5", "test-model-2", "Test-Model", "demo"):
            answer = await key.ask(path=path, session=session, model=model)
            assert error_of(answer, 403, "permission_error") == "model: the API key may not ask this one"
            assert "x-turn-id" not in answer.headers
    assert upstream.requests() == []
    stored = await sessions.get(f"/sessions/{session}", params={"user_id": key.id})
    assert stored.status_code == 404
    for model in ("test-model", "claude-haiku-4-5"):
        assert (await key.ask(session=session, model=model)).status_code == 200
        assert (await key.ask(path=f"{PATH}/count_tokens", model=model)).status_code == 200
    models = fine(await bare.get("/v1/models", headers=key.headers()))["data"]
    assert {each["id"] for each in models} == {"test-model", "claude-haiku-4-5"}
    await admin.change(key.id, allowedModels=[])
    assert (await key.ask(model="claude-sonnet-4-5")).status_code == 200


# ── whose sessions ──────────────────────────────────────────────────────────────────────────────


async def said(key: Caller, session: str) -> list[str]:
    """What the key's next question in the session shows upstream."""
    answer = await key.ask("What is my name?", session=session, model="demo")
    assert answer.status_code == 200, answer.text
    return [block["text"] for block in answer.json()["content"]]


async def test_keys_of_one_user_share_its_sessions_and_others_do_not(
    admin: Admin, sessions: httpx.AsyncClient, user_id: str
) -> None:
    """Without a user said, a key is a user of its own, under its id."""
    one, two = await admin.make(userId=user_id), await admin.make(userId=user_id)
    alone, stranger = await admin.make(), await admin.make(userId=f"{user_id}-other")
    session = f"s-{uuid.uuid4().hex[:8]}"
    first = await one.ask("My name is Ada", session=session, model="demo")
    assert first.status_code == 200
    assert "Ada" in (await said(two, session))[0]
    for key in (alone, stranger):
        assert "Ada" not in (await said(key, session))[0]
    for owner, messages in ((user_id, 4), (alone.id, 2), (f"{user_id}-other", 2)):
        stored = fine(await sessions.get(f"/sessions/{session}", params={"user_id": owner}))
        assert stored["message_count"] == messages
    for key, messages in ((one, 4), (two, 4), (alone, 2)):
        seen = fine(await key.http.get(f"/sessions/{session}", headers={"x-api-key": key.secret}))
        assert seen["message_count"] == messages
    turn = first.headers["x-turn-id"]
    assert (await two.http.get(f"/v1/turns/{turn}", headers=two.headers())).status_code == 200
    error_of(await alone.http.get(f"/v1/turns/{turn}", headers=alone.headers()), 404, "not_found_error")
    # The user of a key can change; what was said stays where it was said.
    await admin.change(alone.id, userId=user_id)
    assert "Ada" in (await said(alone, session))[0]
    assert (await admin.change(alone.id, userId=None))["userId"] == alone.id
    assert "Ada" not in (await said(alone, session))[0]


# ── what never shows ────────────────────────────────────────────────────────────────────────────


async def test_neither_the_key_nor_its_hash_shows_anywhere(
    admin: Admin, db: Db, relay: Process, session_service: Process, upstream: TestUpstream, data_dir: Path
) -> None:
    """Not in answers, logs or errors, not upstream, not in the database, where there is a keyed hash in one column."""
    key = await admin.make(tokenLimit=1, allowedModels=["test-model"])
    pepper = (data_dir / "key.pepper").read_text().strip()
    keyed = hmac.digest(pepper.encode(), key.secret.encode(), hashlib.sha256)
    plain = hashlib.sha256(key.secret.encode()).digest()
    session = f"s-{uuid.uuid4().hex[:8]}"
    unknown = Caller(key.http, "", key.secret[:-1] + ("0" if key.secret[-1] != "0" else "1"))
    answers = [
        await key.ask(session=session),
        await key.ask(session=session),
        await key.ask(model="other"),
        await key.ask(session="a/b"),
        await unknown.ask(),
        await admin.call("GET", f"/{key.id}"),
        await admin.call("GET", params={"search": key.secret}),
        await admin.call("GET", params={"search": unknown.secret}),
        await admin.call("GET", params={"page": key.secret}),
        await admin.call("GET", f"/{key.secret}"),
        await admin.call("PATCH", f"/{key.id}", json={"name": "n", "tags": ["t"], "isActive": key.secret}),
        await admin.call("PATCH", f"/{key.id}", json={"name": "renamed"}),
        await admin.call("PATCH", f"/{key.id}/collect-session", json={"collectSession": key.secret}),
        await admin.call("POST", json={"name": 5, "apiKey": key.secret}),
        await admin.call("DELETE", f"/{key.id}"),
        await key.ask(),
        await admin.call("POST", f"/{key.id}/restore"),
        await key.http.get(f"/v1/turns/{key.secret}", headers=key.headers()),
    ]
    assert [each.status_code for each in answers] == [200, 429, 403, 400, 401, *[200] * 3, 400, 404, 400, 200, *[400] * 2, 200, 401, 200, 404]  # fmt: skip  # noqa: E501
    told = "".join(each.text + str(each.headers) for each in answers)
    logs = relay.logged() + session_service.logged()
    asked = "".join(str(entry["headers"]) + entry["body"].decode() for entry in upstream.requests())
    forms = [key.secret, key.secret[3:], unknown.secret, *(form for each in (keyed, plain) for form in _forms(each))]
    for where, text in (("answers", told), ("logs", logs), ("upstream", asked)):
        assert [form for form in forms if form in text] == [], where
    # What people may see of it names it among others, and opens nothing.
    assert key.secret[:11] in told
    tables = await db.fetch("SELECT table_name FROM information_schema.tables WHERE table_schema = 'dev'")
    for (table,) in tables:
        rows = "\n".join(row[0] for row in await db.fetch(f"SELECT t::text FROM dev.{table} t"))
        expected = [keyed.hex()] if table == "relay_api_keys" else []
        assert [form for form in forms if form in rows] == expected, table
    assert await db.fetchval("SELECT key_hash FROM dev.relay_api_keys WHERE id = $1", key.id) == keyed


def _forms(digest: bytes) -> list[str]:
    return [digest.hex(), base64.b64encode(digest).decode(), repr(digest)[2:-1]]


async def test_a_stream_tells_nothing_of_the_key(admin: Admin, upstream: TestUpstream) -> None:
    key = await admin.make()
    upstream.script({"text": "word " * 20, "cut_after_events": 6})
    answer = await key.stream_whole()
    assert events_of(answer.content)[-1][0] == "error"
    assert key.secret[3:] not in answer.text + str(answer.headers)
