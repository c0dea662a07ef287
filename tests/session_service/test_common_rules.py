"""What holds for every call: who sees what, what an error looks like, how a body is read."""

import asyncio
import re
from typing import Any

import httpx
import pytest

from tests.session_service.calls import TIME, UUID7, Chat, Turn, User, fine, invalid, new_user_id, refused, said

NOT_FOUND = b'{"detail":"Session not found","code":"session_not_found"}'

LOOK_ALIKES = [
    "user",
    "User",
    "USER",
    "us\u0435r",
    "us\u00e9r",
    "use\u0301r",
    "us\u200der",
    "user\ufeff",
    "user_",
    "use%",
    "user\\",
]

ROUTES_OF_A_SESSION: list[tuple[str, str, Any]] = [
    ("GET", "", None),
    ("PUT", "", {"title": "mine now"}),
    ("DELETE", "", None),
    ("GET", "/summary", None),
    ("POST", "/messages", said("hello")),
    ("GET", "/messages", None),
    ("GET", "/messages?after_seq=0", None),
    ("GET", "/messages/{message_id}", None),
    ("POST", "/turns", {"messages": [said("hello")]}),
    ("GET", "/turns", None),
    ("GET", "/turns/{turn_id}", None),
    ("POST", "/turns/{turn_id}/renew", {"lease_token": "{lease_token}"}),
    ("POST", "/turns/{turn_id}/complete", {"lease_token": "{lease_token}", "status": "completed"}),
    ("POST", "/align", {"hashes": []}),
    ("GET", "/context", None),
    ("POST", "/memory", {"memory_type": "custom", "content": "x"}),
    ("GET", "/memory", None),
    ("GET", "/memories", None),
    ("PUT", "/memories/{memory_id}", {"content": "x"}),
    ("DELETE", "/memories/{memory_id}", None),
]


async def test_a_session_of_another_user_is_as_if_it_did_not_exist(user: User) -> None:
    chat = await user.chat(session_id="the-same-id")
    message = await chat.append("secret")
    memory = await chat.remember("secret")
    turn = await chat.open(said("more"))
    names = {
        "message_id": message["message_id"],
        "memory_id": memory["memory_id"],
        "turn_id": turn.id,
        "lease_token": turn.token,
    }
    before = await chat.get()
    stranger = user.other()
    for method, path, body in ROUTES_OF_A_SESSION:
        filled = path.format(**names)
        sent = {key: value.format(**names) if isinstance(value, str) else value for key, value in (body or {}).items()}
        answers = [
            await user.http.request(
                method, f"/sessions/{session_id}{filled}", params={"user_id": stranger.id}, json=sent if body else None
            )
            for session_id in ("the-same-id", "nowhere")
        ]
        for answer in answers:
            assert (answer.status_code, answer.content) == (404, NOT_FOUND), (method, path, answer.text)
        headers = [set(answer.headers) for answer in answers]
        assert headers[0] == headers[1]
    assert await chat.get() == before
    assert (await stranger.sessions())["total"] == 0


async def test_two_users_may_use_the_same_session_id_and_message_id(user: User) -> None:
    other = user.other()
    for each, text in ((user, "one"), (other, "two")):
        await each.create(session_id="shared")
        await Chat(each, "shared").append(text, message_id="m-1")
    assert await Chat(user, "shared").contents() == ["one"]
    assert await Chat(other, "shared").contents() == ["two"]
    found = await Chat(user, "shared").call("GET", "/messages/m-1")
    assert fine(found)["content"] == "one"


async def test_users_and_sessions_that_look_alike_are_different_ones(user: User) -> None:
    users = [User(user.http, f"{user.id}-{each}") for each in LOOK_ALIKES]
    for each in users:
        for session_id in LOOK_ALIKES:
            made = await each.create(session_id=session_id, title=f"{each.id} {session_id}")
            assert made["title"] == f"{each.id} {session_id}"
    for each in users:
        listed = await each.sessions()
        assert listed["total"] == len(LOOK_ALIKES)
        assert {found["user_id"] for found in listed["sessions"]} == {each.id}
        assert {found["session_id"] for found in listed["sessions"]} == set(LOOK_ALIKES)


@pytest.mark.parametrize(("method", "path", "body"), ROUTES_OF_A_SESSION)
async def test_user_id_is_required(sessions: httpx.AsyncClient, method: str, path: str, body: Any) -> None:
    filled = re.sub(r"\{\w+\}", "x", path)
    answer = await sessions.request(method, f"/sessions/some{filled}", json=body)
    assert invalid(answer, "query", "user_id") == "Field required"
    assert answer.json()["detail"][0]["type"] == "missing"


