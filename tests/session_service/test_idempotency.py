"""Idempotency-Key: a creating call sent again gives the first one's answer and changes nothing."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.session_service.calls import Chat, Db, User, fine, invalid, new_user_id, refused, said
from tests.session_service.creations import (
    GROWS,
    KINDS,
    NATIVE,
    Request,
    a_chat,
    answered,
    exported,
    grown,
    owner,
    rows,
)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_sent_again(sessions: httpx.AsyncClient, db: Db, kind: str) -> None:
    chat = await a_chat(sessions)
    request = await KINDS[kind](chat.user, chat)
    user_id = owner(request)
    before = await rows(db, user_id)
    first = await request.send(sessions, "key-1")
    body = answered(first, replayed=False)
    version = await db.fetchval("SELECT sum(version) FROM dev.sessions WHERE user_id = $1", user_id)
    for _ in range(3):
        again = await request.send(sessions, "key-1")
        assert answered(again, replayed=True) == body
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert grown(before, await rows(db, user_id)) == GROWS[kind]
    assert await db.fetchval("SELECT sum(version) FROM dev.sessions WHERE user_id = $1", user_id) == version
    detail = "This Idempotency-Key came before with another body"
    told = refused(await request.other().send(sessions, "key-1"), 422, "idempotency_key_reused", detail)
    assert list(told) == ["detail", "code"]
    assert answered(await request.send(sessions, "key-1"), replayed=True) == body
    assert grown(before, await rows(db, user_id)) == GROWS[kind]


@pytest.mark.parametrize("kind", KINDS)
async def test_twenty_at_once_make_one(crowd: httpx.AsyncClient, db: Db, kind: str) -> None:
    chat = await a_chat(crowd)
    request = await KINDS[kind](chat.user, chat)
    before = await rows(db, owner(request))
    answers = await asyncio.gather(*(request.send(crowd, "key-1") for _ in range(20)))
    bodies = [fine(answer) for answer in answers]
    assert all(body == bodies[0] for body in bodies)
    assert [answer.headers.get("idempotent-replayed") for answer in answers].count(None) == 1
    assert grown(before, await rows(db, owner(request))) == GROWS[kind]


@pytest.mark.parametrize("kind", ["session", "message", "batch", "memory", "fork"])
async def test_without_a_key_each_call_is_its_own(sessions: httpx.AsyncClient, db: Db, kind: str) -> None:
    chat = await a_chat(sessions)
    request = await KINDS[kind](chat.user, chat)
    before = await rows(db, owner(request))
    answers = [await request.send(sessions, key) for key in (None, None, "k1", "k2")]
    for answer in answers:
        answered(answer, replayed=False)
    assert grown(before, await rows(db, owner(request))) == tuple(4 * each for each in GROWS[kind])


@pytest.mark.parametrize("kind", KINDS)
async def test_keys_that_are_none(sessions: httpx.AsyncClient, db: Db, kind: str) -> None:
    chat = await a_chat(sessions)
    request = await KINDS[kind](chat.user, chat)
    before = await rows(db, owner(request))
    for key in ("", "k" * 256, "two words", "a\tb", "ключ".encode(), b"a\xa0b", "钥匙".encode()):
        invalid(await request.send(sessions, key), "header", "idempotency-key")
    assert await rows(db, owner(request)) == before
    if kind == "message":
        for key in ("k", "k" * 255, "".join(map(chr, range(0x21, 0x7F)))):
            first = answered(await request.send(sessions, key), replayed=False)
            assert answered(await request.send(sessions, key), replayed=True) == first


async def test_the_answer_is_stored_as_it_was(sessions: httpx.AsyncClient) -> None:
    chat = await a_chat(sessions)
    request = await KINDS["message"](chat.user, chat)
    first = answered(await request.send(sessions, "k"), replayed=False)
    again = await request.send(sessions, "k")
    assert answered(again, replayed=True) == first
    assert again.json()["native"] == NATIVE
    assert fine(await chat.call("GET", f"/messages/{first['message_id']}")) == first


async def test_the_writing_of_a_body_does_not_count(sessions: httpx.AsyncClient) -> None:
    chat = await a_chat(sessions)
    options: dict[str, Any] = {"params": chat.user.params, "headers": {"Idempotency-Key": "k"}}
    path = f"/sessions/{chat.id}/messages"
    first = await sessions.post(path, content=b'{"role":"user","content":"\xc3\xbc"}', **options)
    again = await sessions.post(path, content=b' { "content" : "\\u00fc",\n "role":"user" } ', **options)
    assert answered(again, replayed=True) == answered(first, replayed=False)
    for other in (b'{"role":"user","content":"u"}', b'{"role":"user","content":"\xc3\xbc","unknown":1}'):
        refused(await sessions.post(path, content=other, **options), 422, "idempotency_key_reused")


# ── replay comes before any other check, and only successes are stored ──────────────────────────


@pytest.mark.parametrize("kind", ["message", "batch", "turn", "answer", "memory", "fork"])
async def test_the_answer_is_given_whatever_has_become_of_the_session(sessions: httpx.AsyncClient, kind: str) -> None:
    chat = await a_chat(sessions)
    request = await KINDS[kind](chat.user, chat)
    first = answered(await request.send(sessions, "k"), replayed=False)
    for step in ({"title": "other"}, {"status": "completed"}, {"status": "archived"}):
        fine(await chat.put(**step))
        assert answered(await request.send(sessions, "k"), replayed=True) == first
        assert answered(await request.send(sessions, "k", **{"If-Match": '"1"'}), replayed=True) == first


@pytest.mark.parametrize("kind", KINDS)
async def test_an_erased_user_has_no_answers_left(sessions: httpx.AsyncClient, db: Db, kind: str) -> None:
    chat = await a_chat(sessions)
    request = await KINDS[kind](chat.user, chat)
    answered(await request.send(sessions, "k"), replayed=False)
    user_id = owner(request)
    fine(await sessions.delete(f"/users/{user_id}"))
    records = "SELECT count(*) FROM dev.idempotency_records WHERE user_id = $1"
    assert await db.fetchval(records, user_id) == 0
    again = await request.send(sessions, "k")
    if kind in {"session", "import"} or "making" in kind:
        answered(again, replayed=False)
    else:
        refused(again, 404, "session_not_found")


async def test_a_precondition_that_held_the_first_time(sessions: httpx.AsyncClient) -> None:
    chat = await a_chat(sessions)
    request = await KINDS["batch"](chat.user, chat)
    match = {"If-Match": f'"{(await chat.get())["version"]}"'}
    first = answered(await request.send(sessions, "k", **match), replayed=False)
    refused(await request.send(sessions, None, **match), 412, "version_mismatch")
    assert answered(await request.send(sessions, "k", **match), replayed=True) == first


async def test_refusals_are_not_stored(sessions: httpx.AsyncClient) -> None:
    user = User(sessions, new_user_id())
    chat = Chat(user, "not-yet")
    request = Request(f"/sessions/{chat.id}/messages", user.params, {"json": said("x", message_id="m")})
    refused(await request.send(sessions, "k"), 404, "session_not_found")
    await user.create(session_id=chat.id)
    turn = await chat.open(said("q"))
    refused(await request.send(sessions, "k"), 409, "turn_in_progress")
    await turn.complete()
    bad = Request(request.path, request.params, {"json": said(" ")})
    invalid(await bad.send(sessions, "k"), "body", "content")
    first = answered(await request.send(sessions, "k"), replayed=False)
    assert answered(await request.send(sessions, "k"), replayed=True) == first
    refused(await bad.send(sessions, "k"), 400, "validation_error")
    assert await chat.contents() == ["q", "x"]


async def test_conflicts_are_not_stored(sessions: httpx.AsyncClient) -> None:
    chat = await a_chat(sessions)
    user = chat.user
    taken = Request("/sessions", {}, {"json": {"user_id": user.id, "session_id": chat.id}})
    refused(await taken.send(sessions, "k"), 409, "session_exists")
    file = await exported(chat)
    load = Request("/sessions/import", user.params, {"content": file})
    refused(await load.send(sessions, "k"), 409, "session_exists")
    fine(await sessions.delete(f"/users/{user.id}"))
    answered(await load.send(sessions, "k"), replayed=False)
    answered(await load.send(sessions, "k"), replayed=True)
    fine(await sessions.delete(f"/users/{user.id}"))
    answered(await taken.send(sessions, "k"), replayed=False)
    damaged = Request("/sessions/import", user.params, {"content": file[:-9]})
    invalid(await damaged.send(sessions, "other"), "body")


async def test_a_message_that_was_there_already_is_a_success_too(sessions: httpx.AsyncClient) -> None:
    """The same message_id with the same body answers the stored message: with a key, that answer is kept."""
    chat = await a_chat(sessions)
    stored = await chat.append("x", message_id="m")
    request = Request(f"/sessions/{chat.id}/messages", chat.user.params, {"json": said("x", message_id="m")})
    assert fine(await request.send(sessions, "k")) == stored
    assert answered(await request.send(sessions, "k"), replayed=True) == stored
    other = Request(request.path, request.params, {"json": said("y")})
    refused(await other.send(sessions, "k"), 422, "idempotency_key_reused")
    assert await chat.contents() == ["first", "x"]


# ── scope: user, method and path ────────────────────────────────────────────────────────────────


async def test_each_user_has_keys_of_their_own(sessions: httpx.AsyncClient) -> None:
    users = [User(sessions, new_user_id()) for _ in range(2)]
    for user in users:
        request = Request("/sessions", {}, {"json": {"user_id": user.id, "session_id": "same"}})
        assert answered(await request.send(sessions, "k"), replayed=False)["user_id"] == user.id
    for user in users:
        request = Request("/sessions/same/messages", user.params, {"json": said("x")})
        assert answered(await request.send(sessions, "k"), replayed=False)["user_id"] == user.id


async def test_the_user_of_a_new_session_is_the_bodys(sessions: httpx.AsyncClient, db: Db) -> None:
    """A user_id in the query, which this route does not know, is nobody's scope."""
    one, two = (User(sessions, new_user_id()) for _ in range(2))
    astray = Request("/sessions", {"user_id": two.id}, {"json": {"user_id": one.id}})
    answered(await astray.send(sessions, "k"), replayed=False)
    own = Request("/sessions", {}, {"json": {"user_id": two.id}})
    assert answered(await own.send(sessions, "k"), replayed=False)["user_id"] == two.id
    counts = "SELECT count(*) FROM dev.idempotency_records WHERE user_id = $1"
    assert [await db.fetchval(counts, user.id) for user in (one, two)] == [1, 1]
    for user_id in ("x" * 9000, "a\0b", " "):
        strange = Request("/sessions", {"user_id": user_id}, {"json": {"user_id": one.id}})
        assert (await strange.send(sessions, "k-2")).status_code in {200, 400}


