"""Ids, pages and other parameters of path and query: what is refused, and that the answer names it."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from tests.session_service.calls import Chat, User, fine, invalid, refused, said

BAD_IDS: dict[str, str] = {
    "too long": "x" * 256,
    "too long in é": "é" * 256,
    "NUL": "a%00b",
    "line end": "a%0Ab",
    "C0": "%1F",
    "DEL": "a%7F",
    "C1": "a%C2%85",
    "C1, last": "%C2%9F",
    "leading blank": "%20a",
    "trailing blank": "a%20",
    "only blanks": "%20%20",
    "trailing no-break space": "a%C2%A0",
    "leading ideographic space": "%E3%80%80a",
}
NOT_UTF_8: dict[str, str] = {"surrogate": "a%ED%A0%80", "stray byte": "a%FF", "half a character": "a%C3"}
RESERVED = ("stats", "search", "import", "%2E", "%2E%2E")


@pytest.mark.parametrize("name", BAD_IDS)
async def test_bad_ids_in_path_and_query(sessions: httpx.AsyncClient, user: User, name: str) -> None:
    bad = BAD_IDS[name]
    for path in ("", "/summary", "/messages", "/turns", "/context", "/memory", "/memories", "/messages/m", "/turns/t"):
        invalid(await sessions.get(f"/sessions/{bad}{path}?user_id={user.id}"), "path", "session_id")
        invalid(await sessions.get(f"/sessions/s{path}?user_id={bad}"), "query", "user_id")
    invalid(await sessions.get(f"/sessions?user_id={bad}"), "query", "user_id")
    for path in ("sessions", "memories", "stats"):
        invalid(await sessions.get(f"/users/{bad}/{path}"), "path", "user_id")
    invalid(await sessions.get(f"/sessions/stats/usage?user_id={bad}"), "query", "user_id")


@pytest.mark.parametrize("name", NOT_UTF_8)
async def test_bytes_that_are_no_text_in_path_and_query(user: User, name: str) -> None:
    bad = NOT_UTF_8[name]
    for path in ("", "/messages", f"/messages/{bad}", f"/turns/{bad}"):
        invalid(await user.http.get(f"/sessions/{bad}{path}?user_id={user.id}"), "path")
    for path in ("/sessions/s", "/sessions", "/sessions/s/messages", "/sessions/s/context"):
        invalid(await user.http.get(f"{path}?user_id={bad}"), "query")
    invalid(await user.http.get(f"/users/{bad}/sessions"), "path")
    invalid(await user.http.post(f"/sessions/{bad}/messages?user_id={user.id}", json=said("x")), "path")
    fine(await user.http.get("/sessions?user_id=%EF%BF%BD"))  # the replacement character itself is one


@pytest.mark.parametrize("name", BAD_IDS)
async def test_bad_ids_in_bodies(user: User, name: str) -> None:
    bad = unquote(BAD_IDS[name])
    invalid(await user.http.post("/sessions", json={"user_id": bad}), "body", "user_id")
    invalid(await user.http.post("/sessions", json={"user_id": user.id, "session_id": bad}), "body", "session_id")
    made = {"user_id": user.id, "session_id": bad}
    answer = await Chat(user, "s").turn(said("x"), create_session=made)
    invalid(answer, "body", "create_session", "session_id")
    assert (await user.sessions())["total"] == 0


@pytest.mark.parametrize("bad", ["", "a/b", "/", "stats", "search", "import", ".", ".."])
async def test_session_ids_that_could_never_be_reached(user: User, bad: str) -> None:
    answer = await user.http.post("/sessions", json={"user_id": user.id, "session_id": bad})
    invalid(answer, "body", "session_id")
    assert (await user.sessions())["total"] == 0


@pytest.mark.parametrize("value", [1, True, None, ["x"], {"a": "x"}])
async def test_ids_are_texts(user: User, value: Any) -> None:
    invalid(await user.http.post("/sessions", json={"user_id": value}), "body", "user_id")
    if value is not None:
        answer = await user.http.post("/sessions", json={"user_id": user.id, "session_id": value})
        invalid(answer, "body", "session_id")
    invalid(await user.http.post("/sessions", json={}), "body", "user_id")


@pytest.mark.parametrize("reserved", RESERVED)
async def test_reserved_session_ids_in_the_path(sessions: httpx.AsyncClient, reserved: str) -> None:
    for path in ("/summary", "/messages", "/turns", "/context", "/memory", "/memories"):
        answer = await sessions.get(f"/sessions/{reserved}{path}?user_id=u")
        invalid(answer, "path", "session_id")
    invalid(await sessions.put(f"/sessions/{reserved}?user_id=u", json={}), "path", "session_id")
    invalid(await sessions.delete(f"/sessions/{reserved}?user_id=u"), "path", "session_id")
    invalid(await sessions.post(f"/sessions/{reserved}/messages?user_id=u", json=said("x")), "path", "session_id")


@pytest.mark.parametrize("bad", ["x" * 256, "a%00b", "a%0A", "%7F", "%C2%80"])
async def test_bad_ids_of_messages_turns_and_memories(user: User, bad: str) -> None:
    chat = await user.chat()
    invalid(await chat.call("GET", f"/messages/{bad}"), "path", "message_id")
    invalid(await chat.call("GET", f"/turns/{bad}"), "path", "turn_id")
    invalid(await chat.call("POST", f"/turns/{bad}/renew", json={"lease_token": "x"}), "path", "turn_id")
    invalid(await chat.call("PUT", f"/memories/{bad}", json={}), "path", "memory_id")
    invalid(await chat.call("DELETE", f"/memories/{bad}"), "path", "memory_id")


async def test_ids_that_nothing_has(user: User) -> None:
    chat = await user.chat()
    refused(await chat.call("GET", "/messages/m"), 404, "message_not_found", "Message not found")
    refused(await chat.call("GET", "/turns/t"), 404, "turn_not_found", "Turn not found")
    renew, complete = {"lease_token": "x"}, {"lease_token": "x", "status": "completed"}
    refused(await chat.call("POST", "/turns/t/renew", json=renew), 404, "turn_not_found")
    refused(await chat.call("POST", "/turns/t/complete", json=complete), 404, "turn_not_found")
    refused(await chat.call("PUT", "/memories/m", json={"content": "x"}), 404, "memory_not_found", "Memory not found")
    refused(await chat.call("DELETE", "/memories/m"), 404, "memory_not_found")
    refused(await chat.call("GET", "/memory"), 404, "memory_not_found")


async def test_parts_of_another_session_of_the_same_user_are_not_found_here(user: User) -> None:
    chat, other = await user.chat(), await user.chat()
    message, memory, turn = await other.append("x"), await other.remember("x"), await other.open(said("y"))
    refused(await chat.call("GET", f"/messages/{message['message_id']}"), 404, "message_not_found")
    refused(await chat.call("GET", f"/turns/{turn.id}"), 404, "turn_not_found")
    renew = {"lease_token": turn.token}
    refused(await chat.call("POST", f"/turns/{turn.id}/renew", json=renew), 404, "turn_not_found")
    refused(await chat.call("DELETE", f"/memories/{memory['memory_id']}"), 404, "memory_not_found")
    assert (await other.call("GET", "/memory")).json() == memory


_NEARLY = ("1.0", "1_0", "%2B1", "%201", "1%20")
BAD_NUMBERS = (*_NEARLY, "", "-1", "0", "x", "1.5", "true", "null", "1e1", "99999999999999999999", "%00")
BAD_WORDS = ("", "x", "ACTIVE", "%00", "%FF")


def bad_parameters() -> Iterator[tuple[str, str, str]]:
    """Path below /sessions/{id} (or the list's), parameter, bad value."""
    for value in (*BAD_NUMBERS, "101"):
        yield "list", "page_size", value
        yield "/turns", "limit", value
    for value in BAD_NUMBERS:
        yield "list", "page", value
        yield "/messages", "page", value
        yield "/context", "max_messages", value
        yield "/context", "max_tokens", value
    for value in (*BAD_NUMBERS, "1001"):
        yield "/messages", "page_size", value
        yield "/messages?after_seq=0", "limit", value
    for value in (*BAD_NUMBERS, "201"):
        yield "/memories", "limit", value
        yield "user memories", "limit", value
    for value in (each for each in (*BAD_NUMBERS, "2147483648") if each != "0"):
        yield "/messages", "after_seq", value
        yield "/messages", "before_seq", value
    for value in BAD_WORDS:
        yield "list", "status", value
        yield "list", "order", value
        yield "list", "active_only", value
        yield "/messages", "order", value
        yield "/messages", "role", value
        yield "/messages", "message_type", value
        yield "/messages", "include_superseded", value
        yield "/context", "format", value
        yield "/context", "memories", value
        yield "/memories", "memory_type", value
        yield "user memories", "memory_type", value
        yield "usage", "bucket", value
        yield "usage", "from", value
        yield "usage", "to", value
    for value in ("x", "e30", "W10", "%00", "é", "====", "WzEsMiwzXQ", "bnVsbA", "x" * 2049, "a%FF"):
        for path in ("list", "/turns", "/memories", "user memories"):
            yield path, "cursor", value
    for value in ("%00", "a%00b", "x" * 257, "a%FF"):
        yield "/memories", "q", value
        yield "user memories", "q", value


PARAMETERS = list(bad_parameters())


@pytest.mark.parametrize("where", sorted({where for where, _, _ in PARAMETERS}))
async def test_bad_parameters_are_named(user: User, where: str) -> None:
    chat = await user.chat()
    named = {
        "list": "/sessions",
        "user memories": f"/users/{user.id}/memories",
        "usage": "/sessions/stats/usage",
    }
    path = named.get(where, f"/sessions/{chat.id}{where}")
    wrong = []
    for name, value in [(name, value) for each, name, value in PARAMETERS if each == where]:
        answer = await user.http.get(f"{path}{'&' if '?' in path else '?'}user_id={user.id}&{name}={value}")
        try:
            invalid(answer, "query", name)
        except AssertionError as error:
            wrong.append(f"{name}={value[:40]}: {answer.status_code} {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)


async def test_of_after_and_before_only_one(user: User) -> None:
    chat = await user.chat()
    invalid(await chat.call("GET", "/messages", params={"after_seq": 1, "before_seq": 3}), "query")


@pytest.mark.parametrize("page", [1, 2, 10**9])
async def test_pages_far_out_are_empty(user: User, page: int) -> None:
    chat = await user.chat()
    await chat.append("x")
    listed = await user.sessions(page=page, page_size=100)
    assert (len(listed["sessions"]), listed["total"], listed["page"]) == (int(page == 1), 1, page)
    messages = await chat.messages(page=page, page_size=1000)
    found = (len(messages["messages"]), messages["total"], messages["page"], messages["has_more"])
    assert found == (int(page == 1), 1, page, False)


USAGE_EXTREMES = [
    {"from": "0001-01-01T00:00:00+14:00"},
    {"from": "0001-01-01T00:00:00Z", "to": "0001-01-02T00:00:00Z"},
    {"from": "0001-12-31T23:59:59Z", "to": "0002-01-02T00:00:00Z"},
    {"to": "0002-01-01T00:00:00Z", "bucket": "month"},
    {"from": "9998-12-31T00:00:00Z", "to": "9999-12-31T23:59:59.999999Z"},
    {"to": "0001-01-01T00:00:00Z"},
    {"from": "0001-01-01T00:00:00Z", "to": "9999-12-31T23:59:59Z", "bucket": "hour"},
    {"from": "2025-01-02T00:00:00Z", "to": "2025-01-01T00:00:00Z"},
    {"from": "2025-01-01T00:00:00Z", "to": "2025-01-01T00:00:00Z"},
    {"to": "9999-12-31T23:59:59-14:00", "from": "9999-12-01T00:00:00Z"},
]


@pytest.mark.parametrize("params", USAGE_EXTREMES)
async def test_times_that_make_no_sense(sessions: httpx.AsyncClient, params: dict[str, str]) -> None:
    invalid(await sessions.get("/sessions/stats/usage", params=params), "query")


async def test_a_cursor_serves_only_the_list_and_order_that_gave_it(user: User) -> None:
    for _ in range(3):
        chat = await user.chat()
    cursor = (await user.sessions(page_size=1))["next_cursor"]
    invalid(await user.http.get("/sessions", params=user.params | {"cursor": cursor, "order": "created_at"}), "query")
    invalid(await chat.call("GET", "/turns", params={"cursor": cursor}), "query", "cursor")
    assert fine(await user.http.get("/sessions", params=user.params | {"cursor": cursor}))["total"] == 3
