"""Streams that do not go well: cut, broken, silent, left by their client."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.relay.calls import MODEL, Chat, events_of, rest_account, streamed_text
from tests.upstream.client import TestUpstream

LONG = "word " * 60


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"cut_after_events": 6}, "overloaded_error"),
        ({"cut_after_events": 6, "cut": "reset"}, "overloaded_error"),
        ({"cut_after_events": 6, "cut": "end"}, "overloaded_error"),
        ({"malformed_event": True, "after_events": 6}, "overloaded_error"),
        ({"huge_event_bytes": 9_000_000, "after_events": 6}, "api_error"),
    ],
)
async def test_a_stream_that_breaks_ends_with_one_error(
    chat: Chat, upstream: TestUpstream, fault: dict[str, Any], kind: str
) -> None:
    upstream.script({"text": LONG, **fault})
    whole = await chat.stream_whole("Hello")
    events = events_of(whole)
    assert [name for name, _ in events].count("error") == 1
    name, data = events[-1]
    assert name == "error"
    assert data["error"]["type"] == kind
    assert data["request_id"]
    text = streamed_text(whole)
    assert text
    assert LONG.startswith(text)
    stored = await chat.stored()
    assert [(each["role"], each["content"]) for each in stored] == [("user", "Hello"), ("assistant", text)]
    assert stored[1]["content_blocks"] == [{"type": "text", "text": text}]
    turn = await chat.until_turn("interrupted")
    assert turn["usage"]["output_tokens"] > 1
    # The session goes on, and what came is part of its context.
    upstream.reset()
    await chat.say("Go on")
    assert upstream.requests("/v1/messages")[0]["json"]["messages"][1]["content"][0]["text"] == text.rstrip()


async def test_upstreams_own_error_event_passes_on(chat: Chat, upstream: TestUpstream) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    upstream.script({"text": LONG, "error_event": error, "after_events": 6})
    events = events_of(await chat.stream_whole("Hello"))
    assert events[-1] == ("error", error)
    assert [name for name, _ in events].count("error") == 1
    await chat.until_turn("interrupted")


async def test_an_error_event_about_the_operators_account_does_not(chat: Chat, upstream: TestUpstream) -> None:
    error = {"type": "error", "error": {"type": "authentication_error", "message": "key k-123 is revoked"}}
    upstream.script({"text": LONG, "error_event": error, "after_events": 6})
    whole = await chat.stream_whole("Hello")
    assert b"k-123" not in whole
    assert events_of(whole)[-1][1]["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ({"cut_after_events": 1}, 529),
        ({"malformed_event": True, "after_events": 1}, 529),
        ({"error_event": {"type": "error", "error": {"type": "overloaded_error"}}, "after_events": 1}, 529),
        ({"error_event": {"type": "error", "error": {"type": "rate_limit_error"}}, "after_events": 0}, 429),
        ({"garbage": "not HTTP"}, 529),
        ({"close": True}, 529),
        ({"redirect": "http://127.0.0.1:1/"}, 529),
        ({"raw_events": []}, 529),
    ],
)
async def test_before_the_first_content_a_failure_is_a_status(
    chat: Chat, upstream: TestUpstream, fault: dict[str, Any], status: int
) -> None:
    upstream.script({"text": LONG, **fault})
    async with chat.stream("Hello") as answer:
        await answer.aread()
    assert answer.status_code == status
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-session-persisted"] == "yes"
    assert (await chat.until_turn("failed"))["turn_id"] == answer.headers["x-turn-id"]
    assert await chat.history() == [("user", "Hello")]


async def test_silence_is_filled_with_pings(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    chat: Chat = await chat_at(make_relay(RELAY_PING_SECONDS="0.2"))
    upstream.script({"text": LONG, "hang_seconds": 0.7, "after_events": 4})
    whole = await chat.stream_whole("Hello")
    assert 2 <= whole.count(b'event: ping\ndata: {"type": "ping"}\n\n') <= 5
    assert streamed_text(whole) == LONG
    assert events_of(whole)[-1][0] == "message_stop"


async def test_a_ping_before_the_answer_sends_the_head_out(
    chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    chat: Chat = await chat_at(make_relay(RELAY_PING_SECONDS="0.2", RELAY_RETRY_WAIT_SECONDS="0"))
    upstream.script({"text": "late", "delay_ms": 700}, {"status": 503, "delay_ms": 700})
    whole = await chat.stream_whole("Hello")
    assert whole.startswith(b'event: ping\ndata: {"type": "ping"}\n\n')
    assert streamed_text(whole) == "late"
    assert events_of(whole)[-1][0] == "message_stop"
    failed = events_of(await chat.stream_whole("Hello"))
    assert {name for name, _ in failed[:-1]} == {"ping"}
    assert failed[-1][1]["error"]["type"] == "overloaded_error"
    assert [each["status"] for each in await chat.turns()] == ["failed", "completed"]


@pytest.mark.parametrize("path", ["/v1/messages", "/claude-kiro-oauth/v1/messages"])
async def test_after_a_ping_whatever_comes_is_told_in_the_stream(
    chat_at: Any, make_relay: Any, upstream: TestUpstream, path: str
) -> None:
    """Also upstream's refusal, and an answer that comes as a whole."""
    chat: Chat = await chat_at(make_relay(RELAY_PING_SECONDS="0.1"))
    refusal = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": MODEL, "stop_reason": "end_turn"}
    answers = [(400, refusal), (413, "<html>"), (200, message | {"content": [{"type": "text", "text": "whole"}]})]
    upstream.script(*({"status": status, "body": body, "delay_ms": 400} for status, body in answers))
    streams = []
    for _ in answers:
        answer = await chat.http.post(path, json=chat.body("Hello", stream=True))
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        streams.append([each for each in events_of(answer.content) if each[0] != "ping"])
        assert answer.text.count("\n\n") == answer.text.count("event: ")
    unread = {"type": "request_too_large", "message": "The upstream refused the request"}
    assert streams[:2] == [[("error", refusal)], [("error", {"type": "error", "error": unread})]]
    assert (streams[2][0][0], streams[2][-1][0]) == ("message_start", "message_stop")
    assert streamed_text(answer.content) == "whole"
    assert await chat.history() == [("user", "Hello"), ("assistant", "whole")]