@pytest.mark.parametrize("segment", ["a%00b", "x" * 9000, "%20a", "a%C2%80"])
async def test_a_path_with_a_bad_id(sessions: httpx.AsyncClient, user_id: str, segment: str) -> None:
    path = f"/sessions/{segment}/messages"
    answer = await Request(path, {"user_id": user_id}, {"json": said("x")}).send(sessions, "k")
    invalid(answer, "path", "session_id")


async def test_each_path_has_keys_of_its_own(sessions: httpx.AsyncClient) -> None:
    chat = await a_chat(sessions)
    ids = ["a?b", "a%3Fb", "a#b", "a%23b", "a b", "a+b", "a%b", "A", "a", "ä", "a\\b", "a;b"]
    for session_id in ids:
        await chat.user.create(session_id=session_id)
    for session_id in ids:
        request = Request(f"/sessions/{_quoted(session_id)}/messages", chat.user.params, {"json": said("x")})
        assert answered(await request.send(sessions, "k"), replayed=False)["session_id"] == session_id
    for path in ("/messages/batch", "/turns"):
        request = Request(f"/sessions/{chat.id}{path}", chat.user.params, {"json": {"messages": [said("x")]}})
        answered(await request.send(sessions, "k"), replayed=False)


def _quoted(session_id: str) -> str:
    return "".join(f"%{byte:02X}" for byte in session_id.encode())


async def test_calls_that_create_nothing_take_no_notice_of_keys(sessions: httpx.AsyncClient) -> None:
    chat = await a_chat(sessions)
    headers = {"Idempotency-Key": "k"}
    for title in ("one", "two"):
        assert fine(await chat.call("PUT", json={"title": title}, headers=headers))["title"] == title
    for _ in range(2):
        fine(await chat.call("GET", headers=headers))
        fine(await chat.call("DELETE", headers=headers))
    assert (await chat.get())["status"] == "ended"
