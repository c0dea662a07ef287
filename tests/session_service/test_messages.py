"""Appending messages: what is stored, what comes back, and what a repeated message_id means."""

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.canonical import message_hash
from tests.session_service.calls import Chat, Db, Json, User, check_counters, fine, refused, said

ROLES = ("user", "assistant", "system", "tool_call", "tool_result", "tool")
TYPES = ("chat", "system", "tool_call", "tool_result", "notification")
TEXTS = [
    "x",
    " leading and trailing \t",
    "\r\nCRLF\r\nand LF\nand CR\r",
    "e\u0301 is not é, ﬁ is not fi, Å is not Å",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 \U0010ffff",
    "عربى \u202eRTL\u202c 中文，日本語、한국어",
    "\u200b\ufeff\u2028\u2029\u0085",
    "\x01\x1f\x7f\x80\x9f",
    "quote \" back \\ slash / \\u0000 \\ud800 %00 <script> '; DROP TABLE sessions; --",
    "\ufffd\ufffe\uffff",
    "x" * 100_000,
]
BLOCKS: list[list[Json]] = [
    [{"type": "text", "text": "a"}],
    [{"text": "keys in this order", "type": "text", "cache_control": {"ttl": "5m", "type": "ephemeral"}}],
    [{"type": "tool_use", "id": "t1", "name": "f", "input": {"z": 1, "a": [12345678901234567890, 1.0, 1e22, -0.0]}}],
    [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": " "}], "is_error": False}],
    [{"type": "thinking", "thinking": "", "signature": "s"}, {"type": "redacted_thinking", "data": "d"}],
    [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}],
    [{"type": "text", "text": "half", "incomplete": True}],
    [{"type": "no such type", "": {"": [[], {}, None]}}],
    [{"type": "text", "text": " \r\n"}, {"type": "text", "text": "e\u0301😀"}],
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("message_type", TYPES)
async def test_roles_and_types(user: User, role: str, message_type: str) -> None:
    chat = await user.chat()
    message = await chat.append("x", role, message_type=message_type)
    assert (message["role"], message["message_type"]) == (role, message_type)
    assert (await chat.messages())["messages"] == [message]


async def test_a_message(user: User) -> None:
    chat = await user.chat()
    sent = said("Hi", tokens_used=5, cost_usd=0.0001, metadata={"model": "m"}, message_id="m-1", native={"n": 1})
    message = await chat.append(**sent)
    session = await chat.get()
    assert message == {
        "message_id": "m-1",
        "session_id": chat.id,
        "user_id": user.id,
        "seq": 1,
        "role": "user",
        "content": "Hi",
        "content_blocks": None,
        "message_type": "chat",
        "metadata": {"model": "m"},
        "native": {"n": 1},
        "tokens_used": 5,
        "cost_usd": 0.0001,
        "created_at": session["last_activity"],
        "superseded_at": None,
    }
    assert (session["message_count"], session["total_tokens"], session["total_cost"]) == (1, 5, 0.0001)
    assert session["updated_at"] == session["last_activity"] > session["created_at"]
    assert fine(await chat.call("GET", "/messages/m-1")) == message


@pytest.mark.parametrize("text", TEXTS)
async def test_text_is_stored_exactly(user: User, text: str) -> None:
    chat = await user.chat()
    message = await chat.append(text)
    turn = await chat.open(said(text), said([{"type": "text", "text": text}]))
    stored = (await chat.messages())["messages"]
    assert [each["content"] for each in (message, *turn.opened["messages"], *stored)] == [text] * 6
    if text.strip():
        assert text in str(turn.opened["context"]["messages"][0]["content"][0]["text"])


@pytest.mark.parametrize("blocks", BLOCKS)
async def test_blocks_are_untouched(user: User, blocks: list[Json]) -> None:
    chat = await user.chat()
    message = await chat.append(blocks, "assistant")
    found = (await chat.messages())["messages"][0]
    for each in (message, found, fine(await chat.call("GET", f"/messages/{message['message_id']}"))):
        assert str(each["content_blocks"]) == str(blocks)  # types, and the order of keys, too
        assert each["content"] == "".join(block["text"] for block in blocks if block["type"] == "text")


async def test_the_text_of_blocks(user: User) -> None:
    chat = await user.chat()
    image = BLOCKS[5][0]
    text = [{"type": "text", "text": each} for each in ("one ", "two", "three")]
    assert (await chat.append(text[:2]))["content"] == "one two"
    found = (await chat.append([image, *text[:2], image, text[2]]))["content"]
    assert found.replace("\n", "") == "one twothree"
    assert (await chat.append([image]))["content"] == ""


# Any text that JSON can carry and Postgres can store, but for what is refused: NUL, and blank as a whole.
any_text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=60)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(any_text, below, max_size=4),
    max_leaves=12,
)
over_http = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@over_http
@given(
    text=any_text.filter(lambda text: text.strip()),
    native=any_json,
    more=st.dictionaries(any_text, any_json, max_size=3),
)
async def test_whatever_was_accepted_comes_back(user: User, text: str, native: Any, more: Json) -> None:
    chat = await user.chat()
    block = {**more, "type": "text", "text": text}
    first = await chat.append(text, native=native, message_id="a" + chat.id)
    second = await chat.append([block, {"type": "other", "x": native}], message_id="b" + chat.id)
    assert (await chat.messages())["messages"] == [first, second]
    assert (first["content"], second["content"]) == (text, text)
    assert repr(first["native"]) == repr(native)
    assert repr(second["content_blocks"]) == repr([block, {"type": "other", "x": native}])
    hashes = [message_hash("user", each).hex() for each in (text, [block, {"type": "other", "x": native}])]
    assert fine(await chat.call("POST", "/align", json={"hashes": hashes}))["matched"] == 2


