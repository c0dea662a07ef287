"""The door around a small app of its own: what nobody else caught."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry, Histogram
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.door import BodyRules, Door
from shared.errors import Conflict, TurnInProgress

RULES = BodyRules(max_bytes=100, timeout_seconds=1, unlimited_paths=frozenset({"/import"}))


class Fault(Exception):
    """What an app should not raise."""


def behind_door(app: ASGIApp, **options: Any) -> Door:
    duration = Histogram("d", "d", ["route", "method", "status"], registry=CollectorRegistry())
    return Door(app, rules=RULES, duration=duration, **options)


def around(app: ASGIApp, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(behind_door(app, **options)), base_url="http://door")


async def test_a_fault_is_a_whole_answer_and_tells_nothing() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise Fault("a secret in the text of an exception")

    async with around(app) as client:
        answer = await client.get("/", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "Internal error", "code": "internal_error"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "mine"


async def test_an_error_that_no_handler_of_the_app_took() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise TurnInProgress(turn_id="t", retry_after_seconds=3)

    async with around(app) as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "3")
    assert answer.json()["turn_id"] == "t"
    assert answer.headers["x-request-id"]


async def test_a_connection_that_was_cut_a_moment_ago_is_no_fault_of_ours() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("too late")(scope, receive, send)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    counts = CollectorRegistry()
    duration = Histogram("d", "d", ["route", "method", "status"], registry=counts)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    await Door(app, rules=RULES, duration=duration)(scope, receive, send)
    told = {"route": "unmatched", "method": "GET", "status": "499"}
    assert counts.get_sample_value("d_count", told) == 1


@asynccontextmanager
async def served(door: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """The door under the server that it really stands in."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(door, lifespan="off", log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", trust_env=False) as client:
            yield client
        server.should_exit = True
        await serving


async def test_an_answer_cut_short_by_a_fault_does_not_look_whole() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b"half"
            raise Fault

        await StreamingResponse(body())(scope, receive, send)

    async with served(behind_door(app)) as client:
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/")


async def test_a_request_cancelled_is_not_swallowed() -> None:
    started = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        await asyncio.sleep(60)

    async with around(app) as client:
        task = asyncio.create_task(client.get("/"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_the_body_is_counted_but_for_paths_without_limit() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        size = 0
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        await PlainTextResponse(str(size))(scope, receive, send)

    async with around(app) as client:
        assert (await client.post("/", content=b"x" * 100)).text == "100"
        assert (await client.post("/", content=b"x" * 101)).status_code == 413
        assert (await client.post("/import", content=b"x" * 101)).text == "101"
        assert (await client.post("/import/", content=b"x" * 101)).status_code == 413


async def test_who_may_not_come_in_is_turned_away_before_the_body() -> None:
    def admit(scope: Scope) -> None:
        raise Conflict("closed")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("came in")

    async with around(app, admit=admit) as client:
        answer = await client.post("/", content=b"x" * 1000)
    assert (answer.status_code, answer.json()["detail"]) == (409, "closed")
