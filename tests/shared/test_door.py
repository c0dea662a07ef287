"""The door: bodies too large and too slow, headers that never end; over raw sockets where a client would not."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import ServiceProcess, free_port, start_session_service

MAX_BYTES = 20_000
SETTINGS: dict[str, Any] = {
    "LIMITS__BODY_BYTES": str(MAX_BYTES),
    "BODY_TIMEOUT_SECONDS": "0.7",
    "HEADER_TIMEOUT_SECONDS": "0.5",
}
UUID = re.compile(r"[0-9a-f-]{36}")


@pytest.fixture(scope="module")
def service(database_url: str, scratch: Path) -> Iterator[ServiceProcess]:
    with start_session_service(database_url, scratch, free_port(), **SETTINGS) as process:
        yield process


class Wire:
    """A connection on which a test says what it likes, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split(" ")[1]), headers, json.loads(body)

    async def is_closed(self) -> bool:
        return await asyncio.wait_for(self.reader.read(1), 5) == b""


@pytest.fixture
async def wire(service: ServiceProcess) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    yield Wire(reader, writer)
    writer.close()


def post(length: int | None, **headers: str) -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /api/v1/sessions HTTP/1.1\r\nhost: x\r\n{size}\r\n{more}\r\n".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def body_of(size: int) -> bytes:
    body = b'{"user_id":"door","pad":"' + b"x" * (size - 27) + b'"}'
    assert len(body) == size
    return body


async def test_the_largest_body_passes(wire: Wire) -> None:
    await wire.send(post(MAX_BYTES) + body_of(MAX_BYTES))
    assert (await wire.answer())[0] == 200
    await wire.send(post(None) + chunk(body_of(MAX_BYTES)[:9000]) + chunk(body_of(MAX_BYTES)[9000:]) + chunk(b""))
    assert (await wire.answer())[0] == 200


TOO_LARGE = {
    "detail": f"A request body has at most {MAX_BYTES} bytes",
    "code": "body_too_large",
    "max_bytes": MAX_BYTES,
}
REFUSED: dict[str, tuple[list[bytes], int]] = {
    "says that it is too large": ([post(MAX_BYTES + 1)], 413),
    "says that it is far too large": ([post(10**12), b"x" * 100], 413),
    "is too large without saying so": ([post(None), *[chunk(b"x" * 9000)] * 3], 413),
    "does not arrive": ([post(100) + b'{"user'], 408),
    "does not arrive in chunks": ([post(None) + chunk(b'{"user')], 408),
}


