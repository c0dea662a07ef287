"""GET /v1/turns/{turn_id}: what became of a turn, and of its answer."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.processes import ROOT, free_port, start_session_service
from tests.relay.calls import MODEL, Chat, Json, error_of, streamed_text
from tests.session_service.calls import TIME, User, said, wait
from tests.upstream.client import TestUpstream

PATHS = ("/v1", "/api/v1", "/claude-kiro-oauth/v1", "/api/v1/claude-kiro-oauth/v1")
FIELDS = [
    *("turn_id", "session_id", "status", "persisted", "stop_reason", "model"),
    *("usage", "cost_usd", "error", "opened_at", "closed_at"),
]
LONG = "word " * 60


async def look(chat: Chat, turn_id: str, prefix: str = "/v1") -> httpx.Response:
    return await chat.http.get(f"{prefix}/turns/{turn_id}")


async def status_of(chat: Chat, turn_id: str) -> Json:
    answer = await look(chat, turn_id)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    body: Json = answer.json()
    assert list(body) == FIELDS
    assert (body["turn_id"], body["session_id"]) == (turn_id, chat.session_id)
    return body


async def until_persisted(chat: Chat, turn_id: str, persisted: str, seconds: float = 10) -> Json:
    deadline = time.monotonic() + seconds
    while (told := await status_of(chat, turn_id))["persisted"] != persisted:
        assert time.monotonic() < deadline, told
        await asyncio.sleep(0.05)
    return told


async def test_a_completed_turn(chat: Chat, upstream: TestUpstream) -> None:
    usage = {"input_tokens": 7, "output_tokens": 5, "service_tier": "standard"}
    upstream.script({"text": "Hi", "usage": usage, "model": "m-1", "stop_reason": "max_tokens"})
    answer = await chat.ask("Hello")
    turn_id = answer.headers["x-turn-id"]
    told = await status_of(chat, turn_id)
    turn = (await chat.turns())[0]
    assert told == {name: turn.get(name) for name in FIELDS} | {"persisted": "yes"}
    assert (told["status"], told["stop_reason"], told["model"]) == ("completed", "max_tokens", "m-1")
    assert told["usage"] == turn["usage"] | usage
    assert told["error"] is None
    assert TIME.fullmatch(told["opened_at"])
    assert told["opened_at"] <= told["closed_at"]
    for prefix in PATHS:
        assert (await look(chat, turn_id, prefix)).json() == told
    await chat.http.post(f"/sessions/{chat.session_id}/close")
    assert await status_of(chat, turn_id) == told


async def test_a_stream_that_broke_off(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": LONG, "cut_after_events": 6})
    async with chat.stream("Hello") as answer:
        assert answer.headers["x-session-persisted"] == "pending"
        assert LONG.startswith(streamed_text(await answer.aread()))
    told = await until_persisted(chat, answer.headers["x-turn-id"], "yes")
    assert (told["status"], told["error"]["type"]) == ("interrupted", "protocol")
    assert set(told["error"]) == {"type", "message"}
    assert told["usage"]["output_tokens"] > 1


async def test_a_turn_that_upstream_refused_or_failed(chat: Chat, upstream: TestUpstream) -> None:
    error = {"type": "invalid_request_error", "message": "images: too large"}
    upstream.script({"status": 400, "body": {"type": "error", "error": {**error, "account": "acc-1"}}})
    refused = await status_of(chat, (await chat.ask("Hello")).headers["x-turn-id"])
    assert (refused["status"], refused["persisted"], refused["error"]) == ("refused", "yes", error)
    upstream.reset()
    upstream.script({"status": 503, "body": {"error": {"type": "x", "message": "account acc-1"}}, "repeat": -1})
    failed = await status_of(chat, (await chat.ask("Hello")).headers["x-turn-id"])
    assert (failed["status"], failed["persisted"]) == ("failed", "yes")
    assert failed["error"] == {"type": "upstream_overloaded"}


async def test_what_upstream_said_of_the_operators_account_is_not_told(chat: Chat, upstream: TestUpstream) -> None:
    error = {"type": "error", "error": {"type": "authentication_error", "message": "key k-123 is revoked"}}
    upstream.script({"text": LONG, "error_event": error, "after_events": 6})
    async with chat.stream("Hello") as answer:
        await answer.aread()
    told = await until_persisted(chat, answer.headers["x-turn-id"], "yes")
    assert (told["status"], told["error"]) == ("interrupted", {"type": "upstream_overloaded"})
    assert "anthropic" not in str(told)


async def test_a_turn_that_runs(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": LONG, "event_delay_ms": 40})
    async with chat.stream("Hello") as answer:
        turn_id = answer.headers["x-turn-id"]
        told = await status_of(chat, turn_id)
        assert (told["status"], told["persisted"]) == ("open", "pending")
        assert TIME.fullmatch(told["opened_at"])
        assert [told[name] for name in ("closed_at", "usage", "stop_reason", "error")] == [None] * 4
        await answer.aread()
    # The last bytes go out when the turn is kept.
    assert (await status_of(chat, turn_id))["persisted"] == "yes"


async def test_a_turn_that_expired(chat: Chat, database_url: str) -> None:
    dev = User(chat.sessions, "dev")
    mine = await dev.chat(session_id=chat.session_id)
    turn = await mine.open(said("Hello"))
    assert (await status_of(chat, turn.id))["persisted"] == "pending"
    db = await asyncpg.connect(database_url)
    await wait(db, mine, 601)
    await db.close()
    next_one = await mine.open(said("Again"))
    told = await status_of(chat, turn.id)
    assert (told["status"], told["persisted"]) == ("expired", "none")
    assert (await status_of(chat, next_one.id))["persisted"] == "pending"


# ── while the store is away ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def own_store(database_url: str, scratch: Path) -> Callable[..., Any]:
    """Starts a session_service of the test's own on a port, on the shared database."""

    def start(port: int, **settings: str) -> Any:
        return start_session_service(database_url, scratch, port, True, **settings)

    return start


