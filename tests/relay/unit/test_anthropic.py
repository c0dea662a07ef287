"""The Anthropic adapter against a real upstream process, on its good days and its bad ones."""

import asyncio
import base64
import gzip
import json
import logging
import socket
import time
import traceback
from typing import Any

import pytest

from services.relay import sse
from services.relay.assembly import Assembly, MalformedEvent
from services.relay.upstream import (
    COUNT_TOKENS_PATH,
    MESSAGES_PATH,
    AnswerTooLarge,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRequest,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from services.relay.upstream.anthropic import AnthropicUpstream, Timeouts
from services.relay.upstream.client import Client, create_client
from tests.upstream.client import TestUpstream

KEY = "sk-very-secret-key"


@pytest.fixture
def account(upstream: TestUpstream, client: Client) -> AnthropicUpstream:
    return AnthropicUpstream(client, base_url=upstream.url, api_key=KEY)


@pytest.fixture
def hasty(upstream: TestUpstream, client: Client) -> AnthropicUpstream:
    timeouts = Timeouts(connect_seconds=2, silence_seconds=0.5, plain_seconds=0.5)
    return AnthropicUpstream(client, base_url=upstream.url, api_key=KEY, timeouts=timeouts)


def request(text: str = "hi", *, stream: bool = True, **more: Any) -> UpstreamRequest:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": text}], **more}
    return UpstreamRequest(MESSAGES_PATH, "", {}, body | ({"stream": True} if stream else {}))


async def read_events(
    account: AnthropicUpstream, sent: UpstreamRequest, events: list[sse.Event] | None = None
) -> list[sse.Event]:
    """All events of the answer; those before a failure are in `events`."""
    events = [] if events is None else events
    async with await account.open(sent) as answer:
        assert answer.status == 200
        async for event in sse.Events(answer.chunk):
            events.append(event)
    return events


async def assemble(account: AnthropicUpstream, sent: UpstreamRequest) -> Assembly:
    assembly = Assembly()
    async with await account.open(sent) as answer:
        async for event in sse.Events(answer.chunk):
            assembly.add(event)
    return assembly


async def test_what_goes_out(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    headers = {"Anthropic-Beta": "a,b", "Authorization": "Bearer of-a-client", "x-api-key": "client", "cookie": "c=1"}
    body = request("你好 \ud800 \0", stream=False, unknown={"deep": [1, None, 2**70]}).body
    async with await account.open(UpstreamRequest(MESSAGES_PATH, "beta=true&x=%20y", headers, body)) as answer:
        assert answer.status == 200
        await answer.read()
    (received,) = upstream.requests()
    assert (received["path"], received["query"]) == ("/v1/messages", "beta=true&x=%20y")
    assert received["json"] == body
    sent = received["headers"]
    assert {name: sent[name] for name in ("x-api-key", "anthropic-version", "anthropic-beta", "accept-encoding")} == {
        "x-api-key": KEY,
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "a,b",
        "accept-encoding": "identity",
    }
    assert sent["user-agent"].startswith("session-relay/")
    assert sent["content-type"] == "application/json"
    assert not {"authorization", "cookie", "transfer-encoding"} & sent.keys()


async def test_the_clients_anthropic_version_wins(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    sent = UpstreamRequest(MESSAGES_PATH, "", {"anthropic-version": "2099-01-01"}, request().body)
    await (await account.open(sent)).aclose()
    assert upstream.requests()[0]["headers"]["anthropic-version"] == "2099-01-01"


async def test_base_url_with_a_path(upstream: TestUpstream, client: Client) -> None:
    account = AnthropicUpstream(client, base_url=upstream.url + "/some/path/", api_key=KEY)
    async with await account.open(UpstreamRequest(COUNT_TOKENS_PATH, "", {}, request(stream=False).body)) as answer:
        assert json.loads(await answer.read())["input_tokens"] > 0
    assert upstream.requests()[0]["path"] == "/some/path/v1/messages/count_tokens"


async def test_bytes_pass_as_they_are(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    raw = [b"event: x\r\ndata: 1\r\n\r\n", b": \xff\xfe\n\n", b"data:2\r\r", "data: 你好\n\n".encode(), b"data: end"]
    for size in (1, 3, 1000):
        events = [{"base64": base64.b64encode(one).decode()} for one in raw]
        upstream.script({"raw_events": events, "chunk_bytes": size})
        assert b"".join(event.raw for event in await read_events(account, request())) == b"".join(raw)


async def test_stream_and_plain_give_the_same_message(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "see", "citations": [{"type": "char_location", "cited_text": "x"}]},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"q": "你好", "n": [1, 2.5, None]}},
    ]
    step = {
        "blocks": blocks,
        "message": {"id": "msg_1"},
        "insert": [{"event": "new", "data": {}}],
        "delta_characters": 2,
    }
    upstream.script(step, step)
    assembly = await assemble(account, request())
    async with await account.open(request(stream=False)) as answer:
        assert assembly.message() == json.loads(await answer.read())


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500, 529])
async def test_a_status_is_an_answer(account: AnthropicUpstream, upstream: TestUpstream, status: int) -> None:
    upstream.script({"status": status, "headers": {"retry-after": "7", "x-twice": ["a", "b"]}})
    async with await account.open(request()) as answer:
        assert answer.status == status
        assert answer.headers["retry-after"] == "7"
        assert answer.headers["x-twice"] == "a, b"
        assert json.loads(await answer.read())["type"] == "error"


