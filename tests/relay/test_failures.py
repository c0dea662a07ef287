"""When upstream fails: what the client hears, and what is kept."""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.relay.calls import Chat, error_of
from tests.upstream.client import TestUpstream

KEY = f"k1:{base64.b64encode(bytes(32)).decode()}"
KIRO = "/claude-kiro-oauth/v1/messages"


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_what_is_the_clients_passes_on(chat: Chat, upstream: TestUpstream, status: int) -> None:
    exact = ' {"type":"error", "error":{"type":"invalid_request_error","message":"bad image"}}'
    upstream.script({"status": status, "body": exact})
    answer = await chat.ask("Look at this")
    assert (answer.status_code, answer.content) == (status, exact.encode())
    assert answer.headers["x-session-persisted"] == "yes"
    assert await chat.stored() == []
    turn = await chat.until_turn("refused")
    assert turn["error"] == {"type": "invalid_request_error", "message": "bad image"}
    assert await chat.say("The session goes on")


@pytest.mark.parametrize(
    ("step", "status", "kind"),
    [
        ({"status": 500}, 529, "overloaded_error"),
        ({"status": 502, "body": "<html>"}, 529, "overloaded_error"),
        ({"status": 529}, 529, "overloaded_error"),
        ({"status": 401}, 529, "overloaded_error"),
        ({"status": 403}, 529, "overloaded_error"),
        ({"status": 402}, 529, "overloaded_error"),
        ({"status": 429, "headers": {"retry-after": "17"}}, 429, "rate_limit_error"),
        ({"status": 418}, 529, "overloaded_error"),
        ({"status": 204}, 529, "overloaded_error"),
        ({"body": "not JSON"}, 529, "overloaded_error"),
        ({"body": {"content": "not a list"}}, 529, "overloaded_error"),
        ({"body": '{"content": [], "x": NaN}'}, 529, "overloaded_error"),
        ({"close": True}, 529, "overloaded_error"),
        ({"text": "Hello", "cut_after_bytes": 20}, 529, "overloaded_error"),
        ({"huge_answer_bytes": 70_000_000}, 500, "api_error"),
    ],
)
async def test_what_is_upstreams_fault(
    chat: Chat, upstream: TestUpstream, rest: Callable[[], None], step: dict[str, Any], status: int, kind: str
) -> None:
    upstream.script(step)
    answer = await chat.ask("Hello")
    message = error_of(answer, status, kind)
    assert "scripted" not in message
    assert answer.headers["x-should-retry"] == "false"
    if status == 429:
        assert answer.headers["retry-after"] == "17"
    assert (await chat.until_turn("failed"))["turn_id"] == answer.headers["x-turn-id"]
    assert answer.headers["x-relay-attempts"] == "1"
    assert await chat.history() == [("user", "Hello")]
    rest()
    await chat.say("The session goes on")


@pytest.mark.parametrize(
    ("step", "status", "kind", "message"),
    [
        ({"status": 403}, 403, "forbidden", "账号已被禁用"),
        ({"status": 429}, 429, "rate_limit", "请求过于频繁"),
    ],
)
async def test_the_seeds_bodies(
    chat: Chat,
    upstream: TestUpstream,
    rest: Callable[[], None],
    step: dict[str, Any],
    status: int,
    kind: str,
    message: str,
) -> None:
    for prefix in ("", "/api/v1"):
        rest()
        upstream.script(step)
        answer = await chat.http.post(prefix + KIRO, json=chat.body("Hello"))
        assert answer.status_code == status
        assert answer.json() == {"type": "error", "error": {"type": kind, "message": message}}


async def test_where_there_is_no_account(chat_at: Any, make_relay: Any, session_service: Any, tmp_path: Path) -> None:
    secrets = {"RELAY_ADMIN_TOKEN": "a", "RELAY_KEY_PEPPER": "p", "SESSION_SERVICE_TOKENS": "t"}
    secrets["RELAY_ENCRYPTION_KEYS"] = KEY
    none = {"RELAY_UPSTREAM_URL": "", "RELAY_UPSTREAM_API_KEY": "", "ENVIRONMENT": "production"}
    relay = make_relay(folder=tmp_path, **secrets, **none)
    health = httpx.get(f"{relay.url}/queue/health", trust_env=False)
    assert health.status_code == 503
    assert health.json()["accounts"]["available"] == 0
    assert not (tmp_path / "api.key").exists()


async def test_the_demo_serves_other_models_only_alone(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    alone: Chat = await chat_at(make_relay(RELAY_UPSTREAM_URL="", RELAY_UPSTREAM_API_KEY=""))
    assert "demo model" in await alone.say("Hello", model="claude-sonnet-4-5")
    assert upstream.requests() == []


async def test_too_many_at_once(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    chat: Chat = await chat_at(make_relay(RELAY_MAX_IN_FLIGHT="2", RELAY_MAX_QUEUED="0"))
    upstream.script({"delay_ms": 400, "repeat": 2})
    others = [Chat(chat.http, chat.sessions) for _ in range(2)]
    busy = [asyncio.create_task(each.say("Hello")) for each in others]
    await upstream.until(lambda state: state["running"] == 2)
    answer = await chat.ask("Hello")
    error_of(answer, 429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1
    await asyncio.gather(*busy)
    await chat.say("Hello")
