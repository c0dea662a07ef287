"""Calls of the conversation APIs: a user with an API key of its own, its conversations, and their sockets.

Its one invariant: every user is one that no other test knows.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from tests.processes import Process
from tests.relay.calls import MODEL

Json = dict[str, Any]
SECONDS = 20.0


def text(value: str) -> list[Json]:
    return [{"type": "text", "text": value}]


def say(value: str, *, run: bool = True) -> Json:
    return {"role": "user", "content": text(value), "run": run}


def fine(answer: httpx.Response) -> Any:
    """The body of a successful call."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    return answer.json()


def refused(answer: httpx.Response, status: int) -> str:
    """The message of an error in the form of these APIs."""
    assert answer.status_code == status, f"{answer.status_code}: {answer.text}"
    body = answer.json()
    assert isinstance(body["message"], str)
    assert body["message"]
    assert body["detail"]
    assert answer.headers["x-request-id"]
    return str(body["message"])


async def until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What the condition, a coroutine function, gives once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := await condition()):
        assert time.monotonic() < deadline, "did not come true"
        await asyncio.sleep(0.02)
    return found


@dataclass(frozen=True)
class User:
    """Somebody with an API key, at a relay."""

    http: httpx.AsyncClient
    sessions: httpx.AsyncClient
    user_id: str
    key_id: str

    async def start(self, **request: Any) -> Json:
        """A start task, just begun."""
        task: Json = fine(await self.http.post("/api/v1/app-conversations", json=request))
        return task

    async def task(self, task_id: str) -> Json:
        (found,) = fine(await self.http.get("/api/v1/app-conversations/start-tasks", params={"ids": task_id}))
        assert found is not None
        return dict(found)

    async def ended(self, task_id: str) -> Json:
        """The task, once it is READY or ERROR."""

        async def look() -> Json | None:
            task = await self.task(task_id)
            return task if task["status"] in {"READY", "ERROR"} else None

        found: Json = await until(look)
        return found

    async def conversation(self, **request: Any) -> "Conversation":
        """One that is ready; its model is the test upstream's unless another is named."""
        task = await self.ended((await self.start(**{"llm_model": MODEL, **request}))["id"])
        assert task["status"] == "READY", task
        return Conversation(self, task["app_conversation_id"], await self.secret(task["app_conversation_id"]))

    async def app(self, conversation_id: str) -> Json:
        (found,) = fine(await self.http.get("/api/v1/app-conversations", params={"ids": conversation_id}))
        assert found is not None
        return dict(found)

    async def secret(self, conversation_id: str) -> str:
        return str((await self.app(conversation_id))["session_api_key"])


@dataclass(frozen=True)
class Conversation:
    """One conversation of a user, and its runtime key."""

    user: User
    id: str
    secret: str

    @property
    def headers(self) -> dict[str, str]:
        return {"x-session-api-key": self.secret}

    @property
    def path(self) -> str:
        return f"/api/conversations/{self.id}"

    @property
    def session_id(self) -> str:
        return str(uuid.UUID(self.id))

    async def call(self, action: str, body: Any = None, **headers: str) -> httpx.Response:
        """A runtime call, with the runtime key and without the user's."""
        url = self.user.http.base_url.join(f"{self.path}/{action}")
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            return await client.post(url, json={} if body is None else body, headers=self.headers | headers)

    async def say(self, value: str, *, run: bool = True) -> Json:
        answered: Json = fine(await self.call("events", say(value, run=run)))
        assert answered == {"success": True, "role": "user", "content": text(value)}
        return answered

    async def app(self) -> Json:
        return await self.user.app(self.id)

    async def until_status(self, *statuses: str) -> Json:
        async def look() -> Json | None:
            app = await self.app()
            return app if app["execution_status"] in statuses else None

        found: Json = await until(look)
        return found

    async def answered(self, value: str) -> Json:
        """Says something, and waits for the end of the run."""
        await self.say(value)
        app = await self.until_status("finished", "error")
        assert app["execution_status"] == "finished", (await self.events())[-2:]
        return app

    async def stored(self, **params: Any) -> list[tuple[str, str]]:
        """Role and text of the session's visible messages."""
        query = {"user_id": self.user.user_id, "page_size": 1000, **params}
        answer = await self.user.sessions.get(f"/sessions/{self.session_id}/messages", params=query)
        return [(each["role"], each["content"]) for each in fine(answer)["messages"]]

    async def turns(self) -> list[Json]:
        """Newest first."""
        path = f"/sessions/{self.session_id}/turns"
        return list(fine(await self.user.sessions.get(path, params={"user_id": self.user.user_id}))["turns"])

    async def events(self, **params: Any) -> list[Json]:
        answer = await self.user.http.get(f"{self.path}/events", params={"limit": 100, **params})
        return list(fine(answer)["events"])

    async def told(self) -> list[tuple[str, str]]:
        """Source and text of the messages among the events."""
        return [(each["source"], each["message"]) for each in await self.events() if each.get("action") == "message"]

    async def trajectory(self) -> list[tuple[str, str]]:
        """Source and text of all messages among the events, however many these are."""
        whole = fine(await self.user.http.get(f"{self.path}/trajectory"))["trajectory"]
        return [(each["source"], each["message"]) for each in whole if each.get("action") == "message"]

    @asynccontextmanager
    async def socket(self, relay: Process | None = None, **query: str) -> AsyncIterator["Socket"]:
        """A WebSocket, at this relay or another one."""
        base = str(relay.url if relay else self.user.http.base_url).rstrip("/").replace("http", "ws", 1)
        query = {"session_api_key": self.secret, **query}
        url = f"{base}/sockets/events/{self.id}?{httpx.QueryParams(query)}"
        async with connect(url, proxy=None, max_size=None) as connection:
            yield Socket(connection)


@dataclass
class Socket:
    """What a socket has been sent: `frames`, the first of which is the whole state."""

    connection: ClientConnection
    frames: list[Json] = field(default_factory=list)

    async def next(self, seconds: float = SECONDS) -> Json:
        async with asyncio.timeout(seconds):
            frame: Json = json.loads(await self.connection.recv())
        assert all(isinstance(frame[name], str) and frame[name] for name in ("id", "timestamp", "source", "kind"))
        assert frame["source"] in {"agent", "user", "environment"}
        assert frame["timestamp"].endswith("Z")
        self.frames.append(frame)
        return frame

    async def until(self, condition: Callable[[Json], bool]) -> Json:
        while not condition(frame := await self.next()):
            continue
        return frame

    async def until_status(self, status: str) -> Json:
        return await self.until(lambda frame: frame.get("key") == "execution_status" and frame["value"] == status)

    async def say(self, value: str) -> None:
        await self.connection.send(json.dumps({"role": "user", "content": text(value)}))

    @property
    def told(self) -> list[tuple[str, str]]:
        """What the frames after the first say: messages by their source, changes of status."""
        return [seen for frame in self.frames[1:] if (seen := told_by(frame))]


def told_by(frame: Json) -> tuple[str, str] | None:
    if frame["kind"] == "MessageEvent":
        return frame["source"], "".join(part.get("text", "") for part in frame["llm_message"]["content"])
    if frame.get("key") == "execution_status":
        return "status", frame["value"]
    return None
