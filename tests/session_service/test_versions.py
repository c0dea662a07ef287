"""ETag and If-Match: every write moves a session's version, and a precondition that fails changes nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.session_service.calls import (
    Chat,
    Db,
    Json,
    User,
    fine,
    invalid,
    new_user_id,
    refused,
    said,
    stored_rows,
    wait,
)
from tests.session_service.creations import exported

ANSWER = said("an answer", "assistant")


def tagged(response: httpx.Response) -> Json:
    """A session whose version stands in the ETag."""
    session = fine(response)
    assert response.headers["etag"] == f'"{session["version"]}"'
    return session


async def version_of(chat: Chat) -> int:
    version: int = tagged(await chat.call("GET"))["version"]
    return version


# ── every write moves the version ───────────────────────────────────────────────────────────────


async def _append(chat: Chat) -> None:
    await chat.append("x")


async def _batch(chat: Chat) -> None:
    body = fine(await chat.call("POST", "/messages/batch", json={"messages": [said("x"), said("y")]}))
    assert body["session"]["version"] == await version_of(chat)


async def _batch_with_data(chat: Chat) -> None:
    body = {"messages": [said("x")], "metadata": {"n": 1}, "conversation_data": {"n": 2}}
    found = fine(await chat.call("POST", "/messages/batch", json=body))
    assert found["session"] == tagged(await chat.call("GET"))


def _put(**fields: Any) -> Callable[[Chat], Awaitable[None]]:
    async def put(chat: Chat) -> None:
        assert tagged(await chat.put(**fields))["version"] == await version_of(chat)

    return put


async def _end(chat: Chat) -> None:
    fine(await chat.end())


async def _rewind(chat: Chat) -> None:
    assert tagged(await chat.call("POST", "/rewind", json={"to_seq": 1}))["version"] == await version_of(chat)


async def _open(chat: Chat) -> None:
    turn = await chat.open(said("q"))
    assert turn.opened["session"]["version"] == await version_of(chat)


async def _open_on_nothing(chat: Chat) -> None:
    await chat.open()


async def _open_rewinding(chat: Chat) -> None:
    await chat.open(said("q"), rewind_to_seq=0)


async def _remember(chat: Chat) -> None:
    await chat.remember("m")


WRITES: dict[str, Callable[[Chat], Awaitable[None]]] = {
    "append": _append,
    "batch": _batch,
    "batch with data": _batch_with_data,
    "put title": _put(title="new"),
    "put metadata": _put(metadata={"a": 2}),
    "put conversation_data": _put(conversation_data={"a": 2}),
    "put summary": _put(session_summary="s"),
    "put summary of less": _put(session_summary="", summary_to_seq=1),
    "put status": _put(status="completed"),
    "put idle timeout": _put(idle_timeout_seconds=1000),
    "put everything": _put(title="n", metadata={"n": 1}, session_summary="n", status="ended"),
    "end": _end,
    "rewind": _rewind,
    "open": _open,
    "open without messages": _open_on_nothing,
    "open rewinding": _open_rewinding,
    "memory": _remember,
}


async def a_chat(user: User) -> Chat:
    """A session with two messages."""
    chat = await user.chat(title="T", metadata={"a": 1})
    await chat.append("one")
    await chat.append("two")
    return chat


@pytest.mark.parametrize("write", WRITES)
async def test_every_write_moves_the_version(user: User, write: str) -> None:
    chat = await a_chat(user)
    before = await version_of(chat)
    await WRITES[write](chat)
    assert await version_of(chat) > before


@pytest.mark.parametrize("status", ["completed", "interrupted", "failed", "refused"])
async def test_writes_of_a_turn_and_of_a_memory(user: User, status: str) -> None:
    chat = await a_chat(user)
    versions = [await version_of(chat)]
    turn = await chat.open(said("q"))
    versions.append(await version_of(chat))
    fine(await turn.renew())
    versions.append(await version_of(chat))
    done = await turn.complete(ANSWER, status=status)
    versions.append(await version_of(chat))
    assert done["session"]["version"] == versions[-1]
    memory = await chat.remember("m")
    versions.append(await version_of(chat))
    path = f"/memories/{memory['memory_id']}"
    fine(await chat.call("PUT", path, json={"content": "n"}))
    versions.append(await version_of(chat))
    fine(await chat.call("DELETE", path))
    versions.append(await version_of(chat))
    fine(await chat.end())
    versions.append(await version_of(chat))
    for if_exists in ("resume", "restart"):
        again = {"user_id": user.id, "session_id": chat.id, "if_exists": if_exists}
        assert tagged(await user.http.post("/sessions", json=again))["version"] == await version_of(chat)
        versions.append(await version_of(chat))
        fine(await chat.end())
        versions.append(await version_of(chat))
    assert versions == sorted(set(versions))


async def test_what_writes_nothing_moves_nothing(user: User, db: Db) -> None:
    chat = await a_chat(user)
    message = await chat.append("three", message_id=f"m-{chat.id}")
    turn = await chat.open(said("q"))
    await turn.complete(ANSWER)
    before = await version_of(chat)
    for path in ("", "/summary", "/messages", "/context", "/turns", "/memories", "/export"):
        assert (await chat.call("GET", path)).status_code == 200
    fine(await chat.call("POST", "/align", json={"hashes": []}))
    assert await chat.append("three", message_id=f"m-{chat.id}") == message
    fine(await chat.put(title="T"))
    await turn.complete(ANSWER)
    refused(await turn.finish(said("other", "assistant")), 409, "turn_closed")
    refused(await turn.renew(), 409, "turn_closed")
    invalid(await chat.call("POST", "/rewind", json={"to_seq": 99}), "body", "to_seq")
    fine(await chat.call("POST", "/fork", json={}))
    again = {"user_id": user.id, "session_id": chat.id, "if_exists": "return"}
    assert tagged(await user.http.post("/sessions", json=again))["version"] == before
    refused(await user.http.post("/sessions", json=again | {"if_exists": "error"}), 409, "session_exists")
    assert await version_of(chat) == before


async def test_new_sessions_bring_their_etag(user: User) -> None:
    chat = await a_chat(user)
    tagged(await user.http.post("/sessions", json={"user_id": user.id}))
    tagged(await chat.call("POST", "/fork", json={}))
    params = user.other().params
    tagged(await user.http.post("/sessions/import", params=params, content=await exported(chat)))


# ── If-Match ────────────────────────────────────────────────────────────────────────────────────

CONDITIONAL: dict[str, tuple[str, str, Json | None]] = {
    "put": ("PUT", "", {"title": "new"}),
    "put of nothing": ("PUT", "", {}),
    "delete": ("DELETE", "", None),
    "rewind": ("POST", "/rewind", {"to_seq": 1}),
    "batch": ("POST", "/messages/batch", {"messages": [said("x"), said("y")], "metadata": {"n": 1}}),
    "batch with session": ("POST", "/messages/batch", {"messages": [said("x")], "create_session": {"title": "x"}}),
    "turn": ("POST", "/turns", {"messages": [said("x")]}),
    "turn rewinding": ("POST", "/turns", {"messages": [said("x")], "rewind_to_seq": 1, "wait_seconds": 5}),
    "turn with session": ("POST", "/turns", {"messages": [said("x")], "create_session": {"if_exists": "restart"}}),
}


async def conditional(chat: Chat, call: str, if_match: str | bytes) -> httpx.Response:
    method, path, body = CONDITIONAL[call]
    options = {} if body is None else {"json": body}
    return await chat.call(method, path, headers=[(b"If-Match", if_match)], **options)


@pytest.mark.parametrize("call", CONDITIONAL)
async def test_if_match(user: User, db: Db, call: str) -> None:
    chat = await a_chat(user)
    version = await version_of(chat)
    before, rows = await chat.get(), await stored_rows(db, user.id)
    for wrong in (version - 1, version + 1, 0, 10**17):
        body = refused(await conditional(chat, call, f'"{wrong}"'), 412, "version_mismatch")
        assert list(body) == ["detail", "code", "version"]
        assert body["version"] == version
    assert (await chat.get(), await stored_rows(db, user.id)) == (before, rows)
    fine(await conditional(chat, call, f'"{version}"'))
    if call != "put of nothing":
        refused(await conditional(chat, call, f'"{version}"'), 412, "version_mismatch")
        assert await version_of(chat) > version


@pytest.mark.parametrize("call", CONDITIONAL)
@pytest.mark.parametrize("form", ["*", "{version}"])
async def test_if_match_in_other_forms(user: User, call: str, form: str) -> None:
    chat = await a_chat(user)
    fine(await conditional(chat, call, form.format(version=await version_of(chat))))


@pytest.mark.parametrize("call", CONDITIONAL)
async def test_if_match_that_is_none(user: User, db: Db, call: str) -> None:
    chat = await a_chat(user)
    version, rows = await version_of(chat), await stored_rows(db, user.id)
    forms = ("", "x", '"x"', '""', "-1", '"-1"', "1.0", '"*"', "* *", f'W/"{version}"', f'"{version}", "9"')
    for garbage in (*forms, f'"{version}', "0x3", "٣".encode(), "9" * 30, b'"\xff"', f'" {version}"'):
        invalid(await conditional(chat, call, garbage), "header", "if-match")
    assert (await version_of(chat), await stored_rows(db, user.id)) == (version, rows)


@pytest.mark.parametrize("call", CONDITIONAL)
@pytest.mark.parametrize("if_match", ["*", '"1"'])
async def test_if_match_on_a_session_that_is_not_there(user: User, db: Db, call: str, if_match: str) -> None:
    answer = await conditional(Chat(user, "nowhere"), call, if_match)
    if "with session" in call:
        assert refused(answer, 412, "version_mismatch")["version"] is None
    else:
        refused(answer, 404, "session_not_found")
    assert await stored_rows(db, user.id) == 0


@pytest.mark.parametrize("call", CONDITIONAL)
async def test_the_version_is_looked_at_before_the_status(user: User, call: str) -> None:
    chat = await a_chat(user)
    fine(await chat.end())
    body = refused(await conditional(chat, call, '"1"'), 412, "version_mismatch")
    assert body["version"] == await version_of(chat)


@pytest.mark.parametrize("call", ["put", "put of nothing", "delete", "turn with session"])
async def test_the_version_that_an_expired_session_shows_can_be_matched(user: User, db: Db, call: str) -> None:
    chat = await user.chat(idle_timeout_seconds=60)
    await chat.append("x")
    await wait(db, chat, 61)
    shown = tagged(await chat.call("GET"))
    assert (shown["status"], shown["ended_reason"]) == ("ended", "expired")
    assert refused(await conditional(chat, call, '"1"'), 412, "version_mismatch")["version"] >= shown["version"]
    fine(await conditional(chat, call, f'"{await version_of(chat)}"'))


async def test_the_version_after_a_lease_ran_out_can_be_matched(user: User, db: Db) -> None:
    for call in ("rewind", "batch", "turn", "turn rewinding"):
        chat = await a_chat(user)
        turn = await chat.open(said("q"), lease_seconds=5)
        await wait(db, chat, 6)
        fine(await conditional(chat, call, f'"{await version_of(chat)}"'))
        assert (await turn.get())["status"] == "expired"


async def test_plain_appends_take_no_notice(user: User) -> None:
    chat = await a_chat(user)
    for if_match in ('"1"', "garbage"):
        fine(await chat.call("POST", "/messages", json=said("x"), headers={"If-Match": if_match}))


@pytest.mark.parametrize("call", ["put", "delete", "rewind", "batch", "turn", "turn rewinding"])
async def test_of_twenty_with_one_version_one_writes(user: User, crowd: httpx.AsyncClient, db: Db, call: str) -> None:
    chat = (await a_chat(user)).of(user.at(crowd))
    version = await version_of(chat)
    answers = await asyncio.gather(*(conditional(chat, call, f'"{version}"') for _ in range(20)))
    assert [answer.status_code for answer in answers].count(200) == 1
    current = await version_of(chat)
    for answer in answers:
        if answer.status_code != 200:
            assert refused(answer, 412, "version_mismatch")["version"] == current


async def test_counting_up_by_if_match_loses_nothing(crowd: httpx.AsyncClient) -> None:
    """Read, change, write under If-Match, again on 412: ten clients count to fifty together."""
    chat = await User(crowd, new_user_id()).chat(metadata={"n": 0})

    async def count_up() -> None:
        done = 0
        while done < 5:
            seen = tagged(await chat.call("GET"))
            change = {"metadata": {"n": seen["metadata"]["n"] + 1}}
            answer = await chat.call("PUT", json=change, headers={"If-Match": f'"{seen["version"]}"'})
            done += answer.status_code == 200
            assert answer.status_code in {200, 412}, answer.text

    await asyncio.gather(*(count_up() for _ in range(10)))
    assert (await chat.get())["metadata"] == {"n": 50}