async def test_made_ids_are_uuids_of_version_7_and_times_are_utc_with_microseconds(user: User) -> None:
    session = await user.create(idle_timeout_seconds=60)
    assert UUID7.fullmatch(session["session_id"])
    for name in ("created_at", "updated_at", "last_activity", "expires_at"):
        assert TIME.fullmatch(session[name]), name
    chat = Chat(user, session["session_id"])
    message, memory = await chat.append("x"), await chat.remember("x")
    turn = await chat.open(said("y"))
    assert UUID7.fullmatch(message["message_id"])
    assert UUID7.fullmatch(memory["memory_id"])
    assert UUID7.fullmatch(turn.id)
    renewed = fine(await turn.renew())
    times = [message["created_at"], memory["created_at"], turn.opened["lease_expires_at"], renewed["lease_expires_at"]]
    done = await turn.complete(said("z", "assistant"))
    times += [done["turn"]["opened_at"], done["turn"]["closed_at"], done["messages"][0]["created_at"]]
    summary = fine(await chat.call("GET", "/summary"))
    times += [summary["created_at"], summary["last_activity"]]
    usage = fine(await user.http.get("/sessions/stats/usage", params={"user_id": user.id}))
    times += [item["start"] for item in usage["items"]]
    for each in times:
        assert TIME.fullmatch(each), each


async def test_made_ids_grow(user: User) -> None:
    made = [(await user.create())["session_id"] for _ in range(5)]
    assert made == sorted(made)


@pytest.mark.parametrize("sane", ["abc", "0" * 128, "a-b_c.d~!*'();:@&=+$,/?#[]", "{}"])
async def test_a_sane_request_id_comes_back(sessions: httpx.AsyncClient, sane: str) -> None:
    for path in ("/sessions/nowhere?user_id=x", "/sessions", "/nowhere"):
        answer = await sessions.get(path, headers={"x-request-id": sane})
        assert answer.headers.get_list("x-request-id") == [sane]


@pytest.mark.parametrize("strange", ["", "a b", "0" * 129, "é", "a\tb"])
async def test_a_strange_request_id_is_replaced(sessions: httpx.AsyncClient, strange: str) -> None:
    answer = await sessions.get("/nowhere", headers=httpx.Headers([(b"x-request-id", strange.encode("utf-8"))]))
    assert UUID7.fullmatch(answer.headers["x-request-id"])


async def test_request_ids_differ(sessions: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(sessions.get("/nowhere") for _ in range(5)))
    assert len({answer.headers["x-request-id"] for answer in answers}) == 5


async def test_unknown_paths_and_methods(sessions: httpx.AsyncClient, user: User) -> None:
    refused(await sessions.get("/nowhere"), 404, "not_found", "Not found")
    refused(await sessions.get("/users"), 404, "not_found")
    allowed = {
        "": "DELETE, GET, PUT",
        "/messages": "GET, POST",
        "/messages/m": "GET",
        "/turns": "GET, POST",
        "/turns/t/complete": "POST",
        "/memories/m": "DELETE, PUT",
    }
    for path, methods in allowed.items():
        patch = await sessions.patch(f"/sessions/x{path}", params=user.params, json={})
        refused(patch, 405, "method_not_allowed", "Method not allowed")
        assert patch.headers.get_list("allow") == [methods]


