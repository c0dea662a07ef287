"""Every limit of the contract, one row a case: the answer names the field, and nothing was stored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx
import pytest

from tests.session_service.calls import Chat, Db, Json, Turn, User, invalid, said, stored_rows

KIB = 1024
BIG = 2**53
Loc = tuple[str | int, ...]
Make: TypeAlias = Callable[[Any], Json]


@dataclass(frozen=True)
class Room:
    """A user with a session that has a message, a memory and an open turn: something of everything."""

    chat: Chat
    turn: Turn
    memory_id: str

    async def send(self, route: str, fields: Json) -> httpx.Response:
        """A valid call of this route but for what `fields` put into its body."""
        chat, user = self.chat, self.chat.user
        match route:
            case "create":
                return await user.http.post("/sessions", json={"user_id": user.id, **fields})
            case "update":
                return await chat.put(**fields)
            case "append":
                return await chat.call("POST", "/messages", json=said("x") | fields)
            case "open":
                return await chat.call("POST", "/turns", json={"messages": [said("x")], **fields})
            case "renew" | "complete":
                status = {"status": "completed"} if route == "complete" else {}
                body = {"lease_token": self.turn.token, **status, **fields}
                return await chat.call("POST", f"/turns/{self.turn.id}/{route}", json=body)
            case "align":
                return await chat.call("POST", "/align", json=fields)
            case "remember":
                return await chat.call("POST", "/memory", json={"memory_type": "custom", "content": "x", **fields})
            case _:
                return await chat.call("PUT", f"/memories/{self.memory_id}", json=fields)


async def furnished(user: User) -> Room:
    chat = await user.chat()
    await chat.append("first")
    memory = await chat.remember("x")
    return Room(chat, await chat.open(said("second")), memory["memory_id"])


@pytest.fixture
async def room(user: User) -> Room:
    return await furnished(user)


def nested(depth: int) -> Json:
    """An object of this depth: objects and lists by turns."""
    value: Any = {} if depth % 2 else []
    for level in range(depth - 1, 0, -1):
        value = {"a": value} if level % 2 else [value]
    assert isinstance(value, dict)
    return value


def object_of(size_bytes: int, filler: str = "x") -> Json:
    """An object whose compact UTF-8 JSON has this size."""
    room_left = size_bytes - len('{"a":""}')
    count, rest = divmod(room_left, len(filler.encode()))
    return {"a": filler * count + "y" * rest}


def at(*path: str | int) -> Make:
    """Puts a value at a place in a body; a number stands for a list of one message."""

    def make(value: Any) -> Json:
        for step in reversed(path):
            value = (
                [value if isinstance(value, dict) and "role" in value else said("x") | value]
                if step == 0
                else {step: value}
            )
        found: Json = value
        return found

    return make


BAD_OBJECTS: dict[str, Any] = {
    "list": [],
    "text": "{}",
    "number": 1,
    "bool": True,
    "integer beyond 2^53": {"a": BIG + 1},
    "integer beyond -2^53": {"a": {"b": [1, -BIG - 1]}},
    "65 bits": {"a": 2**65},
    "depth 33": nested(33),
    "64 KiB and 1": object_of(64 * KIB + 1),
    "64 KiB and 1 of é": object_of(64 * KIB + 1, "é"),
    "64 KiB by escapes": {"a": "\n" * (32 * KIB - 3)},
    "NUL": {"a": "\0"},
    "NUL deep down": {"a": [{"b": [["x\0"]]}]},
}
OBJECTS: list[tuple[str, Loc]] = [
    ("create", ("metadata",)),
    ("create", ("conversation_data",)),
    ("update", ("metadata",)),
    ("update", ("conversation_data",)),
    ("append", ("metadata",)),
    ("open", ("messages", 0, "metadata")),
    ("open", ("create_session", "metadata")),
    ("open", ("create_session", "conversation_data")),
    ("complete", ("messages", 0, "metadata")),
    ("complete", ("usage",)),
    ("complete", ("upstream",)),
    ("complete", ("error",)),
    ("remember", ("metadata",)),
    ("change memory", ("metadata",)),
]
NOT_INTEGERS: dict[str, Any] = {"bool": True, "float": 5.0, "text": "5", "list": [5], "huge": 10**30}
NOT_TEXTS: dict[str, Any] = {"number": 1, "bool": True, "list": ["x"], "object": {"a": "x"}}
BAD_COSTS: dict[str, Any] = {
    "text": "0.1",
    "bool": True,
    "negative": -0.000001,
    "negative whole": -1,
    "seven decimals": 0.0000001,
    "seven decimals and more": 1.2345678,
    "too much": 1_000_000,
    "just too much": 999_999.9999995,
    "huge": 10**400,
    "list": [0.1],
}
BAD_CONTENTS: dict[str, Any] = {
    "empty": "",
    "blank": "  \t\r\n ",
    "ideographic space": "\u3000",
    "no-break and line separators": "\u00a0\u2003\u2028\u2029\u0085\u205f",
    "no blocks": [],
    "number": 1,
    "bool": True,
    "object": {"type": "text", "text": "x"},
    "list of texts": ["x"],
    "list of null": [None],
    "block without type": [{"text": "x"}],
    "block of a type that is no text": [{"type": 1, "text": "x"}],
    "text block without text": [{"type": "text"}],
    "text block with a number": [{"type": "text", "text": 1}],
    "second block bad": [{"type": "text", "text": "x"}, 5],
    "NUL": "a\0b",
    "NUL in a block": [{"type": "text", "text": "\0"}],
    "NUL in a block's key": [{"type": "custom", "a\0": 1}],
}
MESSAGES: list[tuple[str, Loc]] = [("append", ()), ("open", ("messages", 0)), ("complete", ("messages", 0))]


def fields_of_messages() -> Iterator[tuple[str, Any]]:
    yield from (("content", value) for value in BAD_CONTENTS.values())
    yield from (("role", value) for value in ("", "bot", "User", "user ", 1, None, ["user"]))
    yield from (("message_type", value) for value in ("", "text", "Chat", 1))
    yield from (("tokens_used", value) for value in (*NOT_INTEGERS.values(), -1, 2**31))
    yield from (("cost_usd", value) for value in BAD_COSTS.values())
    yield from (("message_id", value) for value in ("", "x" * 256, "a\nb", "a\x7f", "\x9f", "a\0", 1, True))
    yield from (("native", value) for value in ("x" * (2**20 - 1), {"a": "\0"}, {"a": {"\0": 1}}))


def cases() -> Iterator[tuple[str, Json, Loc]]:
    for route, place in OBJECTS:
        for value in BAD_OBJECTS.values():
            yield route, at(*place)(value), place
    for route, place in MESSAGES:
        for name, value in fields_of_messages():
            yield route, at(*place, name)(value), (*place, name)
    for place, routes in {("title",): ("create", "update"), ("create_session", "title"): ("open",)}.items():
        for route in routes:
            for value in (*NOT_TEXTS.values(), "x" * 501, "\0", "😀" * 501):
                yield route, at(*place)(value), place
    for place, routes in {
        ("idle_timeout_seconds",): ("create", "update"),
        ("create_session", "idle_timeout_seconds"): ("open",),
    }.items():
        for route in routes:
            for value in (*NOT_INTEGERS.values(), 0, -1, 31_536_001):
                yield route, at(*place)(value), place
    for value in ("", "return ", "Error", 1, True):
        yield "create", {"if_exists": value}, ("if_exists",)
        yield "open", {"create_session": {"if_exists": value}}, ("create_session", "if_exists")
    for value in ("", "deleted", "ACTIVE", 1):
        yield "update", {"status": value}, ("status",)
    for value in (*NOT_TEXTS.values(), "x" * (64 * KIB + 1), "é" * (32 * KIB + 1), "\0"):
        yield "update", {"session_summary": value}, ("session_summary",)
    for value in (*NOT_INTEGERS.values(), -1, 2**31, 99):
        yield "update", {"session_summary": "s", "summary_to_seq": value}, ("summary_to_seq",)
    for value in (*NOT_TEXTS.values(), "", "m" * 256, "\0"):
        yield "update", {"session_summary": "s", "summary_model": value}, ("summary_model",)
    for route in ("remember", "change memory"):
        for value in (*NOT_TEXTS.values(), "", " ", "\u3000", "x" * (64 * KIB + 1), "é" * (32 * KIB + 1), "\0"):
            yield route, {"content": value}, ("content",)
        for value in ("", "fact", "Preference", 1):
            yield route, {"memory_type": value}, ("memory_type",)
    yield "remember", {"memory_type": None}, ("memory_type",)
    yield from turn_cases()


def turn_cases() -> Iterator[tuple[str, Json, Loc]]:
    for value in (*NOT_INTEGERS.values(), 4, 3601, -5):
        yield "open", {"lease_seconds": value}, ("lease_seconds",)
    for value in (True, "5", [5], -0.1, 60.1):
        yield "open", {"wait_seconds": value}, ("wait_seconds",)
    for value in (*NOT_INTEGERS.values(), -1, 2**31):
        yield "open", {"rewind_to_seq": value}, ("rewind_to_seq",)
    for name in ("max_tokens", "max_messages"):
        for value in (*NOT_INTEGERS.values(), 0, -1, 2**31):
            yield "open", {"context": {name: value}}, ("context", name)
    for value in (1, "true", "yes"):
        yield "open", {"context": {"memories": value}}, ("context", "memories")
    for value in ("", "Claude", "gemini", 1):
        yield "open", {"context": {"format": value}}, ("context", "format")
    for name in ("context", "create_session"):
        for value in ([], "x", 1, True):
            yield "open", {name: value}, (name,)
    for route in ("open", "complete"):
        for value in ({}, "x", 1, True):
            yield route, {"messages": value}, ("messages",)
        yield route, {"messages": [said("x"), 5]}, ("messages", 1)
        yield route, {"messages": [said("x")] * 10_001}, ("messages",)
    for route in ("complete", "renew"):
        for value in (*NOT_TEXTS.values(), None):
            yield route, {"lease_token": value}, ("lease_token",)
    for value in ("", "open", "expired", "done", 1, None):
        yield "complete", {"status": value}, ("status",)
    for value in BAD_COSTS.values():
        yield "complete", {"cost_usd": value}, ("cost_usd",)
    for name in ("model", "stop_reason"):
        for value in (*NOT_TEXTS.values(), "x" * 256, "\0"):
            yield "complete", {name: value}, (name,)
    for value in (None, "x", {}, 1):
        yield "align", {"hashes": value}, ("hashes",)
    for value in ("", "x" * 64, "a" * 63, "A" * 64, "a" * 65, "a" * 64 + "\n", 1, None):
        yield "align", {"hashes": ["a" * 64, value]}, ("hashes", 1)


CASES = list(cases())


@pytest.mark.parametrize("route", sorted({route for route, _, _ in CASES}))
async def test_what_breaks_a_limit_is_named_and_not_stored(room: Room, db: Db, route: str) -> None:
    user_id = room.chat.user.id
    before = await stored_rows(db, user_id)
    wrong = []
    for fields, loc in [(fields, loc) for each, fields, loc in CASES if each == route]:
        answer = await room.send(route, fields)
        try:
            invalid(answer, "body", *loc)
        except AssertionError as error:
            wrong.append(f"{str(fields)[:100]}: {answer.status_code} {str(error)[:200]}")
        after = await stored_rows(db, user_id)
        if after != before:
            wrong.append(f"{str(fields)[:100]}: stored")
            before = after
    assert not wrong, "\n".join(wrong)