async def test_a_silent_upstream_is_given_up(
    chat_at: Any, make_relay: Any, upstream: TestUpstream, data_dir: Path
) -> None:
    hasty = {"RELAY_STREAM_SILENCE_SECONDS": "0.3", "RELAY_PLAIN_TIMEOUT_SECONDS": "0.3", "RELAY_MAX_ATTEMPTS": "1"}
    relay = make_relay(**hasty)
    chat: Chat = await chat_at(relay)
    upstream.script({"hang_seconds": 30, "repeat": 2}, {"text": LONG, "hang_seconds": 30, "after_events": 6})
    assert (await chat.ask("Hello")).status_code == 504
    rest_account(relay, data_dir)
    async with chat.stream("Hello") as answer:
        await answer.aread()
    assert answer.status_code == 504
    assert answer.headers["x-relay-attempts"] == "1"
    rest_account(relay, data_dir)
    events = events_of(await chat.stream_whole("Hello"))
    assert events[-1][1]["error"]["type"] == "timeout_error"
    await upstream.until(lambda state: state["running"] == 0)


# ── clients that go ─────────────────────────────────────────────────────────────────────────────


async def hang_up(chat: Chat, **fields: Any) -> bytes:
    """Reads the beginning of a stream, and leaves."""
    async with httpx.AsyncClient(base_url=chat.http.base_url, headers=chat.http.headers, trust_env=False) as client:
        body = chat.body("Hello", stream=True, **fields)
        async with client.stream("POST", "/v1/messages", json=body) as answer:
            seen = b""
            async for chunk in answer.aiter_raw():
                seen += chunk
                if seen.count(b"content_block_delta") >= 4:
                    break
    return seen


async def test_a_client_that_hangs_up_frees_upstream_within_a_second(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": LONG, "event_delay_ms": 30})
    seen = await hang_up(chat)
    left_at = time.monotonic()
    await upstream.until(lambda state: state["running"] == 0, seconds=1)
    turn = await chat.until_turn("interrupted")
    assert time.monotonic() - left_at < 1
    assert turn["error"] == {"type": "client_gone"}
    stored = (await chat.stored())[1]["content"]
    assert stored.startswith(streamed_text(seen.rpartition(b"\n\n")[0]))
    assert upstream.requests("/v1/messages")[0]["outcome"] == "disconnected"
    await chat.say("The session goes on")


async def test_a_client_that_hangs_up_on_a_silent_upstream(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": LONG, "hang_seconds": 30, "after_events": 12})
    await hang_up(chat)
    await upstream.until(lambda state: state["running"] == 0, seconds=1)
    await chat.until_turn("interrupted")


async def test_a_client_that_hangs_up_before_a_plain_answer(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"hang_seconds": 30})
    asking = asyncio.create_task(chat.ask("Hello"))
    await upstream.until(lambda state: state["running"] == 1)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await upstream.until(lambda state: state["running"] == 0, seconds=1)
    await chat.until_turn("interrupted")
    assert await chat.history() == [("user", "Hello")]


async def test_a_client_that_hangs_up_while_its_session_is_busy(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"delay_ms": 500, "text": "a1"})
    first = asyncio.create_task(chat.say("u1"))
    await upstream.until(lambda state: state["running"] == 1)
    second = asyncio.create_task(chat.ask("u2"))
    await asyncio.sleep(0.1)
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    await chat.say("u3")
    assert [content for role, content in await chat.history() if role == "user"] == ["u1", "u3"]
    assert [turn["status"] for turn in await chat.turns()] == ["completed", "completed"]