# ── message_id ──────────────────────────────────────────────────────────────────────────────────

FULL = said(
    "Hi", tokens_used=5, cost_usd=0.5, metadata={"a": 1, "b": [0, None]}, native={"n": 1}, message_type="notification"
)
OTHER: list[Json] = [
    {"content": "Hi "},
    {"content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant"},
    {"message_type": "chat"},
    {"message_type": None},
    {"tokens_used": 6},
    {"tokens_used": None},
    {"cost_usd": 0.500001},
    {"metadata": {"a": 2, "b": [0, None]}},
    {"metadata": {"a": True, "b": [0, None]}},
    {"metadata": {"a": 1, "b": [False, None]}},
    {"metadata": None},
    {"native": {"n": 2}},
    {"native": {"n": True}},
    {"native": None},
]


async def test_the_same_message_id_and_body_give_the_stored_message(user: User, db: Db) -> None:
    chat = await user.chat()
    sent = FULL | {"message_id": "m"}
    message = await chat.append(**sent)
    await chat.append("between")
    session = await chat.get()
    for again in (sent, dict(reversed(sent.items())), sent | {"metadata": {"b": [0, None], "a": 1}}, sent | {"x": 1}):
        assert fine(await chat.post(**again)) == message
    assert await chat.get() == session
    assert (await check_counters(db, chat))["message_count"] == 2


@pytest.mark.parametrize("other", OTHER)
async def test_the_same_message_id_with_another_body(user: User, other: Json) -> None:
    chat = await user.chat()
    await chat.append(**FULL, message_id="m")
    before = await chat.get()
    answer = await chat.post(**FULL | other | {"message_id": "m"})
    refused(answer, 409, "message_exists", "Another message has this message_id")
    assert await chat.get() == before
    assert len(await chat.contents()) == 1


async def test_a_message_id_is_unique_within_the_user(user: User) -> None:
    chat, second = await user.chat(), await user.chat()
    await chat.append("x", message_id="m")
    refused(await second.post("x", message_id="m"), 409, "message_exists")
    refused(await second.turn(said("new"), said("x", message_id="m")), 409, "message_exists")
    refused(await second.turn(said("a", message_id="n"), said("b", message_id="n")), 409, "message_exists")
    session = await second.get()
    assert (session["message_count"], session["version"]) == (0, 1)
    turn = await second.open(said("new", message_id="o"))
    refused(await turn.finish(said("x", "assistant", message_id="m")), 409, "message_exists")
    assert (await turn.get())["status"] == "open"
    await turn.complete(said("x", "assistant", message_id="p"))


async def test_a_repeat_is_answered_whatever_became_of_the_session(user: User) -> None:
    chat = await user.chat()
    sent = said("x", message_id="m")
    message = await chat.append(**sent)
    turn = await chat.open(said("y"))
    assert fine(await chat.post(**sent)) == message
    await turn.complete()
    fine(await chat.end())
    assert fine(await chat.post(**sent)) == message
    refused(await chat.post(**sent | {"content": "y"}), 409, "message_exists")


async def test_a_repeat_of_a_superseded_message(user: User) -> None:
    chat = await user.chat()
    await chat.append("first")
    sent = said("x", message_id="m")
    message = await chat.append(**sent)
    await (await chat.open(said("instead"), rewind_to_seq=1)).complete()
    again = fine(await chat.post(**sent))
    assert again["superseded_at"] is not None
    assert again | {"superseded_at": None} == message
    assert await chat.contents() == ["first", "instead"]


async def test_the_same_message_sent_many_times_at_once_is_stored_once(
    user: User, crowd: httpx.AsyncClient, db: Db
) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    sent = said("x", message_id="m", tokens_used=3)
    answers = await asyncio.gather(*(chat.post(**sent) for _ in range(20)))
    assert len({str(fine(answer)) for answer in answers}) == 1
    assert (await check_counters(db, chat))["total_tokens"] == 3


async def test_of_different_messages_with_one_id_one_is_stored(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chats: list[Chat] = [(await user.chat()).of(user.at(crowd)) for _ in range(4)]
    sent = [chat.post(f"text {number}", message_id="m") for number in range(4) for chat in chats]
    answers = await asyncio.gather(*sent)
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 409}
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    counts = [(await check_counters(db, chat))["message_count"] for chat in chats]
    assert sum(counts) == 1