async def refusal(service: ServiceProcess, sent: list[bytes], status: int) -> None:
    """Sends this and no more: the refusal comes in time and says that it is the end, and soon it is."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    wire = Wire(reader, writer)
    began = time.monotonic()
    for each in sent:
        await wire.send(each)
    found, headers, body = await wire.answer()
    took = time.monotonic() - began
    assert found == status
    if status == 413:
        assert took < 0.5
        assert body == TOO_LARGE
    else:
        assert 0.6 < took < 1.5
        assert (list(body), body["code"]) == (["detail", "code"], "request_timeout")
    assert UUID.fullmatch(headers["x-request-id"])
    assert headers["connection"] == "close"
    assert await wire.is_closed()
    writer.close()


@pytest.mark.parametrize("path", ["", "/s/messages?user_id=door", "/s/turns?user_id=door"])
async def test_bodies_too_large_or_too_slow_are_refused_and_end_their_connection(
    service: ServiceProcess, path: str
) -> None:
    """All at once, for the server waits a while for those who still send."""
    there = b"/api/v1/sessions%s " % path.encode()
    cases = [
        ([each.replace(b"/api/v1/sessions ", there) for each in sent], status) for sent, status in REFUSED.values()
    ]
    await asyncio.gather(*(refusal(service, *case) for case in cases))


async def test_a_client_that_goes_on_sending_still_hears_why(service: ServiceProcess) -> None:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:
        for _ in range(3):
            answer = await client.post("/api/v1/sessions", content=body_of(MAX_BYTES + 1))
            assert (answer.status_code, answer.json()) == (413, TOO_LARGE)
            assert (await client.get("/health")).status_code == 200


async def test_a_body_that_drips(wire: Wire) -> None:
    """The deadline is for the whole body: a byte now and then does not move it."""
    began = time.monotonic()
    await wire.send(post(1000))
    answer = asyncio.create_task(wire.answer())
    while not answer.done():
        assert time.monotonic() - began < 3
        await wire.send(b"x")
        await asyncio.sleep(0.05)
    assert (await answer)[0] == 408
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("sent", [b"G", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: b"])
async def test_headers_that_do_not_end(wire: Wire, sent: bytes) -> None:
    began = time.monotonic()
    await wire.send(sent)
    status, headers, body = await wire.answer()
    assert 0.4 < time.monotonic() - began < 1.5
    assert (status, body["code"]) == (408, "request_timeout")
    assert list(body) == ["detail", "code"]
    assert headers["connection"] == "close"
    assert UUID.fullmatch(headers["x-request-id"])
    assert await wire.is_closed()


async def test_headers_that_drip(wire: Wire) -> None:
    began = time.monotonic()
    await wire.send(b"GET /health HTTP/1.1\r\nhost: x\r\n")
    answer = asyncio.create_task(wire.answer())
    while not answer.done():
        assert time.monotonic() - began < 3
        await wire.send(b"a: b\r\n")
        await asyncio.sleep(0.05)
    assert (await answer)[0] == 408


async def test_a_connection_that_says_nothing_is_closed(wire: Wire) -> None:
    began = time.monotonic()
    assert await wire.is_closed()
    assert 0.4 < time.monotonic() - began < 1.5


async def test_headers_of_a_later_request_have_the_same_deadline(wire: Wire) -> None:
    await wire.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await wire.answer())[0] == 200
    await asyncio.sleep(0.7)  # a connection at rest may stay longer than that
    await wire.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await wire.answer())[0] == 200
    await wire.send(b"GET /health HTT")
    assert (await wire.answer())[0] == 408
    assert await wire.is_closed()


async def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    ids = [f"id-{number}" for number in range(5)]
    await wire.send(
        b"".join(f"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: {each}\r\n\r\n".encode() for each in ids)
    )
    assert [(await wire.answer())[1]["x-request-id"] for _ in ids] == ids


HTTP_2 = {
    "connection": "Upgrade, HTTP2-Settings",
    "upgrade": "h2c",
    "http2-settings": "AAEAAEAAAAIAAAAB",
}
WEBSOCKET = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.mark.parametrize("offer", [HTTP_2, WEBSOCKET, HTTP_2 | {"connection": "keep-alive, upgrade"}])
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("pause_at", [None, "in the head", "after the head", "in the body"])
async def test_who_offers_another_protocol_is_served_in_this_one(
    wire: Wire, offer: dict[str, str], is_chunked: bool, pause_at: str | None
) -> None:
    """As HTTP allows, and Java's client, which offers HTTP/2 with each request, needs; the body is the request's."""
    bodies = [json.dumps({"user_id": "door", "title": f"number {number}"}).encode() for number in range(3)]
    for body in bodies:
        head = post(None if is_chunked else len(body), **offer)
        sent = head + (chunk(body[:9]) + chunk(body[9:]) + b"0\r\n\r\n" if is_chunked else body)
        places = {"in the head": len(head) - 30, "after the head": len(head), "in the body": len(head) + 8}
        place = places.get(pause_at or "", len(sent))
        await wire.send(sent[:place])
        if sent[place:]:
            await asyncio.sleep(0.05)
            await wire.send(sent[place:])
        status, headers, answer = await wire.answer()
        assert (status, answer["title"]) == (200, json.loads(body)["title"]), answer
        assert "upgrade" not in headers


async def test_a_websocket_where_there_is_none(wire: Wire) -> None:
    offer = "".join(f"{name}: {value}\r\n" for name, value in WEBSOCKET.items())
    for path, expected in (("/health", 200), ("/nowhere", 404)):
        await wire.send(f"GET {path} HTTP/1.1\r\nhost: x\r\nx-request-id: me\r\n{offer}\r\n".encode())
        status, headers, _ = await wire.answer()
        assert (status, headers["x-request-id"]) == (expected, "me")


async def test_offers_of_another_protocol_in_one_piece(wire: Wire) -> None:
    body = b'{"user_id":"door"}'
    read = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    await wire.send((post(len(body), **HTTP_2) + body + read) * 300)
    answers = [await wire.answer() for _ in range(600)]
    assert {status for status, _, _ in answers} == {200}
    assert ["session_id" in answer for _, _, answer in answers] == [True, False] * 300


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FOO /health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost x\r\n\r\n",
        b"POST /api/v1/sessions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /api/v1/sessions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
        post(None) + b"zz\r\n",
        post(None, **HTTP_2) + b"zz\r\n",
    ],
)
async def test_what_is_no_http_is_refused_as_any_request(wire: Wire, sent: bytes) -> None:
    await wire.send(sent)
    status, headers, body = await wire.answer()
    assert (status, body["code"]) == (400, "validation_error")
    assert [(list(each), each["loc"]) for each in body["detail"]] == [(["type", "loc", "msg"], ["request"])]
    assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
    assert UUID.fullmatch(headers["x-request-id"])
    assert await wire.is_closed()


async def test_an_answer_that_takes_long_is_not_cut_by_the_deadlines(service: ServiceProcess) -> None:
    async with httpx.AsyncClient(
        base_url=f"{service.url}/api/v1", trust_env=False, params={"user_id": "door"}
    ) as client:
        body = {"messages": [{"role": "user", "content": "x"}], "create_session": {}}
        session_id = f"slow-{service.port}"
        assert (await client.post(f"/sessions/{session_id}/turns", json=body)).status_code == 200
        began = time.monotonic()
        answer = await client.post(f"/sessions/{session_id}/turns", json={**body, "wait_seconds": 1.5})
        assert (answer.status_code, answer.json()["code"]) == (409, "turn_in_progress")
        assert time.monotonic() - began > 1.4


async def test_an_expected_continue(wire: Wire) -> None:
    body = b'{"user_id":"door"}'
    await wire.send(post(len(body), expect="100-continue"))
    assert (await wire.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
    await wire.send(body)
    assert (await wire.answer())[0] == 200


async def test_the_head_of_an_answer_by_itself(wire: Wire) -> None:
    ask = "%s /api/v1/sessions?user_id=nobody HTTP/1.1\r\nhost: x\r\nx-request-id: one\r\n\r\n"
    await wire.send((ask % "HEAD").encode())
    head = (await wire.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    await wire.send((ask % "GET").encode())  # were there a body, this answer would not come next
    whole = (await wire.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    assert head[0] == whole[0] == b"HTTP/1.1 200 OK"
    dated = b"date: "
    assert [each for each in head if not each.startswith(dated)] == [
        each for each in whole if not each.startswith(dated)
    ]


async def test_a_client_that_leaves_in_the_middle_of_its_body(service: ServiceProcess) -> None:
    for _ in range(5):
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(post(1000) + b'{"user_id":"')
        await writer.drain()
        writer.close()
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:
        assert (await client.get("/health/ready")).status_code == 200
    assert "unhandled_error" not in service.logged()


async def test_every_request_leaves_one_line_with_its_id(service: ServiceProcess) -> None:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:
        for path, request_id in (("/api/v1/sessions?user_id=secret-u", "line-1"), ("/nowhere/secret-p", "line-2")):
            await client.get(path, headers={"x-request-id": request_id})
    await asyncio.sleep(0.1)  # the line comes after the answer
    lines = [json.loads(line) for line in service.logged().splitlines()]
    for request_id, status, route in (("line-1", 200, "/api/v1/sessions"), ("line-2", 404, "unmatched")):
        [line] = [each for each in lines if each.get("request_id") == request_id]
        assert (line["event"], line["method"], line["status"], line["route"]) == ("request", "GET", status, route)
        assert line["duration_ms"] >= 0
    assert "secret" not in service.logged()