async def test_drain_reads_to_the_end_without_the_client(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    chat: Chat = await chat_at(make_relay(RELAY_ON_DISCONNECT="drain"))
    upstream.script({"text": LONG, "event_delay_ms": 10})
    await hang_up(chat)
    await chat.until_turn("completed")
    assert (await chat.stored())[1]["content"] == LONG
    assert upstream.requests("/v1/messages")[0]["outcome"] == "finished"


async def test_a_client_that_does_not_read(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    """It holds upstream back, costs no memory, and is given up after a while."""
    relay = make_relay(RELAY_STALLED_CLIENT_SECONDS="0.5")
    chat: Chat = await chat_at(relay)
    upstream.script({"text": "x" * 40_000_000, "delta_characters": 4000})
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port, limit=1024)
    request = chat.http.build_request("POST", "/v1/messages", json=chat.body("Hello", stream=True))
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    writer.write(f"POST /v1/messages HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    await writer.drain()
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    turn = await chat.until_turn("interrupted", seconds=10)
    assert turn["error"] == {"type": "client_stalled"}
    assert len((await chat.stored())[1]["content"]) < 20_000_000
    writer.close()


async def test_a_slow_client_gets_everything(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": "y" * 3_000_000, "delta_characters": 1000})
    text_bytes = 0
    async with chat.stream("Hello") as answer:
        async for chunk in answer.aiter_raw():
            text_bytes += chunk.count(b"y")
            await asyncio.sleep(0.001)
    assert text_bytes >= 3_000_000
    assert len((await chat.stored())[1]["content"]) == 3_000_000


async def test_what_is_stored_of_a_broken_tool_call(chat: Chat, upstream: TestUpstream) -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm. " * 10, "signature": "c2ln"},
        {"type": "tool_use", "id": "t1", "name": "clock", "input": {"zone": "Europe/Berlin", "more": "x" * 50}},
    ]
    upstream.script({"blocks": blocks, "cut_after_events": 12})
    await chat.stream_whole("Hello")
    kept = (await chat.stored())[1]["content_blocks"]
    assert kept[0] == blocks[0]
    assert kept[1]["incomplete"] is True
    assert kept[1]["input"] == {}
    assert '{"zone": "Eur'.startswith(kept[1]["partial_json"][:10])
    upstream.reset()
    upstream.script({"blocks": blocks, "cut_after_events": 4})
    await chat.stream_whole("Again")
    last = (await chat.stored())[-1]["content_blocks"]
    assert last[0]["type"] == "thinking"
    assert last[0]["incomplete"] is True
    await chat.say("On we go")


async def test_usage_that_is_missing_or_wrong_is_estimated(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"usage": None}, {"usage": {"input_tokens": -5}})
    await chat.say("Hello")
    await chat.stream_whole("Hello")
    stored = await chat.stored()
    assert [each["metadata"] for each in stored if each["role"] == "assistant"] == [{"usage_estimated": True}] * 2
    for turn in await chat.turns():
        assert turn["usage"]["input_tokens"] > 0
        assert turn["usage"]["output_tokens"] > 0


async def test_figures_that_nobody_knows_harm_no_answer(chat: Chat, upstream: TestUpstream) -> None:
    odd = {"strange_tokens": -3, "odd_tokens": 10**18, "service_tier": 7}
    upstream.script({"text": "hi", "usage": odd}, {"text": "hi", "usage": odd})
    assert await chat.say("Hello") == "hi"
    assert events_of(await chat.stream_whole("Hello"))[-1][0] == "message_stop"
    metrics = (await chat.http.get("/metrics")).text
    assert 'type="output"' in metrics
    assert "strange" not in metrics
    assert 'type="odd"' not in metrics
