"""The calls of the black-box tests: a user, a chat (one session of that user), and what an error looks like.

Its one invariant: nothing here knows more of the service than the contract says; `wait` alone reaches around it,
by turning back a session's clock in the database where a test would otherwise have to sleep.
"""

import re
import uuid
from dataclasses import dataclass
from typing import Any, TypeAlias

import asyncpg
import httpx

Json: TypeAlias = dict[str, Any]
Db: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def fine(response: httpx.Response) -> Json:
    """The body of a successful call: 200, JSON, with a request id."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body: Json = response.json()
    return body


def refused(response: httpx.Response, status: int, code: str, detail: str | None = None) -> Json:
    """The body of an error answer of this status and code; a 503 and a busy session say when to come again."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body: Json = response.json()
    assert list(body)[:2] == ["detail", "code"]
    assert body["code"] == code
    if detail is not None:
        assert body["detail"] == detail
    if status == 503 or code == "turn_in_progress":
        assert int(response.headers["retry-after"]) >= 1
    return body


def invalid(response: httpx.Response, *loc: str | int) -> str:
    """The message of a 400 that names this place, and repeats nothing of what was sent."""
    body = refused(response, 400, "validation_error")
    assert list(body) == ["detail", "code"]
    for each in body["detail"]:
        assert list(each) == ["type", "loc", "msg"], each
    found = [each["msg"] for each in body["detail"] if each["loc"][: len(loc)] == list(loc)]
    assert found, f"{loc} is not named in {body['detail']}"
    return str(found[0])


@dataclass(frozen=True)
class User:
    """A user of one session_service."""

    http: httpx.AsyncClient
    id: str

    @property
    def params(self) -> dict[str, str]:
        return {"user_id": self.id}

    async def create(self, **fields: Any) -> Json:
        return fine(await self.http.post("/sessions", json={"user_id": self.id, **fields}))

    async def chat(self, **fields: Any) -> "Chat":
        """A new session."""
        return Chat(self, (await self.create(**fields))["session_id"])

    async def sessions(self, **params: Any) -> Json:
        return fine(await self.http.get("/sessions", params=self.params | params))

    async def stats(self) -> Json:
        return fine(await self.http.get(f"/users/{self.id}/stats"))

    def other(self) -> "User":
        """Another user, at the same service."""
        return User(self.http, new_user_id())

    def at(self, http: httpx.AsyncClient) -> "User":
        """The same user, at another service or over other connections."""
        return User(http, self.id)


def new_user_id() -> str:
    return f"user-{uuid.uuid4().hex[:12]}"


def said(content: Any, role: str = "user", **fields: Any) -> Json:
    return {"role": role, "content": content, **fields}


@dataclass(frozen=True)
class Chat:
    """One session of a user."""

    user: User
    id: str

    async def call(self, method: str, path: str = "", **options: Any) -> httpx.Response:
        """A call below /sessions/{id}; `params` are added to user_id."""
        params = self.user.params | options.pop("params", {})
        return await self.user.http.request(method, f"/sessions/{self.id}{path}", params=params, **options)

    async def get(self) -> Json:
        return fine(await self.call("GET"))

    async def put(self, **fields: Any) -> httpx.Response:
        return await self.call("PUT", json=fields)

    async def end(self) -> httpx.Response:
        return await self.call("DELETE")

    async def post(self, content: Any, role: str = "user", **fields: Any) -> httpx.Response:
        """An append, whatever comes of it."""
        return await self.call("POST", "/messages", json=said(content, role, **fields))

    async def append(self, content: Any, role: str = "user", **fields: Any) -> Json:
        return fine(await self.post(content, role, **fields))

    async def messages(self, **params: Any) -> Json:
        return fine(await self.call("GET", "/messages", params=params))

    async def contents(self, **params: Any) -> list[str]:
        return [each["content"] for each in (await self.messages(**params))["messages"]]

    async def turn(self, *messages: Json, **fields: Any) -> httpx.Response:
        """An opening, whatever comes of it."""
        return await self.call("POST", "/turns", json={"messages": list(messages), **fields})

    async def open(self, *messages: Json, **fields: Any) -> "Turn":
        return Turn(self, fine(await self.turn(*messages, **fields)))

    async def context(self, **params: Any) -> Json:
        return fine(await self.call("GET", "/context", params=params))

    async def remember(self, content: str, memory_type: str = "preference", **fields: Any) -> Json:
        return fine(await self.call("POST", "/memory", json={"memory_type": memory_type, "content": content, **fields}))

    def of(self, user: User) -> "Chat":
        """The session of the same id, of another user or through another service."""
        return Chat(user, self.id)


