"""The session pool: what enters, who is preferred, and that nothing of a session reaches another one's request."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.processes import Process
from tests.relay.calls import MODEL, UPSTREAM_KEY, Json, admin_headers, error_of, start_relay, upstream_settings, user
from tests.session_service.calls import Db
from tests.upstream.client import TestUpstream

MOST = 4
OTHER_KEY = "key-of-the-other-account"
POOL = "/admin/session-pool"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE pg_blocking_pids(pid) <> '{}' AND datname = current_database()"


class Site:
    """Two relays on one database, with two accounts: `anthropic`, and `other`, which is used after it."""

    def __init__(self, database_url: str, folder: Path, start: Callable[[], Process]) -> None:
        self.database_url = database_url
        self.folder = folder
        self.start = start
        self.relays = [start(), start()]
        self.http: httpx.AsyncClient

    def admin(self, method: str, path: str, body: Any = None, relay: int = 0) -> httpx.Response:
        headers = admin_headers(self.folder)
        return httpx.request(method, self.relays[relay].url + path, json=body, headers=headers, trust_env=False)

    def done(self, method: str, path: str, body: Any = None, relay: int = 0) -> Json:
        answer = self.admin(method, path, body, relay)
        assert answer.status_code == 200, answer.text
        told: Json = answer.json()
        return told

    def key(self, *, collect: bool, **fields: Any) -> Json:
        wanted = {"name": "a key", "collectSession": collect, **fields}
        return dict(self.done("POST", "/admin/api-keys", wanted)["data"])

    def stats(self, relay: int = 0) -> Json:
        return dict(self.done("GET", f"{POOL}/stats", relay=relay)["data"])

    async def ask(
        self, key: Json, text: str = "Hi", *, relay: int = 0, headers: dict[str, str] | None = None, **fields: Any
    ) -> str:
        """The id of the session that the request went to."""
        body = {"model": MODEL, "max_tokens": 100, "messages": [user(text)], **fields}
        headers = {"x-api-key": key["apiKey"], **(headers or {})}
        answer = await self.http.post(f"{self.relays[relay].url}/v1/messages", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.headers.get("x-session-id", ""))

    async def say(self, key: Json, session_id: str, text: str = "Hi", **fields: Any) -> str:
        return await self.ask(key, text, metadata={"session_id": session_id}, **fields)

    @asynccontextmanager
    async def sql(self) -> AsyncIterator[Db]:
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    def lines(self, relay: int = 0) -> list[str]:
        """What the relay's log tells of the session pool."""
        events = [json.loads(line)["event"] for line in self.relays[relay].logged().splitlines()]
        return [event for event in events if event.startswith("[SessionPool]")]


@pytest.fixture(scope="module")
def site_of_all(
    make_database: Callable[[], str], session_service: Process, upstream_process: TestUpstream, scratch: Path
) -> Iterator[Site]:
    database_url, folder = make_database(), scratch / "session-pool"
    settings = upstream_settings(upstream_process.url) | {"RELAY_MAX_POOL_SIZE": str(MOST)}
    with ExitStack() as started:
        site = Site(
            database_url,
            folder,
            lambda: started.enter_context(start_relay(database_url, session_service.url, folder, settings)),
        )
        other = {"base_url": upstream_process.url, "api_key": OTHER_KEY, "priority": 9}
        site.done("POST", "/admin/accounts", {"id": "other", "name": "other", "provider": "anthropic", **other})
        yield site


@pytest_asyncio.fixture(loop_scope="session")
async def site(site_of_all: Site, upstream: TestUpstream) -> AsyncIterator[Site]:
    """The two relays with an empty pool."""
    site_of_all.done("DELETE", POOL)
    for account in ("anthropic", "other"):
        site_of_all.done("POST", f"/admin/accounts/{account}/enable")
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=30, trust_env=False, limits=limits) as site_of_all.http:
        yield site_of_all


async def until(condition: Callable[[], bool], seconds: float = 3) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come true"
        await asyncio.sleep(0.02)


def new_id() -> str:
    return str(uuid.uuid4())


async def pooled_on_other(site: Site, key: Json) -> str:
    """A new session of the pool whose account is `other`."""
    site.done("POST", "/admin/accounts/anthropic/disable")
    session_id = await site.say(key, new_id())
    site.done("POST", "/admin/accounts/anthropic/enable")
    return session_id


def account_asked(upstream: TestUpstream) -> str:
    """The account that upstream was asked with last."""
    asked = upstream.requests("/v1/messages")[-1]["headers"]["x-api-key"]
    return {UPSTREAM_KEY: "anthropic", OTHER_KEY: "other"}[asked]


# ── collecting ──────────────────────────────────────────────────────────────────────────────────


