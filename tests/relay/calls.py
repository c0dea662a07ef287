"""The calls of the relay's tests: a relay process, a chat (one session through it), and what streams hold.

Its one invariant: a chat's `stored` is what session_service tells, not what the relay says of it.
"""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from tests.processes import Process, free_port, running

Json = dict[str, Any]

UPSTREAM_KEY = "upstream-key-of-the-operator"
MODEL = "test-model"


@contextmanager
def start_relay(
    database_url: str, session_service_url: str, data_dir: Path, settings: Mapping[str, str], *, port: int | None = None
) -> Iterator[Process]:
    """A relay on a free port; `settings` are environment variables over those for tests, empty ones left out."""
    port = port or free_port()
    data_dir.mkdir(exist_ok=True)
    environment = {
        "ENVIRONMENT": "test",
        "DATABASE_URL": database_url,
        "SESSION_SERVICE_URL": session_service_url,
        "RELAY_PORT": str(port),
        "DATA_DIR": str(data_dir),
        "RELAY_DEMO_DELAY_MS": "0",
        **settings,
    }
    environment = {name: value for name, value in environment.items() if value}
    command = [sys.executable, "-m", "services.relay.main"]
    with running(command, port, data_dir / f"relay-{port}.log", environment) as process:
        process.wait_until("/health/ready")
        yield process


def upstream_settings(url: str) -> dict[str, str]:
    return {"RELAY_UPSTREAM_URL": url, "RELAY_UPSTREAM_API_KEY": UPSTREAM_KEY}


def admin_headers(data_dir: Path) -> dict[str, str]:
    return {"authorization": f"Bearer {(data_dir / 'admin.token').read_text().strip()}"}


def rest_account(relay: Process, data_dir: Path, account_id: str = "anthropic") -> None:
    """Ends whatever keeps the account from being used."""
    url = f"{relay.url}/admin/accounts/{account_id}/enable"
    httpx.post(url, headers=admin_headers(data_dir), trust_env=False).raise_for_status()


@asynccontextmanager
async def client_of(relay: Process, data_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a relay, with its development key."""
    key = (data_dir / "api.key").read_text().strip()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"x-api-key": key}
    async with httpx.AsyncClient(
        base_url=relay.url, headers=headers, timeout=30, trust_env=False, limits=limits
    ) as client:
        yield client


@dataclass(frozen=True)
class Chat:
    """One session through a relay, as the user of the development key."""

    http: httpx.AsyncClient
    sessions: httpx.AsyncClient
    session_id: str = field(default_factory=lambda: f"chat-{uuid.uuid4().hex[:12]}")

    @property
    def path(self) -> str:
        return f"/sessions/{quote(self.session_id, safe='')}"

    def body(self, *messages: str | Json, **fields: Any) -> Json:
        """A request; texts are messages of the user."""
        listed = [{"role": "user", "content": each} if isinstance(each, str) else each for each in messages]
        request = {"model": MODEL, "max_tokens": 1000, "messages": listed, **fields}
        return {**request, "metadata": {"session_id": self.session_id, **fields.get("metadata", {})}}

    async def ask(self, *messages: str | Json, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """The plain answer, whatever its status."""
        return await self.http.post("/v1/messages", json=self.body(*messages, **fields), headers=headers)

    async def say(self, *messages: str | Json, **fields: Any) -> str:
        """The text of a plain answer that must be there."""
        answer = await self.ask(*messages, **fields)
        assert answer.status_code == 200, answer.text
        return text_of(answer.json())

    @asynccontextmanager
    async def stream(self, *messages: str | Json, **fields: Any) -> AsyncIterator[httpx.Response]:
        body = self.body(*messages, **fields, stream=True)
        async with self.http.stream("POST", "/v1/messages", json=body) as answer:
            yield answer

    async def stream_whole(self, *messages: str | Json, **fields: Any) -> bytes:
        async with self.stream(*messages, **fields) as answer:
            assert answer.status_code == 200
            return await answer.aread()

    async def stored(self, **params: Any) -> list[Json]:
        """The session's visible messages, in order."""
        query = {"user_id": "dev", "page_size": 1000, **params}
        answer = await self.sessions.get(f"{self.path}/messages", params=query)
        if answer.status_code == 404:
            return []
        messages: list[Json] = answer.json()["messages"]
        return messages

    async def history(self) -> list[tuple[str, str]]:
        """Role and text of the visible messages."""
        return [(each["role"], each["content"]) for each in await self.stored()]

    async def turns(self) -> list[Json]:
        """The session's turns, newest first."""
        answer = await self.sessions.get(f"{self.path}/turns", params={"user_id": "dev"})
        turns: list[Json] = answer.json()["turns"] if answer.status_code == 200 else []
        return turns

    async def until_turn(self, status: str, seconds: float = 5) -> Json:
        """The newest turn, once it has this status."""
        deadline = time.monotonic() + seconds
        while True:
            turns = await self.turns()
            if turns and turns[0]["status"] == status:
                return turns[0]
            assert time.monotonic() < deadline, f"no turn became {status}: {turns}"
            await asyncio.sleep(0.02)


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Json:
    return {"role": "assistant", "content": content}


def text_of(message: Json) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def events_of(stream: bytes) -> list[tuple[str, Json]]:
    """Names and data of a stream's events."""
    events = []
    for part in stream.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in part.splitlines() if ": " in line)
        if "data" in lines:
            events.append((lines.get("event", ""), json.loads(lines["data"])))
    return events


def streamed_text(stream: bytes) -> str:
    return "".join(
        data["delta"]["text"]
        for name, data in events_of(stream)
        if name == "content_block_delta" and data["delta"]["type"] == "text_delta"
    )


def error_of(answer: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in Claude's shape, of this status and type."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["type", "error", "request_id"], body
    assert body["type"] == "error"
    assert body["error"]["type"] == kind
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    return str(body["error"]["message"])
