"""Making sessions, getting them, and bringing ended ones back."""

import asyncio

import httpx
import pytest

from tests.session_service.calls import Chat, Db, Json, User, check_counters, fine, refused, said, wait

SESSION_FIELDS = {
    *("session_id", "user_id", "title", "status", "conversation_data", "metadata", "is_active", "message_count"),
    *("total_tokens", "total_cost", "session_summary", "created_at", "updated_at", "last_activity", "version"),
    *("generation", "idle_timeout_seconds", "expires_at", "ended_reason", "parent", "summary_to_seq", "summary_model"),
}


async def test_a_new_session(user: User) -> None:
    session = await user.create(title="T", metadata={"a": [1]}, conversation_data={"b": {}})
    assert set(session) == SESSION_FIELDS
    times = session["created_at"]
    assert session | {"session_id": ""} == {
        "session_id": "",
        "user_id": user.id,
        "title": "T",
        "status": "active",
        "conversation_data": {"b": {}},
        "metadata": {"a": [1]},
        "is_active": True,
        "message_count": 0,
        "total_tokens": 0,
        "total_cost": 0.0,
        "session_summary": "",
        "summary_to_seq": None,
        "summary_model": None,
        "created_at": times,
        "updated_at": times,
        "last_activity": times,
        "version": 1,
        "generation": 1,
        "idle_timeout_seconds": None,
        "expires_at": None,
        "ended_reason": None,
        "parent": None,
    }
    assert await Chat(user, session["session_id"]).get() == session


async def test_reading_changes_nothing(user: User) -> None:
    chat = await user.chat(idle_timeout_seconds=100)
    await chat.append("x")
    before = await chat.get()
    for path in ("", "/summary", "/messages", "/turns", "/context", "/memories"):
        fine(await chat.call("GET", path))
    await user.sessions()
    fine(await chat.call("POST", "/align", json={"hashes": []}))
    assert await chat.get() == before


async def test_summary(user: User) -> None:
    chat = await user.chat()
    await chat.append("x", tokens_used=3, cost_usd=0.25)
    fine(await chat.put(session_summary="all of it"))
    session = await chat.get()
    names = ("session_id", "user_id", "status", "message_count", "total_tokens", "total_cost", "is_active")
    expected: Json = {name: session[name] for name in (*names, "created_at", "last_activity", "session_summary")}
    assert fine(await chat.call("GET", "/summary")) == expected | {"has_memory": False}
    memory = await chat.remember("x")
    assert fine(await chat.call("GET", "/summary"))["has_memory"] is True
    fine(await chat.call("DELETE", f"/memories/{memory['memory_id']}"))
    assert fine(await chat.call("GET", "/summary"))["has_memory"] is False


# ── if_exists ───────────────────────────────────────────────────────────────────────────────────


async def again(chat: Chat, if_exists: str | None, **fields: object) -> httpx.Response:
    body = {"user_id": chat.user.id, "session_id": chat.id, "if_exists": if_exists, **fields}
    return await chat.user.http.post("/sessions", json=body)


@pytest.mark.parametrize("if_exists", [None, "error"])
@pytest.mark.parametrize("ended", [False, True])
async def test_an_existing_session_is_a_conflict(user: User, if_exists: str | None, ended: bool) -> None:
    chat = await user.chat(title="first")
    if ended:
        await chat.end()
    before = await chat.get()
    refused(await again(chat, if_exists, title="second"), 409, "session_exists", "Session already exists")
    assert await chat.get() == before


@pytest.mark.parametrize("if_exists", ["return", "restart", "resume"])
async def test_an_active_session_is_returned_untouched(user: User, if_exists: str) -> None:
    chat = await user.chat(title="first", metadata={"a": 1}, idle_timeout_seconds=60)
    await chat.append("x")
    before = await chat.get()
    assert fine(await again(chat, if_exists, title="second", metadata={"b": 2}, idle_timeout_seconds=5)) == before
    assert await chat.get() == before


async def test_return_gives_a_session_in_any_status(user: User) -> None:
    chat = await user.chat()
    for status in ("completed", "archived"):
        fine(await chat.put(status=status))
        assert fine(await again(chat, "return"))["status"] == status