@dataclass(frozen=True)
class Turn:
    """An open turn, by what opening it answered."""

    chat: Chat
    opened: Json

    @property
    def id(self) -> str:
        return str(self.opened["turn_id"])

    @property
    def token(self) -> str:
        return str(self.opened["lease_token"])

    @property
    def receipt(self) -> Json:
        receipt: Json = self.opened["context"]["receipt"]
        return receipt

    async def finish(self, *messages: Json, **fields: Any) -> httpx.Response:
        """A completion, whatever comes of it."""
        body = {"lease_token": self.token, "status": "completed", "messages": list(messages), **fields}
        return await self.chat.call("POST", f"/turns/{self.id}/complete", json=body)

    async def complete(self, *messages: Json, **fields: Any) -> Json:
        return fine(await self.finish(*messages, **fields))

    async def renew(self, token: str | None = None) -> httpx.Response:
        body = {"lease_token": token or self.token}
        return await self.chat.call("POST", f"/turns/{self.id}/renew", json=body)

    async def get(self) -> Json:
        return fine(await self.chat.call("GET", f"/turns/{self.id}"))


async def wait(db: Db, chat: Chat, seconds: float) -> None:
    """As if these seconds had passed for this session: every time of it and of its turns moves back."""
    key = (chat.user.id, chat.id, seconds)
    moved = "{0} = {0} - $3 * interval '1 second'"
    names = ("created_at", "updated_at", "last_activity", "expires_at", "lease_expires_at")
    columns = ", ".join(map(moved.format, names))
    await db.execute(f"UPDATE dev.sessions SET {columns} WHERE user_id = $1 AND session_id = $2", *key)
    columns = ", ".join(map(moved.format, ("opened_at", "closed_at", "lease_expires_at")))
    await db.execute(f"UPDATE dev.session_turns SET {columns} WHERE user_id = $1 AND session_id = $2", *key)


async def check_counters(db: Db, chat: Chat) -> Json:
    """The session, after its counters were found equal to its rows, and the seqs without a gap or a twin."""
    session = await chat.get()
    rows = await db.fetch(
        "SELECT seq, tokens_used, cost_usd, superseded_at IS NULL AS visible FROM dev.session_messages"
        " WHERE user_id = $1 AND session_id = $2 ORDER BY seq",
        chat.user.id,
        chat.id,
    )
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    assert session["message_count"] == sum(row["visible"] for row in rows)
    assert session["total_tokens"] == sum(row["tokens_used"] for row in rows)
    assert session["total_cost"] == float(sum(row["cost_usd"] for row in rows))
    return session


async def stored_rows(db: Db, user_id: str) -> int:
    """How many rows of any kind a user has, and how far their versions have moved: changes with every write."""
    return int(
        await db.fetchval(
            "SELECT (SELECT coalesce(sum(version), 0) + count(*) FROM dev.sessions WHERE user_id = $1)"
            " + (SELECT count(*) FROM dev.session_messages WHERE user_id = $1)"
            " + (SELECT count(*) FROM dev.session_turns WHERE user_id = $1)"
            " + (SELECT count(*) FROM dev.session_memories WHERE user_id = $1)",
            user_id,
        )
    )