async def test_each_session_of_a_key_that_opted_in_enters_once(site: Site) -> None:
    key, other = site.key(collect=True, userId="ann"), site.key(collect=False, userId="ben")
    named, code = new_id(), new_id()
    before = len(site.lines())
    await site.say(other, new_id())
    await site.say(key, named)
    made = await site.ask(key)
    await site.ask(key, headers={"x-claude-code-session-id": code})
    await site.ask(key, headers={"x-session-id": "none"})
    await site.say(key, named, "again")
    stats = site.stats()
    assert list(stats) == ["currentSession", "poolSize", "sessions", "entries", "maxPoolSize", "lastSwitchTime"]
    assert stats["sessions"] == [named, made, code]
    assert (stats["currentSession"], stats["poolSize"], stats["maxPoolSize"]) == (named, 3, MOST)
    assert stats["lastSwitchTime"] is None
    first = stats["entries"][0]
    assert first["lastUsedAt"] >= first["collectedAt"]
    assert {name: first[name] for name in first if not name.endswith("At")} == {
        "sessionId": named,
        "userId": "ann",
        "accountId": "anthropic",
        "model": MODEL,
        "cacheReadShare": 0.0,
        "isCurrent": True,
        "isHealthy": True,
    }
    assert [each["isCurrent"] for each in stats["entries"]] == [True, False, False]
    assert site.lines()[before:] == [
        line
        for size, session in enumerate([named, made, code], 1)
        for line in (
            f"[SessionPool] Collected session from whitelist API Key: {key['apiKey'][:6]} -> {session[:8]}-...",
            f"[SessionPool] Added new session to pool: {session[:8]}-... (pool size: {size})",
        )
    ]
    assert key["apiKey"][:12] not in site.relays[0].logged()


async def test_the_share_of_cache_reads_is_that_of_the_last_turn(site: Site, upstream: TestUpstream) -> None:
    key, session_id = site.key(collect=True), new_id()
    used = {"input_tokens": 10, "cache_creation_input_tokens": 30, "cache_read_input_tokens": 0}
    later = {"cache_creation_input_tokens": 10, "cache_read_input_tokens": 60}
    upstream.script({"usage": used}, {"usage": used | later})
    await site.say(key, session_id)
    assert site.stats()["entries"][0]["cacheReadShare"] == 0.0
    await site.say(key, session_id, "again")
    entry = site.stats()["entries"][0]
    assert entry["cacheReadShare"] == 0.75
    assert entry["lastUsedAt"] > entry["collectedAt"]


async def test_collecting_ends_when_it_is_switched_off_and_entries_stay(site: Site) -> None:
    key = site.key(collect=False)
    switch = f"/admin/api-keys/{key['id']}/collect-session"
    await site.say(key, new_id())
    site.done("PATCH", switch, {"collectSession": True})
    session_id = await site.say(key, new_id())
    site.done("PATCH", switch, {"collectSession": False})
    await site.say(key, new_id())
    assert site.stats()["sessions"] == [session_id]


async def test_only_what_was_answered_enters(site: Site, upstream: TestUpstream) -> None:
    upstream.script({"status": 400, "body": {"type": "error"}})
    with pytest.raises(AssertionError):
        await site.say(site.key(collect=True), new_id())
    assert site.stats()["poolSize"] == 0


async def test_newcomers_at_two_relays_never_are_too_many(site: Site) -> None:
    """Both relays take theirs in at the same moment."""
    key, before = site.key(collect=True), [len(site.lines(relay)) for relay in (0, 1)]
    async with site.sql() as holder, site.sql() as watcher, holder.transaction():
        await holder.execute("SELECT 1 FROM dev.relay_session_pool_current FOR UPDATE")
        asked = await asyncio.gather(*(site.say(key, new_id(), relay=number % 2) for number in range(100)))
        assert len(set(asked)) == 100
        async with asyncio.timeout(5):
            while await watcher.fetchval(WAITING) < 2:
                await asyncio.sleep(0.01)
    await until(lambda: site.stats()["poolSize"] == site.stats(relay=1)["poolSize"] == MOST)
    stats = site.stats(relay=1)
    assert stats["poolSize"] == len(set(stats["sessions"]) & set(asked)) == MOST
    added = [line for relay in (0, 1) for line in site.lines(relay)[before[relay] :] if "Added" in line]
    assert sorted(re.findall(r"pool size: (\d+)", "".join(added))) == [str(size + 1) for size in range(MOST)]
    await site.say(key, new_id())
    assert site.stats()["sessions"] == stats["sessions"]