BODIES_THAT_ARE_NO_JSON_OBJECT: dict[str, bytes] = {
    "empty": b"",
    "blank": b"  \n",
    "half": b'{"user_id":"u"',
    "trailing comma": b'{"user_id":"u",}',
    "two values": b'{"user_id":"u"}{"user_id":"u"}',
    "single quotes": b"{'user_id':'u'}",
    "comment": b'{"user_id":"u"/* hi */}',
    "array": b'[{"user_id":"u"}]',
    "string": b'"user_id"',
    "number": b"1",
    "null": b"null",
    "true": b"true",
    "form": b"user_id=u",
    "byte order mark": b'\xef\xbb\xbf{"user_id":"u"}',
    "UTF-16": '{"user_id":"u"}'.encode("utf-16"),
    "UTF-16 without mark": '{"user_id":"u"}'.encode("utf-16-le"),
    "UTF-32": '{"user_id":"u"}'.encode("utf-32"),
    "Latin-1": '{"user_id":"é"}'.encode("latin-1"),
    "overlong": b'{"user_id":"\xc0\xaf"}',
    "cut in a character": '{"user_id":"é"}'.encode()[:13] + b'"}',
    "surrogate bytes": b'{"user_id":"\xed\xa0\x80"}',
    "lone surrogate": b'{"user_id":"\\ud800"}',
    "lone low surrogate": b'{"user_id":"\\udc00x"}',
    "surrogates reversed": b'{"user_id":"\\udc00\\ud800"}',
    "raw control": b'{"user_id":"a\x01b"}',
    "raw NUL": b'{"user_id":"a\x00b"}',
    "NaN": b'{"user_id":"u","x":NaN}',
    "Infinity": b'{"user_id":"u","x":Infinity}',
    "-Infinity": b'{"user_id":"u","x":[-Infinity]}',
    "leading zero": b'{"user_id":"u","x":01}',
    "plus": b'{"user_id":"u","x":+1}',
    "hexadecimal": b'{"user_id":"u","x":0x1}',
    "bare point": b'{"user_id":"u","x":.5}',
    "too deep": b'{"user_id":"u","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too many digits": b'{"user_id":"u","x":' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", BODIES_THAT_ARE_NO_JSON_OBJECT)
async def test_a_body_that_is_no_json_object_is_refused_as_a_whole(sessions: httpx.AsyncClient, name: str) -> None:
    body = BODIES_THAT_ARE_NO_JSON_OBJECT[name]
    answer = await sessions.post("/sessions", content=body, headers={"content-type": "application/json"})
    message = invalid(answer, "body")
    detail = answer.json()["detail"]
    assert [each["loc"] for each in detail] == [["body"]]
    if detail[0]["type"] == "json_invalid":
        assert re.search(r"line \d+ column \d+", message)
    else:
        assert body.strip()[:1] in {b"[", b'"', b"1", b"n", b"t"}


async def test_of_a_key_sent_twice_the_last_counts(sessions: httpx.AsyncClient, user: User) -> None:
    body = f'{{"user_id":"someone","title":"a","user_id":"{user.id}","title":"b"}}'
    made = fine(await sessions.post("/sessions", content=body.encode()))
    assert (made["user_id"], made["title"]) == (user.id, "b")


async def test_unknown_fields_are_ignored_and_content_types_do_not_matter(user: User) -> None:
    body = f'{{"user_id":"{user.id}","colour":"red","deep":{{"a":[null,1.5,12345678901234567890]}}}}'.encode()
    for content_type in ("application/json", "text/plain", "application/json; charset=utf-8", "x/y"):
        answer = await user.http.post("/sessions", content=body, headers={"content-type": content_type})
        assert "colour" not in fine(answer)
    assert (await user.sessions())["total"] == 4


async def test_null_is_the_same_as_absent(user: User) -> None:
    names = ("session_id", "title", "metadata", "conversation_data", "idle_timeout_seconds", "if_exists")
    made = await user.create(**dict.fromkeys(names))
    assert (made["title"], made["metadata"], made["conversation_data"]) == (None, {}, {})
    nothing: dict[str, Any] = dict.fromkeys(
        ("message_type", "tokens_used", "cost_usd", "metadata", "message_id", "native")
    )
    message = await Chat(user, made["session_id"]).append("x", **nothing)
    found = (message["message_type"], message["tokens_used"], message["cost_usd"], message["metadata"])
    assert found == ("chat", 0, 0, {})
    assert UUID7.fullmatch(message["message_id"])
    nothing = dict.fromkeys(("messages", "lease_seconds", "wait_seconds", "context", "create_session", "rewind_to_seq"))
    chat = Chat(user, made["session_id"])
    turn = Turn(chat, fine(await chat.call("POST", "/turns", json=nothing)))
    nothing = dict.fromkeys(("messages", "usage", "cost_usd", "stop_reason", "model", "upstream", "error"))
    assert fine(await turn.finish(**nothing))["messages"] == []


async def test_nothing_of_the_input_is_repeated_in_an_error(user: User) -> None:
    secret = "hunter2"
    answer = await user.http.post(
        "/sessions", json={"user_id": user.id, "title": [secret], "metadata": secret, "if_exists": secret}
    )
    invalid(answer, "body", "title")
    invalid(answer, "body", "metadata")
    invalid(answer, "body", "if_exists")
    assert secret not in answer.text


async def test_a_new_user_has_nothing(sessions: httpx.AsyncClient) -> None:
    user = User(sessions, new_user_id())
    listed = {"sessions": [], "total": 0, "page": 1, "page_size": 50, "next_cursor": None}
    assert await user.sessions() == listed
    assert fine(await sessions.get(f"/users/{user.id}/sessions")) == listed
    assert fine(await sessions.get(f"/users/{user.id}/memories")) == {"memories": [], "next_cursor": None}
