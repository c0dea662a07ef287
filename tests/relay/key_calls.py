"""API keys as the tests use them: made by admin calls, asked with at a relay, looked at in the database.

Its one invariant: an `Admin` and a `Caller` show the credentials that are theirs and no others.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from tests.processes import Process
from tests.relay.calls import MODEL, Json, admin_headers
from tests.session_service.calls import Db

PATH = "/v1/messages"
ADMIN = "/admin/api-keys"
NO_SESSION = {"x-session-id": "none"}


@asynccontextmanager
async def open_http(relay: Process) -> AsyncIterator[httpx.AsyncClient]:
    """A client without any credentials."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=relay.url, timeout=30, trust_env=False, limits=limits) as http:
        yield http


@asynccontextmanager
async def open_db(url: str) -> AsyncIterator[Db]:
    db = await asyncpg.connect(url)
    try:
        yield db
    finally:
        await db.close()


@dataclass(frozen=True)
class Caller:
    """One key, at one relay."""

    http: httpx.AsyncClient
    id: str
    secret: str

    def at(self, http: httpx.AsyncClient) -> "Caller":
        """The same key at another relay."""
        return replace(self, http=http)

    def headers(self, session: str | None = None) -> dict[str, str]:
        return {"x-api-key": self.secret, "x-session-id": session or "none"}

    async def ask(
        self,
        text: str = "Hello",
        *,
        session: str | None = None,
        headers: dict[str, str] | None = None,
        path: str = PATH,
        **fields: Any,
    ) -> httpx.Response:
        """The plain answer, whatever its status; without a session nothing is stored."""
        sent = {**self.headers(session), **(headers or {})}
        return await self.http.post(path, json=body(text, **fields), headers=sent)

    @asynccontextmanager
    async def stream(
        self, text: str = "Hello", *, session: str | None = None, **fields: Any
    ) -> AsyncIterator[httpx.Response]:
        sent = body(text, **fields, stream=True)
        async with self.http.stream("POST", PATH, json=sent, headers=self.headers(session)) as answer:
            yield answer

    async def stream_whole(self, text: str = "Hello", **fields: Any) -> httpx.Response:
        """The streamed answer, read to its end."""
        async with self.stream(text, **fields) as answer:
            await answer.aread()
        return answer

    async def leave(self, text: str = "Hello", *, session: str | None = None, **fields: Any) -> int:
        """Hangs up in the middle of a streamed answer; gives its status."""
        async with httpx.AsyncClient(base_url=self.http.base_url, trust_env=False, timeout=30) as http:
            sent = body(text, **fields, stream=True)
            async with http.stream("POST", PATH, json=sent, headers=self.headers(session)) as answer:
                seen = b""
                async for chunk in answer.aiter_raw():
                    seen += chunk
                    if seen.count(b"content_block_delta") >= 4:
                        break
        return answer.status_code


@dataclass(frozen=True)
class Admin:
    """The operator's calls about keys, at one relay."""

    http: httpx.AsyncClient
    token: dict[str, str]

    @classmethod
    def of(cls, http: httpx.AsyncClient, data_dir: Path) -> "Admin":
        return cls(http, admin_headers(data_dir))

    async def call(self, method: str, path: str = "", **request: Any) -> httpx.Response:
        return await self.http.request(method, f"{ADMIN}{path}", headers=self.token, **request)

    async def make(self, **fields: Any) -> Caller:
        """A new key."""
        answer = await self.call("POST", json={"name": f"key {uuid.uuid4().hex[:8]}", **fields})
        data = fine(answer)["data"]
        return Caller(self.http, data["id"], data["apiKey"])

    async def key(self, key_id: str) -> Json:
        told: Json = fine(await self.call("GET", f"/{key_id}"))
        return told

    async def change(self, key_id: str, **fields: Any) -> Json:
        told: Json = fine(await self.call("PATCH", f"/{key_id}", json=fields))
        return told

    async def used(self, key_id: str) -> tuple[int, int, float]:
        """Requests, tokens and cost in all; what is told of today must be the same."""
        usage = (await self.key(key_id))["usage"]
        total = {name: usage[name] for name in ("requests", "tokens", "cost")}
        assert usage["total"] == usage["today"] == total
        assert usage["inFlight"] == 0
        return usage["requests"], usage["tokens"], usage["cost"]


def body(text: str = "Hello", **fields: Any) -> Json:
    return {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": text}], **fields}


def latin(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as bytes, which need not be ASCII."""
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def fine(answer: httpx.Response) -> Any:
    """The body of a successful call."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return answer.json()


async def seconds_until(
    condition: Callable[[], Awaitable[bool]], *, at_most: float = 10, between: float = 0.01
) -> float:
    """How long it takes until the condition holds."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < at_most, f"not in {at_most} s"
        await asyncio.sleep(between)
    return time.monotonic() - began


async def use_row(db: Db, key_id: str) -> Json:
    """What the database holds of a key's use."""
    row = await db.fetchrow("SELECT * FROM dev.relay_key_use WHERE key_id = $1", key_id)
    assert row is not None
    return dict(row)