async def test_by_default_twenty_of_a_hundred_newcomers_enter(
    http: httpx.AsyncClient, data_dir: Path, upstream: TestUpstream
) -> None:
    """Plain, streamed and as chats, with ids of their own and without; every one is served."""
    admin = admin_headers(data_dir)
    await http.delete(POOL, headers=admin)
    made = await http.post("/admin/api-keys", json={"name": "collects", "collectSession": True}, headers=admin)
    key = {"x-api-key": made.json()["data"]["apiKey"]}
    body: Json = {"model": MODEL, "max_tokens": 100, "messages": [user("Hi")]}
    asks: list[tuple[str, Json]] = [
        ("/v1/messages", body | {"metadata": {"session_id": "own"}}),
        ("/v1/messages", body | {"stream": True}),
        ("/api/chat", {"message": "Hi", "model": MODEL}),
        ("/api/chat/stream", {"message": "Hi", "model": MODEL}),
    ]

    async def ask(number: int) -> str:
        path, content = asks[number % 4]
        own = {"metadata": {"session_id": new_id()}} if "metadata" in content else {}
        answer = await http.post(path, json=content | own, headers=key)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-session-id"]

    asked = await asyncio.gather(*map(ask, range(100)))
    stats = (await http.get(f"{POOL}/stats", headers=admin)).json()["data"]
    assert (stats["poolSize"], stats["maxPoolSize"], len(set(stats["sessions"]))) == (20, 20, 20)
    assert set(stats["sessions"]) <= set(asked)
    assert len(set(asked)) == 100
    await http.delete(POOL, headers=admin)


async def test_collecting_never_holds_a_turn_back(site: Site) -> None:
    key, session_id = site.key(collect=True), new_id()
    async with site.sql() as db, db.transaction():
        await db.execute("LOCK TABLE dev.relay_session_pool, dev.relay_session_pool_current")
        began = time.monotonic()
        for text in ("one", "two", "three"):
            await site.say(key, session_id, text)
        assert time.monotonic() - began < 2
    assert site.stats()["sessions"] == [session_id]


async def test_the_pool_is_there_after_a_restart(site: Site) -> None:
    key = site.key(collect=True)
    one, two = await site.say(key, new_id()), await site.say(key, new_id())
    site.done("POST", f"{POOL}/set-current", {"sessionId": two})
    stats = site.stats()
    site.relays[1].kill()
    site.relays[1] = site.start()
    assert site.stats(relay=1) == stats
    assert (stats["sessions"], stats["currentSession"]) == ([one, two], two)


# ── preferring ──────────────────────────────────────────────────────────────────────────────────


async def test_requests_without_a_session_prefer_the_current_ones_account(site: Site, upstream: TestUpstream) -> None:
    key, stranger = site.key(collect=True), site.key(collect=False)
    first = await site.say(key, new_id())
    on_other = await pooled_on_other(site, key)
    assert site.stats()["currentSession"] == first
    await site.ask(stranger)
    assert account_asked(upstream) == "anthropic"
    site.done("POST", f"{POOL}/set-current", {"sessionId": on_other})

    async def account(relay: int, **fields: Any) -> str:
        await site.ask(stranger, relay=relay, **fields)
        return account_asked(upstream)

    assert await account(0) == "other"
    deadline = time.monotonic() + 1.5
    while await account(1) != "other":
        assert time.monotonic() < deadline
    assert await account(0, headers={"x-session-id": "none"}) == "other"
    assert await account(0, metadata={"session_id": new_id()}) == "anthropic"
    site.done("POST", "/admin/accounts/other/disable")
    assert await account(0) == "anthropic"
    site.done("POST", "/admin/accounts/other/enable")
    site.done("DELETE", POOL)
    assert await account(0) == "anthropic"


async def test_switching_goes_to_the_next_healthy_one(site: Site) -> None:
    key, switch = site.key(collect=True), f"{POOL}/switch"

    def switched() -> tuple[bool, str | None]:
        told = site.done("POST", switch)
        assert list(told) == ["success", "switched", "message", "data"]
        assert told["success"] is True
        assert len(told["message"].split()) > 3
        return told["switched"], told["data"]["currentSession"]

    assert switched() == (False, None)
    one = await site.say(key, new_id())
    assert site.stats()["currentSession"] == one
    assert switched() == (False, one)
    assert site.stats()["lastSwitchTime"] is None
    two = await pooled_on_other(site, key)
    three = await site.say(key, new_id())
    assert site.stats()["sessions"] == [one, two, three]
    assert [switched() for _ in range(3)] == [(True, two), (True, three), (True, one)]
    assert site.stats()["lastSwitchTime"] > site.stats()["entries"][2]["collectedAt"]
    site.done("POST", "/admin/accounts/other/disable")
    assert [each["isHealthy"] for each in site.stats()["entries"]] == [True, False, True]
    assert [switched() for _ in range(2)] == [(True, three), (True, one)]
    site.done("POST", "/admin/accounts/anthropic/disable")
    assert switched() == (False, one)


