"""Batch append: all or nothing, in order, with consecutive seqs."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.session_service.calls import (
    UUID7,
    Chat,
    Db,
    Json,
    User,
    check_counters,
    fine,
    invalid,
    refused,
    said,
    stored_rows,
    wait,
)


async def batch(chat: Chat, *messages: Json, **fields: Any) -> httpx.Response:
    """A batch, whatever comes of it."""
    return await chat.call("POST", "/messages/batch", json={"messages": list(messages), **fields})


BLOCKS = [{"type": "text", "text": "a", "z": 1, "y": {"b": 1, "a": 2}}, {"type": "tool_use", "id": "t", "name": "n"}]
FULL = said(
    BLOCKS,
    "assistant",
    message_type="tool_call",
    metadata={"k": [1, None]},
    native={"z": 1, "a": [1e-7]},
    tokens_used=7,
    cost_usd=0.000001,
)


async def test_a_batch(user: User, db: Db) -> None:
    chat = await user.chat(metadata={"old": 1})
    await chat.append("before")
    body = fine(await batch(chat, said("one"), FULL, said("three", "system", message_id="my id"), unknown=1))
    assert list(body) == ["messages", "session"]
    assert [each["seq"] for each in body["messages"]] == [2, 3, 4]
    assert body["messages"] == (await chat.messages(after_seq=1))["messages"]
    assert body["session"] == await check_counters(db, chat)
    assert body["session"]["metadata"] == {"old": 1}
    assert UUID7.fullmatch(body["messages"][0]["message_id"])
    second = body["messages"][1]
    assert {name: second[name] for name in FULL if name != "content"} == {
        k: v for k, v in FULL.items() if k != "content"
    }
    assert (second["content"], second["content_blocks"]) == ("a", BLOCKS)
    assert list(second["content_blocks"][0]["y"]) == ["b", "a"]
    assert body["messages"][2]["message_id"] == "my id"
    assert len({each["created_at"] for each in body["messages"]}) == 1
    assert body["session"]["last_activity"] == second["created_at"]


async def test_one_and_five_hundred_are_the_bounds(user: User, db: Db) -> None:
    chat = await user.chat()
    before = await stored_rows(db, user.id)
    many = [said(f"m{n}", cost_usd=0.000001, tokens_used=n) for n in range(501)]
    for messages in ([], many):
        assert "500" in invalid(await batch(chat, *messages), "body", "messages")
    bodies: list[Json] = [{}, {"messages": None}, {"messages": {}}, {"messages": "x"}]
    for missing in bodies:
        invalid(await chat.call("POST", "/messages/batch", json=missing), "body", "messages")
    assert await stored_rows(db, user.id) == before
    body = fine(await batch(chat, *many[:500]))
    assert [each["seq"] for each in body["messages"]] == list(range(1, 501))
    assert [each["content"] for each in body["messages"]] == [f"m{n}" for n in range(500)]
    fine(await batch(chat, said("one more")))
    session = await check_counters(db, chat)
    assert (session["message_count"], session["total_tokens"]) == (501, 499 * 250)


BAD: list[tuple[Json, str]] = [
    (said(" "), "content"),
    (said([]), "content"),
    (said("x", "robot"), "role"),
    ({"role": "user"}, "content"),
    (said("x", tokens_used=-1), "tokens_used"),
    (said("x", tokens_used=True), "tokens_used"),
    (said("x", cost_usd="1"), "cost_usd"),
    (said("x", cost_usd=1e-7), "cost_usd"),
    (said("x", metadata=[]), "metadata"),
    (said("x", metadata={"a": 2**53 + 1}), "metadata"),
    (said("x", message_id=""), "message_id"),
    (said("x", message_id="m" * 256), "message_id"),
    (said("x", message_type="other"), "message_type"),
    (said("x", native="n" * 2**20), "native"),
]


@pytest.mark.parametrize(("bad", "field"), BAD)
async def test_one_bad_message_spoils_all(user: User, db: Db, bad: Json, field: str) -> None:
    chat = await user.chat()
    before = await stored_rows(db, user.id)
    for place in (0, 3, 5):
        messages = [said(f"m{n}") for n in range(5)]
        messages.insert(place, bad)
        answer = await batch(chat, *messages, metadata={"new": 1}, create_session={"title": "x"})
        invalid(answer, "body", "messages", place, field)
    assert await stored_rows(db, user.id) == before
    assert (await chat.get())["metadata"] == {}


@pytest.mark.parametrize("field", ["metadata", "conversation_data", "create_session"])
async def test_bad_fields_beside_the_messages(user: User, db: Db, field: str) -> None:
    chat = await user.chat()
    before = await stored_rows(db, user.id)
    too_much: Any = {"metadata": 1} if field == "create_session" else {"a": "x" * 70_000}
    for bad in ("x", 1, [1], too_much):
        invalid(await batch(chat, said("x"), **{field: bad}), "body", field)
    assert await stored_rows(db, user.id) == before


async def test_a_message_id_that_is_taken_spoils_all(user: User, db: Db) -> None:
    chat, other = await user.chat(), await user.chat()
    await chat.append("here", message_id="here")
    await other.append("there", message_id="there")
    before = await stored_rows(db, user.id)
    for messages in (
        [said("a"), said("b", message_id="here")],
        [said("b", message_id="there"), said("a")],
        [said("a", message_id="new"), said("b", message_id="new")],
        [said("a", message_id="new"), said("a", message_id="new")],
    ):
        answer = await batch(chat, *messages, metadata={"n": 1})
        refused(answer, 409, "message_exists", "Another message has this message_id")
    assert await stored_rows(db, user.id) == before
    stranger = await user.other().chat()
    fine(await batch(stranger, said("a", message_id="here"), said("b", message_id="there")))
    fine(await batch(chat, said("a", message_id="new")))


async def test_data_is_replaced_with_the_messages(user: User) -> None:
    chat = await user.chat(metadata={"a": 1, "b": 2}, conversation_data={"c": 3})
    body = fine(await batch(chat, said("x"), metadata={"b": 3}))
    assert (body["session"]["metadata"], body["session"]["conversation_data"]) == ({"b": 3}, {"c": 3})
    body = fine(await batch(chat, said("y"), metadata={}, conversation_data={"d": 4}))
    assert (body["session"]["metadata"], body["session"]["conversation_data"]) == ({}, {"d": 4})
    assert body["session"] == await chat.get()
    body = fine(await batch(chat, said("z"), metadata=None, conversation_data=None, create_session=None))
    assert (body["session"]["metadata"], body["session"]["conversation_data"]) == ({}, {"d": 4})


# ── which sessions take a batch ─────────────────────────────────────────────────────────────────


async def test_sessions_that_take_none(user: User, db: Db) -> None:
    nowhere = Chat(user, "nowhere")
    refused(await batch(nowhere, said("x")), 404, "session_not_found")
    strange = (await user.other().chat()).of(user)
    refused(await batch(strange, said("x")), 404, "session_not_found")
    for steps in (["completed"], ["completed", "archived"], ["ended"]):
        chat = await user.chat()
        for step in steps:
            fine(await chat.put(status=step))
        before = await stored_rows(db, user.id)
        for create in (None, {}, {"if_exists": "return"}):
            answer = await batch(chat, said("x"), metadata={"n": 1}, create_session=create)
            refused(answer, 409, "session_not_active")
        assert await stored_rows(db, user.id) == before
    expired = await user.chat(idle_timeout_seconds=60)
    await wait(db, expired, 61)
    refused(await batch(expired, said("x")), 409, "session_not_active")
    assert (await check_counters(db, expired))["ended_reason"] == "expired"


async def test_an_open_turn_keeps_batches_out(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("q"), lease_seconds=100)
    before = await stored_rows(db, user.id)
    for create in (None, {"if_exists": "restart"}):
        body = refused(await batch(chat, said("x"), create_session=create), 409, "turn_in_progress")
        assert body["turn_id"] == turn.id
    assert await stored_rows(db, user.id) == before
    await wait(db, chat, 101)
    fine(await batch(chat, said("x")))
    assert (await turn.get())["status"] == "expired"
    assert await chat.contents() == ["q", "x"]
    await check_counters(db, chat)


async def test_create_session(user: User, db: Db) -> None:
    chat = Chat(user, "made here")
    options = {"title": "T", "metadata": {"a": 1}, "conversation_data": {"b": 2}, "idle_timeout_seconds": 100}
    body = fine(await batch(chat, said("x"), create_session=options | {"user_id": user.id, "session_id": chat.id}))
    assert options.items() <= body["session"].items()
    assert body["session"] == await check_counters(db, chat)
    refused(await batch(chat, said("y"), create_session={"if_exists": "error"}), 409, "session_exists")
    again = fine(await batch(chat, said("y"), create_session={"title": "ignored"}))
    assert (again["session"]["title"], again["session"]["message_count"]) == ("T", 2)
    for field in ("user_id", "session_id"):
        invalid(await batch(chat, said("z"), create_session={field: "other"}), "body", "create_session", field)
    both = Chat(user, "data twice")
    body = fine(await batch(both, said("x"), create_session={"metadata": {"a": 1}}, metadata={"b": 2}))
    assert body["session"]["metadata"] == {"b": 2}
    assert await chat.contents() == ["x", "y"]


async def test_a_failed_batch_leaves_no_session_behind(user: User, db: Db) -> None:
    await (await user.chat()).append("x", message_id="taken")
    before = await stored_rows(db, user.id)
    chat = Chat(user, "never made")
    refused(await batch(chat, said("x", message_id="taken"), create_session={}), 409, "message_exists")
    refused(await chat.call("GET"), 404, "session_not_found")
    assert await stored_rows(db, user.id) == before


@pytest.mark.parametrize(("if_exists", "visible"), [("resume", ["old", "new"]), ("restart", ["new"])])
async def test_an_ended_session_comes_back(user: User, db: Db, if_exists: str, visible: list[str]) -> None:
    chat = await user.chat()
    await chat.append("old", tokens_used=5)
    fine(await chat.end())
    body = fine(await batch(chat, said("new", tokens_used=7), create_session={"if_exists": if_exists}))
    assert (body["session"]["status"], body["session"]["generation"]) == ("active", 2)
    assert (body["messages"][0]["seq"], body["session"]["total_tokens"]) == (2, 12)
    assert await chat.contents() == visible
    assert body["session"] == await check_counters(db, chat)


# ── many at once ────────────────────────────────────────────────────────────────────────────────


async def test_parallel_batches_and_appends_keep_their_order(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = (await user.chat()).of(user.at(crowd))

    async def in_batches(name: int) -> list[list[int]]:
        found = []
        for number in range(4):
            messages = [said(f"{name}/{number}/{n}", tokens_used=1, cost_usd=0.01) for n in range(1 + name % 12)]
            body = fine(await batch(chat, *messages))
            seqs = [each["seq"] for each in body["messages"]]
            assert seqs == list(range(seqs[0], seqs[0] + len(messages)))
            assert body["session"]["message_count"] >= seqs[-1]
            found.append(seqs)
        return found

    async def alone() -> list[list[int]]:
        return [[(await chat.append("alone"))["seq"]] for _ in range(10)]

    many = await asyncio.gather(*(in_batches(n) for n in range(20)), *(alone() for _ in range(5)))
    seqs = sorted(seq for found in many for part in found for seq in part)
    assert seqs == list(range(1, len(seqs) + 1))
    assert (await check_counters(db, chat))["message_count"] == len(seqs)
    listed = {each["seq"]: each["content"] for each in (await chat.messages(page_size=1000))["messages"]}
    for name, found in enumerate(many[:20]):
        for number, part in enumerate(found):
            assert [listed[seq] for seq in part] == [f"{name}/{number}/{n}" for n in range(len(part))]


async def test_thirty_batches_make_one_session(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = Chat(user.at(crowd), "wanted by all")
    answers = await asyncio.gather(
        *(batch(chat, said(f"{n}a"), said(f"{n}b"), create_session={"title": str(n)}) for n in range(30))
    )
    bodies = [fine(answer) for answer in answers]
    assert sorted(each["messages"][0]["seq"] for each in bodies) == list(range(1, 60, 2))
    assert len({each["session"]["title"] for each in bodies}) == 1
    assert (await check_counters(db, chat))["message_count"] == 60
    assert (await user.sessions())["total"] == 1


async def test_one_of_many_batches_with_one_message_id(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    others = [(await user.chat()).of(user.at(crowd)) for _ in range(3)]
    tries = [batch(each, said(f"{n}"), said("x", message_id="wanted")) for n in range(5) for each in (chat, *others)]
    answers = await asyncio.gather(*tries)
    assert [answer.status_code for answer in answers].count(200) == 1
    for answer in answers:
        if answer.status_code != 200:
            refused(answer, 409, "message_exists")
    sessions = [await check_counters(db, each) for each in (chat, *others)]
    assert sorted(each["message_count"] for each in sessions) == [0, 0, 0, 2]
