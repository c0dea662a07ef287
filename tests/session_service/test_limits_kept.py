"""What is just within the limits is stored, and comes back as it was sent."""

from typing import Any

import pytest
from pydantic_core import from_json

from tests.session_service.calls import Chat, Db, Json, User, check_counters, fine, invalid, said
from tests.session_service.creations import exported
from tests.session_service.exports import taken_back
from tests.session_service.test_limits import BIG, KIB, OBJECTS, Loc, Room, at, furnished, nested, object_of

GOOD_OBJECTS: dict[str, Any] = {
    "empty": {},
    "2^53": {"a": BIG, "b": [-BIG]},
    "depth 32": nested(32),
    "64 KiB": object_of(64 * KIB),
    "64 KiB of 😀": object_of(64 * KIB, "😀"),
    "numbers": {"a": [0, -1, 0.1, 1.5e-7, 123456789.125, True, False, None]},
    "odd keys": {"": 1, " ": 2, "a.b": {"$": None}, "é": "é", "\u0301": 1, "é\u0301": "\ufffe\uffff"},
    "odd texts": {"a": '\u0001\u001f\u007f\\ " / \r\n', "b": "\ufeff\u200b\u202e"},
}


async def sent_and_found(room: Room, route: str, place: Loc, value: Any) -> Any:
    """What the answer, and then a reading call, give for what was sent at this place."""
    if route in {"append", "open"}:
        await room.turn.complete()
    answer: Any = fine(await room.send(route, at(*place)(value)))
    chat = room.chat
    if route == "create":
        chat = Chat(chat.user, answer["session_id"])
    again: Any
    match route:
        case "create" | "update":
            again = await chat.get()
        case "complete" if len(place) == 1:
            answer, again = answer["turn"], await room.turn.get()
        case "append":
            again = fine(await chat.call("GET", f"/messages/{answer['message_id']}"))
        case "open" | "complete":
            again = await chat.messages(after_seq=answer["messages"][0]["seq"] - 1)
        case _:
            again = fine(await chat.call("GET", "/memory"))
    for step in place:
        answer, again = answer[step], again[step]
    return answer, again


@pytest.mark.parametrize(("route", "place"), [each for each in OBJECTS if each[1][0] != "create_session"])
async def test_objects_within_the_limits_are_kept(user: User, route: str, place: Loc) -> None:
    room = await furnished(user)
    for name, value in GOOD_OBJECTS.items():
        if route in {"append", "open", "complete"}:  # each uses the open turn up
            room = await furnished(user)
        found, again = await sent_and_found(room, route, place, value)
        assert found == value, name
        assert again == value, name


async def test_objects_for_a_session_made_by_a_turn_are_kept(user: User) -> None:
    for number, value in enumerate(GOOD_OBJECTS.values()):
        chat = Chat(user, f"made-{number}")
        made = {"metadata": value, "conversation_data": value, "title": "x" * 500, "idle_timeout_seconds": 31_536_000}
        turn = await chat.open(said("x"), create_session=made)
        session = await chat.get()
        assert {name: session[name] for name in made} == made
        assert turn.opened["session"] == session


@pytest.mark.parametrize("number", [1e15, 1.5e300, 1e-300, 1e22, 1e23, 1.7976931348623157e308, 5e-324, -0.5])
async def test_floats_in_metadata_come_back_as_the_same_numbers(user: User, number: float) -> None:
    """Or are refused; but not stored as something that is refused when it is sent again."""
    answer = await user.http.post("/sessions", json={"user_id": user.id, "metadata": {"n": number}})
    if answer.status_code == 400 and abs(number) > BIG:
        return
    chat = Chat(user, fine(answer)["session_id"])
    found = (await chat.get())["metadata"]
    assert found == {"n": number}
    version = (await chat.get())["version"]
    assert fine(await chat.put(metadata=found))["version"] == version
    sent = said("x", message_id=f"m-{number}", metadata={"n": number})
    assert fine(await chat.post(**sent)) == fine(await chat.post(**sent))


@pytest.mark.parametrize("title", ["", " ", "x" * 500, "😀" * 500, "e\u0301" * 250, " a\r\nb\t", "\u200b\ufeff"])
async def test_titles_are_kept_exactly(user: User, title: str) -> None:
    made = await user.create(title=title)
    assert made["title"] == title
    assert fine(await Chat(user, made["session_id"]).put(title=title)) == made


async def test_figures_at_their_limits(user: User, db: Db) -> None:
    chat = await user.chat()
    costs = [0, 0.0, 0.000001, 999_999.999999, 0.1, 0.2, 1e-6, 3, 12.345678, 1e5]
    for cost in costs:
        message = await chat.append("x", tokens_used=2**31 - 1, cost_usd=cost)
        assert message["cost_usd"] == cost
        assert message["tokens_used"] == 2**31 - 1
        assert fine(await chat.call("GET", f"/messages/{message['message_id']}")) == message
    session = await check_counters(db, chat)
    assert session["total_tokens"] == len(costs) * (2**31 - 1)
    assert session["total_cost"] == 1_100_015.645679