async def test_setting_the_current_one(site: Site) -> None:
    path, shared = f"{POOL}/set-current", new_id()
    ann, ben = site.key(collect=True, userId="ann"), site.key(collect=True, userId="ben")
    for key in (ben, ann):
        await site.say(key, new_id())
        await site.say(key, shared)
        site.stats()
    told = site.done("POST", path, {"sessionId": shared})
    assert (told["success"], told["data"]) == (True, {"currentSession": shared})
    entries = site.stats()["entries"]
    assert [(each["userId"], each["isCurrent"]) for each in entries if each["sessionId"] == shared] == [
        ("ben", True),
        ("ann", False),
    ]
    error_of(site.admin("POST", path, {"sessionId": new_id()}), 404, "not_found_error")
    for bad in ({}, {"sessionId": ""}, {"sessionId": 7}, {"sessionId": None}, {"sessionId": "a\0b"}, [shared], None):
        message = error_of(site.admin("POST", path, bad), 400, "invalid_request_error")
        assert ("sessionId" if isinstance(bad, dict) else "body") in message, bad
    assert site.stats()["currentSession"] == shared


async def test_emptying_it_leaves_conversations_alone(site: Site) -> None:
    key = site.key(collect=True)
    sessions = [await site.say(key, new_id()) for _ in range(2)]
    told = site.done("DELETE", POOL)
    assert (told["success"], told["data"]) == (True, {"cleared": 2})
    stats = site.stats()
    assert (stats["currentSession"], stats["poolSize"], stats["sessions"], stats["entries"]) == (None, 0, [], [])
    headers = {"x-api-key": key["apiKey"]}
    seen = await site.http.get(f"{site.relays[0].url}/sessions/{sessions[1]}", headers=headers)
    assert (seen.json()["status"], seen.json()["message_count"]) == ("active", 2)
    await site.say(key, sessions[1], "and on")
    assert site.stats()["sessions"] == [sessions[1]]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/stats"), ("POST", "/switch"), ("POST", "/set-current"), ("DELETE", "")]
)
async def test_it_is_the_administrators_alone(site: Site, method: str, path: str) -> None:
    key = site.key(collect=True)
    for headers in ({}, {"x-api-key": key["apiKey"]}, {"authorization": f"Bearer {key['apiKey']}"}):
        for content in (b"", b"{"):
            url = site.relays[0].url + POOL + path
            answer = await site.http.request(method, url, headers=headers, content=content)
            error_of(answer, 401, "authentication_error")
            assert answer.headers["www-authenticate"] == "Bearer"


# ── apart ───────────────────────────────────────────────────────────────────────────────────────


async def test_nothing_of_a_caller_reaches_anothers_request(site: Site, upstream: TestUpstream) -> None:
    """With the pool in use, in whatever order: what upstream receives is of one caller alone."""
    secrets: dict[str, list[str]] = {}

    async def talk(name: str, key: Json, rounds: int, *, is_named: bool) -> None:
        device, beta, header = (f"{kind}-{name}-{new_id()}" for kind in ("device", "beta", "header"))
        texts = [f"text-{name}-{new_id()}" for _ in range(rounds)]
        mine = secrets[name] = [key["id"], key["apiKey"], key["userId"], device, beta, header, *texts]
        named = new_id()
        for number, text in enumerate(texts):
            metadata = {"user_id": device} | ({"session_id": named} if is_named else {})
            headers = {"anthropic-beta": beta, "x-custom": header, "user-agent": header}
            fields = {"stream": number % 2 == 1, "system": f"I am {device}"}
            mine.append(await site.ask(key, text, relay=number % 2, headers=headers, metadata=metadata, **fields))

    async def disturb() -> None:
        for _ in range(10):
            site.admin("POST", f"{POOL}/switch")
            await asyncio.sleep(0.02)

    keys = [site.key(collect=number < 2, userId=f"user-{new_id()}") for number in range(4)]
    await pooled_on_other(site, keys[0])
    upstream.reset()
    talks = [talk(f"{number}", key, 8, is_named=number % 2 == 0) for number, key in enumerate(keys)]
    await asyncio.gather(*talks, disturb())
    assert site.stats()["poolSize"] == MOST
    received = upstream.requests("/v1/messages")
    assert len(received) == 32
    for request in received:
        seen = request["body"].decode() + json.dumps(request["headers"]) + request["query"]
        whose = [name for name, own in secrets.items() if any(secret in seen for secret in own)]
        assert len(whose) == 1, seen
        assert [seen.count(header) for header in ("x-custom", "user-agent")] == [0, 1]