# ── failures ────────────────────────────────────────────────────────────────────────────────────


async def test_no_connection(client: Client) -> None:
    with pytest.raises(UpstreamUnreachable) as caught:
        await AnthropicUpstream(client, base_url="http://127.0.0.1:1", api_key=KEY).open(request())
    assert caught.value.nothing_received


@pytest.mark.parametrize("stream", [True, False])
async def test_a_silent_upstream_times_out(hasty: AnthropicUpstream, upstream: TestUpstream, stream: bool) -> None:
    upstream.script({"hang_seconds": 30})
    started = time.monotonic()
    with pytest.raises(UpstreamTimeout) as caught:
        await hasty.open(request(stream=stream))
    assert caught.value.nothing_received
    assert time.monotonic() - started < 2
    await upstream.until(lambda state: state["running"] == 0 and state["connections"] == 0, seconds=1)


async def test_a_stream_that_stalls_times_out(hasty: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"hang_seconds": 30, "after_events": 4})
    events: list[sse.Event] = []
    with pytest.raises(UpstreamTimeout) as caught:
        await read_events(hasty, request(), events)
    assert (len(events), caught.value.nothing_received) == (4, False)


@pytest.mark.parametrize(
    "step", [{"close": True}, {"garbage": "SSH-2.0-nothing\r\n"}, {"garbage": "HTTP/1.1 abc\r\n\r\n"}]
)
async def test_no_answer(account: AnthropicUpstream, upstream: TestUpstream, step: dict[str, Any]) -> None:
    upstream.script(step)
    with pytest.raises(UpstreamProtocolError) as caught:
        await account.open(request())
    assert caught.value.nothing_received


@pytest.mark.parametrize("cut", ["close", "reset"])
@pytest.mark.parametrize("where", [{"cut_after_events": 5}, {"cut_after_bytes": 700}])
async def test_cut_streams(account: AnthropicUpstream, upstream: TestUpstream, cut: str, where: dict[str, int]) -> None:
    upstream.script({**where, "cut": cut})
    events: list[sse.Event] = []
    with pytest.raises(UpstreamProtocolError) as caught:
        await read_events(account, request(), events)
    assert not caught.value.nothing_received
    if cut == "close":  # what had arrived whole is not lost
        assert len(events) == upstream.requests()[0]["events_sent"] > 0


async def test_a_body_that_ends_early_as_if_whole_is_not_finished(
    account: AnthropicUpstream, upstream: TestUpstream
) -> None:
    upstream.script({"cut_after_events": 5, "cut": "end"})
    assembly = await assemble(account, request())
    assert (assembly.committed, assembly.finished) == (True, False)