@pytest.mark.parametrize("expires", [False, True])
@pytest.mark.parametrize("if_exists", ["restart", "resume"])
async def test_an_ended_session_comes_back(user: User, db: Db, if_exists: str, expires: bool) -> None:
    chat = await user.chat(title="T", metadata={"a": 1}, conversation_data={"b": 2}, idle_timeout_seconds=60)
    await chat.append("one", tokens_used=3, cost_usd=0.5)
    await chat.append("two", "assistant", tokens_used=4)
    fine(await chat.put(session_summary="they said one and two", summary_model="m-1"))
    await chat.remember("a thing")
    if expires:
        await wait(db, chat, 61)
    else:
        fine(await chat.end())
    ended = await chat.get()
    assert (ended["status"], ended["ended_reason"]) == ("ended", "expired" if expires else "user")

    back = fine(await again(chat, if_exists))
    restarted = if_exists == "restart"
    assert (back["status"], back["is_active"], back["ended_reason"]) == ("active", True, None)
    assert back["generation"] == 2
    assert back["version"] > ended["version"]
    assert back["expires_at"] > ended["expires_at"]
    assert back["last_activity"] > ended["last_activity"]
    kept = ("title", "metadata", "conversation_data", "idle_timeout_seconds", "created_at")
    assert {name: back[name] for name in kept} == {name: ended[name] for name in kept}
    assert (back["total_tokens"], back["total_cost"]) == (7, 0.5)
    assert back["message_count"] == (0 if restarted else 2)
    assert back["session_summary"] == ("" if restarted else "they said one and two")
    assert (back["summary_to_seq"], back["summary_model"]) == ((None, None) if restarted else (2, "m-1"))
    assert await chat.get() == back

    message = await chat.append("three")
    assert message["seq"] == 3
    visible = ["three"] if restarted else ["one", "two", "three"]
    assert await chat.contents() == visible
    everything = (await chat.messages(include_superseded=True))["messages"]
    assert [each["content"] for each in everything] == ["one", "two", "three"]
    assert [each["superseded_at"] is not None for each in everything] == [restarted, restarted, False]
    context = await chat.context()
    assert str(context["messages"]).count("one") == int(not restarted)
    assert ("they said" in context["system"]) is not restarted
    assert context["receipt"]["window_start_seq"] == (3 if restarted else 1)
    assert fine(await chat.call("GET", "/memory"))["content"] == "a thing"
    stats = await user.stats()
    assert (stats["total_messages"], stats["total_tokens"]) == ((1, 0) if restarted else (3, 7))
    await check_counters(db, chat)


async def test_coming_back_may_bring_other_fields(user: User) -> None:
    chat = await user.chat(title="T", metadata={"a": 1}, conversation_data={"b": 2})
    for generation, if_exists in enumerate(("restart", "resume", "restart"), start=2):
        fine(await chat.end())
        fields = {"title": f"T{generation}", "metadata": {"g": generation}, "idle_timeout_seconds": generation}
        back = fine(await again(chat, if_exists, **fields))
        assert {name: back[name] for name in fields} == fields
        assert back["conversation_data"] == {"b": 2}
        assert back["generation"] == generation


@pytest.mark.parametrize("if_exists", ["restart", "resume"])
async def test_completed_and_archived_sessions_do_not_come_back(user: User, if_exists: str) -> None:
    chat = await user.chat()
    fine(await chat.put(status="completed"))
    before = await chat.get()
    refused(await again(chat, if_exists), 409, "session_not_active")
    assert await chat.get() == before
    fine(await chat.put(status="archived"))
    refused(await again(chat, if_exists), 409, "session_archived")
    assert (await chat.get())["status"] == "archived"


async def test_a_restart_drops_a_summary_of_nothing_too(user: User) -> None:
    chat = await user.chat()
    fine(await chat.put(session_summary="told before any message"))
    fine(await chat.end())
    assert fine(await again(chat, "restart"))["session_summary"] == ""


async def test_a_restarted_session_lines_up_from_its_new_beginning(user: User) -> None:
    chat = await user.chat()
    await chat.append("one")
    fine(await chat.end())
    fine(await again(chat, "restart"))
    turn = await chat.open(said("two"))
    assert [each["content"] for each in turn.opened["context"]["messages"]] == ["two"]
    assert turn.receipt["included"] == [[2, 2]]
    assert turn.receipt["left_out"] == []


async def test_of_many_creators_one_makes_the_session(user: User, crowd: httpx.AsyncClient) -> None:
    body = {"user_id": user.id, "session_id": "wanted"}
    answers = await asyncio.gather(*(crowd.post("/sessions", json=body) for _ in range(30)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 29
    for answer in answers:
        if answer.status_code == 409:
            refused(answer, 409, "session_exists")
    returned = await asyncio.gather(*(crowd.post("/sessions", json=body | {"if_exists": "return"}) for _ in range(10)))
    assert {answer.content for answer in returned} == {(await Chat(user, "wanted").call("GET")).content}


async def test_many_restarts_at_once_are_one(user: User, crowd: httpx.AsyncClient) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    await chat.append("x")
    fine(await chat.end())
    answers = await asyncio.gather(*(again(chat, "restart") for _ in range(20)))
    assert {fine(answer)["generation"] for answer in answers} == {2}
    assert {fine(answer)["version"] for answer in answers} == {(await chat.get())["version"]}
