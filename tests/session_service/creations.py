"""Every POST that creates something, as one request each; the tests of Idempotency-Key send them again and again.

Its one invariant: KINDS names all of them, and GROWS says by how many rows a single run of each makes its user grow.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.session_service.calls import Chat, Db, Json, User, fine, new_user_id, said

TABLES = ("sessions", "session_messages", "session_turns", "session_memories")
# Numbers, text and key order that a careless copy of the answer would change.
NATIVE = [1e23, 1.5, 10**30, -0.0, "\u2028\x7f😀\\", {"b": 1, "a": [None, True]}]


@dataclass(frozen=True)
class Request:
    """A creating POST, that can be sent any number of times and through any client."""

    path: str
    params: dict[str, str]
    body: dict[str, Any]
    other_body: dict[str, Any] | None = None

    async def send(self, http: httpx.AsyncClient, key: str | bytes | None, **headers: str) -> httpx.Response:
        sent: list[tuple[str | bytes, str | bytes]] = list(headers.items())
        if key is not None:
            sent.append((b"Idempotency-Key", key))
        return await http.post(self.path, params=self.params, headers=sent, **self.body)  # type: ignore[arg-type]

    def other(self) -> "Request":
        """The same call with another body."""
        other = self.other_body or {"json": self.body["json"] | {"title": "x", "metadata": {"x": 1}}}
        return Request(self.path, self.params, other)


async def _session(user: User, _chat: Chat) -> Request:
    return Request("/sessions", {}, {"json": {"user_id": user.id, "metadata": {"a": 0.1}, "title": "😀"}})


def _at(chat: Chat, path: str, body: Json) -> Request:
    return Request(f"/sessions/{chat.id}{path}", chat.user.params, {"json": body})


async def _message(_user: User, chat: Chat) -> Request:
    return _at(chat, "/messages", said("hello", native=NATIVE, cost_usd=0.1, metadata={"z": 1, "a": 2}))


async def _batch(_user: User, chat: Chat) -> Request:
    blocks = [{"type": "text", "text": "b", "y": 1, "x": 2}]
    return _at(chat, "/messages/batch", {"messages": [said("a"), said(blocks, "assistant")], "metadata": {"n": 1}})


async def _batch_making_its_session(user: User, _chat: Chat) -> Request:
    body = {"messages": [said("a")], "create_session": {"if_exists": "error"}}
    return _at(Chat(user, "made-by-the-batch"), "/messages/batch", body)


async def _turn(_user: User, chat: Chat) -> Request:
    return _at(chat, "/turns", {"messages": [said("hello")], "context": {"format": "openai"}})


async def _turn_making_its_session(user: User, _chat: Chat) -> Request:
    body = {"messages": [said("hello")], "create_session": {"if_exists": "error"}, "wait_seconds": 3}
    return _at(Chat(user, "made-by-the-turn"), "/turns", body)


async def _answer(_user: User, chat: Chat) -> Request:
    turn = await chat.open(said("hello"))
    token = turn.opened["lease_token"]
    body = {"lease_token": token, "status": "completed", "messages": [said("yes", "assistant", native=NATIVE)]}
    return _at(chat, f"/turns/{turn.opened['turn_id']}/complete", body)


async def _memory(_user: User, chat: Chat) -> Request:
    return _at(chat, "/memory", {"memory_type": "custom", "content": "remember"})


async def _fork(_user: User, chat: Chat) -> Request:
    return _at(chat, "/fork", {"title": "other"})


async def exported(chat: Chat) -> bytes:
    """The whole file of a session."""
    answer = await chat.call("GET", "/export")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert answer.headers["x-request-id"]
    return answer.content


async def _import(user: User, chat: Chat) -> Request:
    """The chat's own file, for another user, so that the id is free there."""
    params = user.other().params | {"session_id": "imported"}
    file = await exported(chat)
    fine(await chat.put(title="later"))
    return Request("/sessions/import", params, {"content": file}, {"content": await exported(chat)})


KINDS: dict[str, Callable[[User, Chat], Awaitable[Request]]] = {
    "session": _session,
    "message": _message,
    "batch": _batch,
    "batch making its session": _batch_making_its_session,
    "turn": _turn,
    "turn making its session": _turn_making_its_session,
    "answer": _answer,
    "memory": _memory,
    "fork": _fork,
    "import": _import,
}
# Sessions, messages, turns, memories. A chat begins with one message, which fork and import take along.
GROWS = {
    "session": (1, 0, 0, 0),
    "message": (0, 1, 0, 0),
    "batch": (0, 2, 0, 0),
    "batch making its session": (1, 1, 0, 0),
    "turn": (0, 1, 1, 0),
    "turn making its session": (1, 1, 1, 0),
    "answer": (0, 1, 0, 0),
    "memory": (0, 0, 0, 1),
    "fork": (1, 1, 0, 0),
    "import": (1, 1, 0, 0),
}


async def a_chat(http: httpx.AsyncClient) -> Chat:
    """A session of a new user, with one message in it."""
    chat = await User(http, new_user_id()).chat()
    await chat.append("first")
    return chat


def owner(request: Request) -> str:
    """The user whose rows the request makes."""
    return request.params.get("user_id") or str(request.body["json"]["user_id"])


async def rows(db: Db, user_id: str) -> tuple[int, ...]:
    """How many sessions, messages, turns and memories a user has in the database."""
    counts = [await db.fetchval(f"SELECT count(*) FROM dev.{each} WHERE user_id = $1", user_id) for each in TABLES]
    return tuple(counts)


def grown(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(new - old for old, new in zip(before, after, strict=True))


def answered(response: httpx.Response, *, replayed: bool) -> Json:
    """A success, with the header that says whether it is an old one."""
    body = fine(response)
    assert response.headers.get("idempotent-replayed") == ("true" if replayed else None)
    return body