async def test_a_plain_answer_cut(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"cut_after_bytes": 50})
    with pytest.raises(UpstreamProtocolError):
        async with await account.open(request(stream=False)) as answer:
            await answer.read()


@pytest.mark.parametrize("body", [b"zz\r\ndata\r\n0\r\n\r\n", b"5\r\ndataXX\r\n"])
async def test_broken_chunks(account: AnthropicUpstream, upstream: TestUpstream, body: bytes) -> None:
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    upstream.script({"garbage": head + body.decode()})
    with pytest.raises(UpstreamProtocolError):
        async with await account.open(request()) as answer:
            await answer.read()


async def test_malformed_huge_and_error_events(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"malformed_event": True}, {"huge_event_bytes": 9 * 2**20}, {"error_event": {"type": "error"}})
    with pytest.raises(MalformedEvent):
        await assemble(account, request())
    with pytest.raises(sse.EventTooLarge):
        await read_events(account, request())
    assert [event.name for event in await read_events(account, request())][-1] == "error"


async def test_an_answer_over_the_limit(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"huge_answer_bytes": 3 * 2**20}, {"huge_answer_bytes": 65 * 2**20})
    with pytest.raises(AnswerTooLarge):
        async with await account.open(request(stream=False)) as answer:
            await answer.read(limit_bytes=2**20)
    with pytest.raises(AnswerTooLarge):
        await assemble(account, request())


async def test_redirects_are_not_followed(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"redirect": f"{upstream.url}/elsewhere"})
    with pytest.raises(UpstreamProtocolError, match="redirect"):
        await account.open(request())
    assert [entry["path"] for entry in upstream.requests()] == ["/v1/messages"]