async def test_costs_are_added_exactly(user: User) -> None:
    chat = await user.chat()
    for _ in range(10):
        await chat.append("x", cost_usd=0.1)
    assert (await chat.get())["total_cost"] == 1.0
    await chat.append("x", cost_usd=0.000001)
    assert (await chat.get())["total_cost"] == 1.000001
    assert b'"total_cost":1.000001,' in (await chat.call("GET")).content


@pytest.mark.parametrize("seconds", [1, 31_536_000])
async def test_idle_timeouts_at_their_limits(user: User, seconds: int) -> None:
    assert (await user.create(idle_timeout_seconds=seconds))["idle_timeout_seconds"] == seconds


@pytest.mark.parametrize("message_id", ["x", " ", "/", "a/b", "../x", "x" * 255, "é" * 255, "?a=b#c%20", "a b", "%"])
async def test_message_ids_of_the_callers_own(user: User, message_id: str) -> None:
    chat = await user.chat()
    message = await chat.append("x", message_id=message_id)
    assert message["message_id"] == message_id
    quoted = "".join(f"%{byte:02X}" for byte in message_id.encode())
    assert fine(await chat.call("GET", f"/messages/{quoted}")) == message


@pytest.mark.parametrize(
    "session_id",
    [
        "x",
        "x" * 255,
        "é" * 255,
        "😀",
        "a b",
        "a:b",
        "...",
        ".a",
        "Stats",
        "stats2",
        "turns",
        "%2F",
        "a%b",
        "a?b#c",
        "\ufeff",
    ],
)
async def test_session_and_user_ids_of_the_callers_own(user: User, session_id: str) -> None:
    quoted = "".join(f"%{byte:02X}" for byte in session_id.encode())
    someone = User(user.http, f"{session_id[:200]}{user.id}")
    made = await someone.create(session_id=session_id)
    assert (made["user_id"], made["session_id"]) == (someone.id, session_id)
    chat = Chat(someone, quoted)
    message = await chat.append("x")
    assert (message["user_id"], message["session_id"]) == (someone.id, session_id)
    assert (await chat.get())["message_count"] == 1
    path = "".join(f"%{byte:02X}" for byte in someone.id.encode())
    assert fine(await user.http.get(f"/users/{path}/sessions"))["total"] == 1
    assert fine(await chat.end()) == {"message": "Session ended successfully"}


async def test_a_turn_of_ten_thousand_messages(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(*[said(f"m{number}") for number in range(10_000)], context={"max_messages": 2})
    assert [each["seq"] for each in turn.opened["messages"]] == list(range(1, 10_001))
    assert turn.opened["messages"][9_999]["content"] == "m9999"
    assert (await check_counters(db, chat))["message_count"] == 10_000


@pytest.mark.parametrize(
    "native",
    [
        None, False, True, 0, "", "x", [], {}, [[]], [1, 2, 3], [[1, 2], [3]], [None], {"z": 1, "a": {"y": [], "b": 0}},
        12345678901234567890123456789, -(2**63), 2**64, 1.5, 1e300, "\u2028", {"": {"": ""}},
    ],
)  # fmt: skip
async def test_native_is_untouched(user: User, native: Any) -> None:
    chat = await user.chat()
    message = await chat.append("x", native=native)
    found = await chat.call("GET", f"/messages/{message['message_id']}")
    for each in (message, fine(found)):
        assert each["native"] == native
        assert type(each["native"]) is type(native)
    if isinstance(native, dict):
        assert str(found.json()["native"]) == str(native)  # the order of keys too
    turn = await chat.open(said("y", native=native), said("z"), said("w", native=[native]))
    assert [each["native"] for each in turn.opened["messages"]] == [native, None, [native]]
    listed = (await chat.messages(after_seq=1))["messages"]
    assert listed == turn.opened["messages"]


async def test_native_of_exactly_one_mebibyte(user: User) -> None:
    chat = await user.chat()
    for native in ("x" * (2**20 - 2), ["😀" * (2**18 - 2) + "xxxx"]):
        assert (await chat.append("x", native=native))["native"] == native


def levels(number: int) -> Any:
    value: Any = "x"
    for _ in range(number):
        value = [value]
    return value


async def test_what_is_nested_as_deep_as_can_be_is_given_back_by_every_call(user: User) -> None:
    """A body has at most 180 levels; answers add some, and what they are read with often takes 200."""
    chat = await user.chat()
    block = {"type": "document", "source": {"type": "text", "data": levels(175)}}
    for native, content in ((levels(180), "x"), (None, [{"type": "document", "source": {"data": levels(177)}}])):
        name = "content" if native is None else "native"
        invalid(await chat.post(content, native=native), "body", name)
    stored = await chat.append([block], native=levels(179))
    assert (stored["content_blocks"], stored["native"]) == ([block], levels(179))
    key = {"Idempotency-Key": "deep"}
    bodies: dict[str, Json] = {"/turns": {"messages": []}, "/fork": {}}
    for path, body in bodies.items():
        first, again = [await chat.call("POST", path, json=body, headers=key) for _ in range(2)]
        assert fine(again) == fine(first)
        assert from_json(first.content) == first.json()
    listed = await chat.call("GET", "/messages")
    assert from_json(listed.content)["messages"] == [stored]
    there = user.other()
    await taken_back(there, await exported(chat))
