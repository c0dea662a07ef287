"""What settings change: tokens and limits; and bodies near the default limits in bytes."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.http_client import http_client
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.session_service.calls import User, fine, invalid, new_user_id, refused, said

MIB = 2**20
TOKEN = {"authorization": "Bearer one"}
SETTINGS: dict[str, Any] = {
    "SESSION_SERVICE_TOKENS": "one, two",
    "STATS_CACHE_SECONDS": "0.5",
    "LIMITS__CONTENT_BYTES": "1000",
    "LIMITS__NATIVE_BYTES": "500",
    "LIMITS__METADATA_BYTES": "200",
    "LIMITS__METADATA_DEPTH": "3",
    "LIMITS__TITLE_CHARACTERS": "10",
    "LIMITS__SUMMARY_BYTES": "100",
    "LIMITS__MEMORY_BYTES": "50",
    "LIMITS__TURN_MESSAGES": "3",
}


@pytest.fixture(scope="module")
def own(make_database: Callable[[], str]) -> str:
    """A database of this file alone: the figures of all users are those of its tests."""
    return make_database()


@pytest.fixture(scope="module")
def service(own: str, scratch: Path) -> Iterator[ServiceProcess]:
    with start_session_service(own, scratch, free_port(), **SETTINGS) as process:
        yield process


async def test_content_of_32_mebibytes_and_one_byte_more(sessions: httpx.AsyncClient) -> None:
    chat = await User(sessions, new_user_id()).chat()
    largest = "x" * (32 * MIB - 2)
    message = fine(await chat.post(largest))
    assert message["content"] == largest
    invalid(await chat.post(largest + "x"), "body", "content")
    assert (await chat.get())["message_count"] == 1


async def test_a_body_of_more_than_40_mebibytes(sessions: httpx.AsyncClient) -> None:
    user = User(sessions, new_user_id())
    body = f'{{"user_id":"{user.id}","pad":"{"x" * (40 * MIB)}"}}'.encode()
    told = refused(await sessions.post("/sessions", content=body), 413, "body_too_large")
    assert told["max_bytes"] == 40 * MIB
    assert (await user.sessions())["total"] == 0


async def test_limits_come_from_settings(service: ServiceProcess) -> None:
    async with http_client(read_seconds=10, connect_seconds=5, headers=TOKEN) as client:
        client.base_url = httpx.URL(f"{service.url}/api/v1/")
        user = User(client, new_user_id())
        chat = await user.chat(title="x" * 10, metadata={"a": "x" * 192}, conversation_data={"a": {"b": {}}})
        params = user.params
        invalid(await client.post("/sessions", json={"user_id": user.id, "title": "x" * 11}), "body", "title")
        invalid(await chat.put(metadata={"a": "x" * 193}), "body", "metadata")
        invalid(await chat.put(conversation_data={"a": {"b": {"c": {}}}}), "body", "conversation_data")
        fine(await chat.put(session_summary="é" * 50))
        invalid(await chat.put(session_summary="é" * 50 + "x"), "body", "session_summary")
        await chat.remember("x" * 50)
        memory = {"memory_type": "custom", "content": "x" * 51}
        invalid(await client.post(f"/sessions/{chat.id}/memory", params=params, json=memory), "body", "content")
        await chat.append("x" * 998, native="x" * 498)
        invalid(await chat.post("x" * 999), "body", "content")
        invalid(await chat.post("é" * 500), "body", "content")
        invalid(await chat.post("\x01" * 167), "body", "content")  # six bytes each, as JSON
        invalid(await chat.post([{"type": "text", "text": "x" * 980}]), "body", "content")
        invalid(await chat.post("x", native="x" * 499), "body", "native")
        invalid(await chat.turn(*[said("x")] * 4), "body", "messages")
        turn = await chat.open(*[said("x")] * 3)
        invalid(await turn.finish(*[said("x", "assistant")] * 4), "body", "messages")
        assert (await chat.get())["message_count"] == 4


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "one",
        "Bearer",
        "Bearer three",
        "Basic one",
        "Bearer one,two",
        "Bearer ONE",
        "Token one",
        "Bearer one two",
        "Bearer \xe9",
    ],
)
async def test_without_one_of_the_tokens(service: ServiceProcess, sent: str | None) -> None:
    headers = httpx.Headers([] if sent is None else [(b"authorization", sent.encode("latin-1"))])
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:
        for method, path in (
            ("GET", "/api/v1/sessions?user_id=u"),
            ("POST", "/api/v1/sessions"),
            ("GET", "/api/v1/sessions/stats"),
            ("GET", "/docs"),
            ("GET", "/openapi.json"),
            ("GET", "/nowhere"),
            ("GET", "/api/v1/../health/../api/v1/sessions/stats"),
        ):
            answer = await client.request(method, path, headers=headers)
            refused(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/health/live", "/health/ready", "/health/detailed", "/metrics"):
            assert (await client.get(path, headers=headers)).status_code == 200


@pytest.mark.parametrize("sent", ["Bearer one", "Bearer two", "bearer one", "BEARER  two"])
async def test_with_one_of_the_tokens(service: ServiceProcess, sent: str) -> None:
    headers = {"authorization": sent}
    async with httpx.AsyncClient(base_url=f"{service.url}/api/v1", trust_env=False, headers=headers) as client:
        await User(client, new_user_id()).create()
    assert "one" not in json.dumps([json.loads(line).get("authorization") for line in service.logged().splitlines()])


# ── figures of all users ────────────────────────────────────────────────────────────────────────


async def test_the_stats_of_all_users_are_true_and_at_most_so_old(service: ServiceProcess) -> None:
    async with httpx.AsyncClient(base_url=f"{service.url}/api/v1", trust_env=False, headers=TOKEN) as client:
        await asyncio.sleep(0.5)
        before = fine(await client.get("/sessions/stats"))
        for number in range(3):
            chat = await User(client, new_user_id()).chat()
            for _ in range(number):
                await chat.append("x", tokens_used=7, cost_usd=0.25)
        fine(await chat.end())
        expected = before | {
            "total_sessions": before["total_sessions"] + 3,
            "active_sessions": before["active_sessions"] + 2,
            "total_messages": before["total_messages"] + 3,
            "total_tokens": before["total_tokens"] + 21,
            "total_cost": before["total_cost"] + 0.75,
        }
        expected["average_messages_per_session"] = round(expected["total_messages"] / expected["total_sessions"], 1)
        began = time.monotonic()
        while (stats := fine(await client.get("/sessions/stats"))) != expected:
            assert time.monotonic() - began < 2, stats
            await asyncio.sleep(0.05)
        answers = await asyncio.gather(*(client.get("/sessions/stats") for _ in range(50)))
        assert {answer.content for answer in answers} == {answers[0].content}
