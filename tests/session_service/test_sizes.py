"""Bodies and contents near their limits in bytes, with the defaults and with limits from settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.http_client import http_client
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.session_service.calls import User, fine, invalid, new_user_id, refused, said

MIB = 2**20
SMALL: dict[str, Any] = {
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
def small(database_url: str, scratch: Path) -> Iterator[ServiceProcess]:
    with start_session_service(database_url, scratch, free_port(), **SMALL) as process:
        yield process


async def test_content_of_32_mebibytes_and_one_byte_more(sessions: httpx.AsyncClient) -> None:
    chat = await User(sessions, new_user_id()).chat()
    largest = "x" * (32 * MIB - 2)
    message = fine(await chat.post(largest))
    assert message["content"] == largest
    invalid(await chat.post(largest + "x"), "body", "content")
    escaped = "\x01" * (6 * MIB)  # six bytes each, as JSON
    invalid(await chat.post(escaped), "body", "content")
    assert (await chat.get())["message_count"] == 1


async def test_a_body_of_more_than_40_mebibytes(sessions: httpx.AsyncClient) -> None:
    user = User(sessions, new_user_id())
    body = f'{{"user_id":"{user.id}","pad":"{"x" * (40 * MIB)}"}}'.encode()
    told = refused(await sessions.post("/sessions", content=body), 413, "body_too_large")
    assert told["max_bytes"] == 40 * MIB
    fits = body[: 40 * MIB - 2] + b'"}'
    fine(await sessions.post("/sessions", content=fits))
    assert (await user.sessions())["total"] == 1


async def test_limits_come_from_settings(small: ServiceProcess) -> None:
    async with http_client(read_seconds=10, connect_seconds=5) as client:
        client.base_url = httpx.URL(f"{small.url}/api/v1/")
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
        invalid(await chat.post([{"type": "text", "text": "x" * 980}]), "body", "content")
        invalid(await chat.post("x", native="x" * 499), "body", "native")
        invalid(await chat.turn(*[said("x")] * 4), "body", "messages")
        turn = await chat.open(*[said("x")] * 3)
        invalid(await turn.finish(*[said("x", "assistant")] * 4), "body", "messages")
        assert (await chat.get())["message_count"] == 4
