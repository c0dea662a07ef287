"""A service that is told to stop: whoever asks it at that very moment is answered, or was told to go elsewhere."""

import asyncio
import contextlib
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fire.raw import Answer, read_answer, request
from tests.processes import Process, ServiceProcess, free_port, start_session_service
from tests.relay.calls import start_relay, upstream_settings
from tests.upstream.client import TestUpstream

LIVE = request(b"GET", b"/health/live", {}, close=False)
HEALTH = request(b"GET", b"/health", {}, close=False)
KEPT, NEW = 100, 20


@contextmanager
def started(name: str, database_url: str, scratch: Path, **settings: Any) -> Iterator[Process]:
    """The service; a relay with a session_service behind it."""
    with start_session_service(database_url, scratch, free_port(), **settings) as store:
        if name == "session_service":
            yield store
            return
        with start_relay(database_url, store.url, scratch / "leaving", settings) as relay:
            yield relay


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, sent: bytes = LIVE) -> Answer:
        self._writer.write(sent)
        return await asyncio.wait_for(read_answer(self._reader), 10)

    async def is_closed(self) -> bool:
        """Waits for the end; False when something else arrives."""
        return await asyncio.wait_for(self._reader.read(1), 10) == b""


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def keep_asking(port: int, seen: Counter[tuple[str, int]]) -> None:
    """One connection, used until its end is announced, or it is closed while nothing is asked."""
    async with connected(port) as connection:
        while True:
            try:
                async with asyncio.timeout(random.uniform(0, 0.1)):
                    assert await connection.is_closed()
                    return
            except TimeoutError:
                answer = await connection.ask()
            seen["kept", answer.status] += 1
            if answer.status != 200 or answer.headers.get("connection") == "close":
                assert await connection.is_closed()
                return


async def keep_coming(port: int, seen: Counter[tuple[str, int]]) -> None:
    """One connection after the other, until none can be made."""
    with contextlib.suppress(ConnectionError):
        while True:
            async with connected(port) as connection:
                seen["new", (await connection.ask()).status] += 1


@pytest.mark.parametrize("name", ["session_service", "relay"])
async def test_no_request_is_dropped_when_a_service_stops(name: str, database_url: str, scratch: Path) -> None:
    """It stops at once, with nothing to warn its clients before: connections that are kept and such as are made."""
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(3):
        with started(name, database_url, scratch) as service:
            asking = [asyncio.create_task(keep_asking(service.port, seen)) for _ in range(KEPT)]
            asking += [asyncio.create_task(keep_coming(service.port, seen)) for _ in range(NEW)]
            await asyncio.sleep(0.5)
            service.popen.send_signal(signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(*asking), 20)
            assert await asyncio.to_thread(service.popen.wait, 10) == 0
    assert seen.keys() == {("kept", 200), ("new", 200)}, seen


@pytest.mark.parametrize("name", ["session_service", "relay"])
async def test_answers_while_draining_end_their_connection(name: str, database_url: str, scratch: Path) -> None:
    """Whoever keeps a connection goes elsewhere by itself, before the port closes."""
    settings = {"ENVIRONMENT": "fire", "DRAIN_SECONDS": "2", "SESSION_SERVICE_TOKENS": "t" * 32}
    secrets = {"RELAY_ADMIN_TOKEN": "a" * 32, "RELAY_KEY_PEPPER": "p" * 32, "RELAY_ENCRYPTION_KEYS": f"k1:{'A' * 43}="}
    with started(name, database_url, scratch, **settings, **secrets) as service:
        async with connected(service.port) as kept:
            answer = await kept.ask()
            assert (answer.status, answer.headers.get("connection")) == (200, None)
            service.popen.send_signal(signal.SIGTERM)
            while True:
                async with connected(service.port) as watching:
                    answer = await watching.ask(HEALTH)
                    if answer.status == 503:
                        break
            assert answer.headers["connection"] == "close"
            answer = await kept.ask()
            assert (answer.status, answer.headers.get("connection")) == (200, "close")
            assert await kept.is_closed()
        assert await asyncio.to_thread(service.popen.wait, 10) == 0


async def test_after_a_stream_that_began_before_the_connection_is_good_for_one_more(
    database_url: str, session_service: ServiceProcess, scratch: Path
) -> None:
    """Its head could not say that the connection ends; so the next answer does."""
    with (
        TestUpstream.started() as upstream,
        start_relay(database_url, session_service.url, scratch / "leaving", upstream_settings(upstream.url)) as relay,
    ):
        upstream.script({"event_delay_ms": 100})
        body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], "stream": True}
        key = (scratch / "leaving" / "api.key").read_text().strip().encode()
        headers = {b"x-api-key": key, b"content-type": b"application/json"}
        sent = request(b"POST", b"/v1/messages", headers, json.dumps(body).encode(), close=False)
        async with connected(relay.port) as connection:
            asking = asyncio.create_task(connection.ask(sent))
            await upstream.until(lambda state: state["running"] == 1)
            await asyncio.sleep(0.3)
            relay.popen.send_signal(signal.SIGTERM)
            stream = await asking
            assert (stream.status, stream.headers.get("connection")) == (200, None)
            assert "message_stop" in stream.text
            answer = await connection.ask()
            assert (answer.status, answer.headers.get("connection")) == (200, "close")
            assert await connection.is_closed()
        assert await asyncio.to_thread(relay.popen.wait, 10) == 0