async def test_an_upstream_that_takes_no_bytes(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # the kernel accepts; nobody reads
        timeouts = Timeouts(connect_seconds=0.3, silence_seconds=0.3)
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        account = AnthropicUpstream(client, base_url=url, api_key=KEY, timeouts=timeouts)
        with pytest.raises(UpstreamTimeout):
            await asyncio.wait_for(account.open(request("x" * (32 * 2**20))), 5)
    await asyncio.sleep(0.05)  # closing it resets the connection


async def test_a_body_compressed_against_our_wish(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    body = gzip.compress(b"data: 1\n\n")
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    upstream.script({"garbage": {"base64": base64.b64encode(head + body).decode()}})
    async with await account.open(request()) as answer:
        assert not {"content-encoding", "content-length"} & set(answer.headers)
        assert await answer.read() == b"data: 1\n\n"


async def test_a_query_that_no_url_can_hold(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    for query in ("x" * 70_000, "a\0b"):
        with pytest.raises(ValueError, match="query"):
            await account.open(UpstreamRequest(MESSAGES_PATH, query, {}, request().body))
    assert upstream.requests() == []


# ── connections ─────────────────────────────────────────────────────────────────────────────────


async def test_closing_a_running_stream_ends_the_connection(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"event_delay_ms": 20, "text": "x" * 60_000})
    answer = await account.open(request())
    assert await answer.chunk()
    started = time.time()
    await answer.aclose()
    assert time.time() - started < 0.5
    await upstream.until(lambda state: state["running"] == 0 and state["connections"] == 0, seconds=1)
    (entry,) = upstream.requests()
    assert entry["outcome"] == "disconnected"
    assert entry["ended_at"] - started < 1


async def test_closing_wakes_a_reader_in_another_task(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"hang_seconds": 30, "after_events": 2})
    answer = await account.open(request())
    reading = asyncio.create_task(answer.read())
    await asyncio.sleep(0.1)
    await answer.aclose()
    with pytest.raises(UpstreamProtocolError):
        await asyncio.wait_for(reading, 1)
    await answer.aclose()  # once more does no harm


async def test_cancelling_ends_the_connection(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"hang_seconds": 30}, {"hang_seconds": 30, "after_events": 2})
    opening = asyncio.create_task(account.open(request()))
    await upstream.until(lambda state: state["running"] == 1)
    opening.cancel()
    await upstream.until(lambda state: state["running"] == 0, seconds=1)
    reading = asyncio.create_task(read_events(account, request()))
    await upstream.until(lambda state: state["running"] == 1)
    await asyncio.sleep(0.1)
    reading.cancel()
    await upstream.until(lambda state: state["running"] == 0 and state["connections"] == 0, seconds=1)
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_connections_are_kept_and_cookies_are_not(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    upstream.script({"repeat": 3, "headers": {"set-cookie": "session=1; Path=/"}})
    for stream in (True, False, True):
        async with await account.open(request(stream=stream)) as answer:
            await answer.read()
    entries = upstream.requests()
    assert len({entry["connection"] for entry in entries}) == 1
    assert not any("cookie" in entry["headers"] for entry in entries)


async def test_a_proxy_in_the_environment_is_not_used(upstream: TestUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with create_client() as client:
        account = AnthropicUpstream(client, base_url=upstream.url, api_key=KEY)
        async with await account.open(request()) as answer:
            assert answer.status == 200


async def test_a_tunnel_is_asked_for_with_the_proxys_credentials() -> None:
    """And with nothing of the account's; what upstream gets goes through it encrypted."""
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with create_client(f"http://some%20one:p%3A%40@127.0.0.1:{port}") as client:
            account = AnthropicUpstream(client, base_url="https://upstream.invalid/x", api_key=KEY)
            with pytest.raises(UpstreamUnreachable):
                await account.open(request())
    (head,) = heads
    lines = head.decode().split("\r\n")
    credentials = base64.b64encode(b"some one:p:@").decode()
    assert lines[0] == "CONNECT upstream.invalid:443 HTTP/1.1"
    assert f"proxy-authorization: basic {credentials}".lower() in [line.lower() for line in lines]
    assert KEY not in head.decode()
    assert "anthropic" not in head.decode()


async def test_300_streams_at_once(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    """All of them open together: none waits for another's connection."""
    upstream.script({"repeat": 300, "hang_seconds": 1.0, "after_events": 3, "text": "word " * 20})
    tasks = [asyncio.create_task(read_events(account, request(f"number {n}"))) for n in range(300)]
    await upstream.until(lambda state: state["running"] == 300, seconds=10)
    streams = await asyncio.gather(*tasks)
    assert all(events[-1].name == "message_stop" for events in streams)
    assert upstream.state()["running"] == 0


async def test_a_large_request(account: AnthropicUpstream, upstream: TestUpstream) -> None:
    sent = request("x" * (8 * 2**20), stream=False)
    async with await account.open(sent) as answer:
        assert answer.status == 200
        await answer.read()
    (received,) = upstream.requests()
    assert received["json"] == sent.body
    assert "transfer-encoding" not in received["headers"]
    assert int(received["headers"]["content-length"]) == len(received["body"])


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────


async def test_the_key_is_nowhere(
    hasty: AnthropicUpstream, upstream: TestUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    upstream.script(
        {"close": True}, {"hang_seconds": 30}, {"cut_after_events": 2}, {"redirect": "/x"}, {"garbage": "x"}
    )
    texts = [repr(hasty)]
    for _ in range(5):
        with pytest.raises(UpstreamError) as caught:
            await read_events(hasty, request())
        error: BaseException | None = caught.value
        texts.append("".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()))
        while error is not None:
            texts += [repr(error), str(error), repr(vars(error))]
            error = error.__cause__ or error.__context__
    async with await hasty.open(request()) as answer:
        texts.append(repr(answer))
    assert KEY not in "\n".join(texts)
    assert KEY not in caplog.text
    with pytest.raises(ValueError, match="API key") as refused:
        AnthropicUpstream(hasty._client, base_url=upstream.url, api_key=KEY + "\n" + KEY)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("base_url", ["", "ftp://x", "http://", "127.0.0.1:1", "http://u:p@x", "http://x/?a=1"])
async def test_base_urls_that_cannot_work(client: Client, base_url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        AnthropicUpstream(client, base_url=base_url, api_key=KEY)
