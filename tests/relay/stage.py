"""The operator's side of the relay's tests: admin calls, and stages of accounts.

Its one invariant: the accounts of a stage serve its model alone and no others do, so that tests which share a relay
and a database do not meet.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from tests.processes import Process
from tests.relay.calls import Json, admin_headers, client_of
from tests.upstream.client import TestUpstream

ALONE = {"x-session-id": "none"}
KIRO = "/claude-kiro-oauth/v1/messages"


@dataclass(frozen=True)
class Operator:
    """Who runs a relay: `http` has the development key, `call` the admin token."""

    relay: Process
    http: httpx.AsyncClient
    headers: dict[str, str]

    async def call(self, method: str, path: str = "", **content: Any) -> httpx.Response:
        return await self.http.request(method, f"/admin/accounts{path}", headers=self.headers, **content)

    async def told(self, method: str, path: str = "", **content: Any) -> Any:
        """The JSON of a call that must succeed."""
        answer = await self.call(method, path, **content)
        assert answer.status_code == 200, answer.text
        return answer.json()


@asynccontextmanager
async def operating(relay: Process, data_dir: Path) -> AsyncIterator[Operator]:
    async with client_of(relay, data_dir) as http:
        yield Operator(relay, http, admin_headers(data_dir))


@dataclass(frozen=True)
class Stage:
    """Accounts by short names, at one relay, in front of the test upstream."""

    operator: Operator
    upstream: TestUpstream
    model: str = field(default_factory=lambda: f"m-{uuid.uuid4().hex[:12]}")

    def at(self, operator: Operator) -> "Stage":
        """The same accounts at another relay."""
        return replace(self, operator=operator)

    def id(self, name: str) -> str:
        return f"{self.model}.{name}"

    def key(self, name: str) -> str:
        return f"key-of-{self.id(name)}"

    def body(self, name: str, /, **fields: Any) -> Json:
        """What makes an account of this stage."""
        made = {"id": self.id(name), "name": name, "base_url": self.upstream.url, "api_key": self.key(name)}
        return {**made, "models": [self.model], **fields}

    async def add(self, *names: str, **fields: Any) -> None:
        for name in names:
            await self.operator.told("POST", json=self.body(name, **fields))

    async def get(self, name: str) -> Json:
        return dict(await self.operator.told("GET", f"/{self.id(name)}"))

    async def change(self, name: str, /, **fields: Any) -> Json:
        return dict(await self.operator.told("PATCH", f"/{self.id(name)}", json=fields))

    async def post(self, name: str, action: str) -> Json:
        return dict(await self.operator.told("POST", f"/{self.id(name)}/{action}"))

    async def delete(self, name: str) -> Json:
        return dict(await self.operator.told("DELETE", f"/{self.id(name)}"))

    def script(self, name: str, *steps: Json) -> None:
        """What upstream does with this account's next requests."""
        self.upstream.script(*({"match": {"api_key": self.key(name)}, **step} for step in steps))

    # ── requests ────────────────────────────────────────────────────────────────────────────────

    def request(self, text: str = "Hello", **fields: Any) -> Json:
        return {
            "model": self.model,
            "max_tokens": 100,
            "messages": [{"role": "user", "content": text}],
            **fields,
        }

    async def ask(self, text: str = "Hello", *, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
        """A request without a session; the whole answer, whatever it is."""
        return await self.operator.http.post(path, json=self.request(text, **fields), headers=ALONE)

    async def is_served(self) -> bool:
        """Whether one of the accounts answers, and not the demo for want of any."""
        answer = await self.ask()
        return answer.status_code == 200 and not answer.json()["id"].startswith("msg_demo")

    def entries(self) -> list[Json]:
        """What upstream got from this stage's accounts, oldest first, with the account's `name`."""
        names = {}
        for entry in self.upstream.requests():
            key = entry["headers"].get("x-api-key", "")
            if key.startswith(self.key("")):
                names[entry["number"]] = {**entry, "name": key.removeprefix(self.key(""))}
        return list(names.values())

    def asked(self) -> list[str]:
        """The accounts that upstream was asked with, in order."""
        return [entry["name"] for entry in self.entries()]


@asynccontextmanager
async def staged(operator: Operator, upstream: TestUpstream) -> AsyncIterator[Stage]:
    """A stage whose accounts are gone afterwards."""
    stage = Stage(operator, upstream)
    yield stage
    for account in await operator.told("GET"):
        if account["id"].startswith(stage.model):
            await operator.told("DELETE", f"/{account['id']}")


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 5) -> Any:
    """What the condition gives, once that is true; AssertionError when it takes longer."""
    deadline = time.monotonic() + seconds
    while not (value := await condition()):
        assert time.monotonic() < deadline, "it has not come true"
        await asyncio.sleep(0.02)
    return value