async def test_a_completion_that_waits(
    chat_at: Any, make_relay: Any, own_store: Any, upstream: TestUpstream, tmp_path: Path
) -> None:
    """Told from this relay's disk while the store is away, also by the next relay, and from the store afterwards."""
    port = free_port()
    settings = {"session_service_url": f"http://127.0.0.1:{port}", "folder": tmp_path}
    with own_store(port) as store:
        relay = make_relay(**settings)
        chat: Chat = await chat_at(relay, tmp_path)
        known = (await chat.ask("u1")).headers["x-turn-id"]
        assert (await status_of(chat, known))["persisted"] == "yes"
        upstream.script({"text": "kept", "delay_ms": 600, "stop_reason": "max_tokens"})
        asking = asyncio.create_task(chat.ask("u2"))
        await upstream.until(lambda state: state["running"] == 1)
        store.kill()
        answer = await asking
    assert answer.headers["x-session-persisted"] == "deferred"
    turn_id = answer.headers["x-turn-id"]
    told = await status_of(chat, turn_id)
    assert (told["status"], told["persisted"], told["stop_reason"]) == ("completed", "deferred", "max_tokens")
    assert told["usage"]["output_tokens"] > 0
    assert (told["model"], told["opened_at"], told["closed_at"]) == (MODEL, None, None)
    for unknown in (known, "nothing"):
        away = await look(chat, unknown)
        error_of(away, 529, "overloaded_error")
        assert int(away.headers["retry-after"]) >= 1
    assert (await look(chat, known, PATHS[2])).status_code == 503
    relay.kill()
    after: Chat = await chat_at(make_relay(**settings), tmp_path, session_id=chat.session_id)
    assert await status_of(after, turn_id) == told
    with own_store(port):
        stored = await until_persisted(after, turn_id, "yes")
        assert TIME.fullmatch(stored["closed_at"])
        times = dict.fromkeys(("opened_at", "closed_at"))
        assert stored | times | {"persisted": "deferred"} == told
        assert (await status_of(after, known))["persisted"] == "yes"
    assert list((tmp_path / "spool").iterdir()) == []


async def test_a_completion_that_the_store_refuses_for_good(
    chat_at: Any, make_relay: Any, own_store: Any, upstream: TestUpstream, tmp_path: Path
) -> None:
    port = free_port()
    with own_store(port, LIMITS__BODY_BYTES="20000"):
        relay = make_relay(session_service_url=f"http://127.0.0.1:{port}", folder=tmp_path)
        chat: Chat = await chat_at(relay, tmp_path)
        upstream.script({"text": "x" * 30_000})
        answer = await chat.ask("Hello")
        assert (answer.status_code, answer.headers["x-session-persisted"]) == (200, "none")
        told = await status_of(chat, answer.headers["x-turn-id"])
        assert (told["status"], told["persisted"], told["error"]) == ("failed", "none", {"type": "not_storable"})


# ── who may ask ─────────────────────────────────────────────────────────────────────────────────


def key_of(user_id: str, database_url: str, data_dir: Path) -> str:
    """A new key of this user."""
    command = [sys.executable, "-m", "services.relay.new_key", "--user", user_id]
    settings = {"DATABASE_URL": database_url, "DATA_DIR": str(data_dir), "ENVIRONMENT": "test"}
    environment = {"PATH": os.environ["PATH"], **settings}
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return made.stdout.strip()


async def test_only_its_own_user_sees_a_turn(chat: Chat, user_id: str, database_url: str, data_dir: Path) -> None:
    turn_id = (await chat.ask("Hello", model="demo")).headers["x-turn-id"]
    stranger = {"x-api-key": await asyncio.to_thread(key_of, user_id, database_url, data_dir)}
    not_there = []
    for asked, headers in ((turn_id, stranger), ("nothing", stranger), ("nothing", {}), ("%2e%2e", {}), ("a%3Fb", {})):
        answer = await chat.http.get(f"/v1/turns/{asked}", headers={**headers, "x-request-id": "same"})
        not_there.append(error_of(answer, 404, "not_found_error"))
    assert not_there[:3] == ["Turn not found"] * 3
    for headers in ({"x-api-key": ""}, {"x-api-key": "cr_nobodys"}):
        for asked in (turn_id, "nothing"):
            error_of(await chat.http.get(f"/v1/turns/{asked}", headers=headers), 401, "authentication_error")
    error_of(await look(chat, "x" * 256), 400, "invalid_request_error")
    assert (await status_of(chat, turn_id))["persisted"] == "yes"
