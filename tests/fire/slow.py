"""Slow and broken clients: none of them may hold a service up, and each hears what is wrong, or is hung up on.

Its one invariant: while all of them are at it, a good client is served.
"""

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.fire import raw
from tests.fire.clients import User
from tests.fire.report import Report
from tests.fire.world import MODEL, World, world

SERVED = "a good client is served while bad ones are at it"
ENDED = "a slow client is told 408 or hung up on, in time"
WHOLE = "a client that has said its last word, or hangs up, costs nobody anything"
TOO_LARGE = "a body that is too large is told so (413), with a length and without, and is not kept"
GARBAGE = "what is no HTTP is refused or hung up on, and never taken for another request"
IDLE = "idle connections hold nothing up, and end"
ALIVE = "no process ends, and none logs a fault"

DEADLINE_SECONDS = 2.0
MAX_BODY_BYTES = 256 * 1024
SETTINGS = {
    "HEADER_TIMEOUT_SECONDS": str(DEADLINE_SECONDS),
    "BODY_TIMEOUT_SECONDS": str(DEADLINE_SECONDS),
    "RELAY_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    "LIMITS__BODY_BYTES": str(MAX_BODY_BYTES),
    "LIMITS__CONTENT_BYTES": str(MAX_BODY_BYTES),
}
_SLACK_SECONDS = 2.0
_LONGEST_SECONDS = 3.0
# Old, or meant for proxies, and yet plain requests for a page of this service: they may get it.
_LENIENT = {"HTTP/0.9", "no version", "proxy"}


@dataclass(frozen=True)
class Door:
    """One service, and a request that it takes."""

    name: str
    port: int
    target: bytes
    headers: dict[bytes, bytes]
    body: bytes

    def request(self, body: bytes | None = None, **more: bytes) -> bytes:
        """`more` are headers, with _ for -."""
        added = {name.replace("_", "-").encode(): value for name, value in more.items()}
        return raw.request(b"POST", self.target, {**self.headers, **added}, self.body if body is None else body)


async def run(report: Report, *, idle: int = 10_000, migrated: Path | None = None) -> None:
    # Most machines start processes with room for 1,024 open files, and let them ask for more.
    few = [shutil.which("prlimit") or "prlimit", f"--nofile={min(1024, idle // 2)}:"]
    async with world(settings=SETTINGS, migrated=migrated, program=lambda _name, _log: few) as made:
        user = User("slow", key=await made.make_key("slow"))
        for door in (_relay_door(made, user), _store_door(made)):
            async with good_client(report, made, user, door.name):
                for check in (check_slow, check_half_closed, check_too_large, check_garbage, check_vanished):
                    report.say(f"{door.name}: {check.__name__}")
                    await check(report, door)
                await check_idle(report, door, idle)
        for name in ("store-0", "relay-0"):
            faults = [line for line in made.process(name).logged().splitlines() if '"level": "error"' in line]
            report.check(ALIVE, made.is_up(name) and not faults, f"{name}: {faults[:2]}")


def _relay_door(made: World, user: User) -> Door:
    body = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {b"x-api-key": user.key.encode(), b"x-session-id": b"none", b"content-type": b"application/json"}
    return Door("relay", made.relay_ports[0], b"/v1/messages", headers, json.dumps(body).encode())


def _store_door(made: World) -> Door:
    token = made.store_headers["authorization"].encode()
    headers = {b"authorization": token, b"content-type": b"application/json"}
    body = json.dumps({"user_id": "slow", "session_id": "slow", "if_exists": "return"}).encode()
    return Door("session_service", made.store_ports[0], b"/api/v1/sessions", headers, body)


@asynccontextmanager
async def good_client(report: Report, made: World, user: User, door: str) -> AsyncIterator[None]:
    """Someone who talks all the while, twice a second."""
    slowest = 0.0

    async def talk() -> None:
        nonlocal slowest
        while True:
            began = time.monotonic()
            body = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "Hello"}]}
            headers = {"x-api-key": user.key, "x-session-id": f"good-{door}"}
            try:
                answer = await made.http.post(f"{made.relay()}/v1/messages", json=body, headers=headers)
                what, is_fine = f"{answer.status_code} {answer.text[:200]}", answer.status_code == 200
            except httpx.HTTPError as error:
                what, is_fine = f"{type(error).__name__}: {error}", False
            took = time.monotonic() - began
            slowest = max(slowest, took)
            report.check(SERVED, is_fine and took < _LONGEST_SECONDS, f"{door}: {what} in {took:.1f} s")
            await asyncio.sleep(0.5)

    talking = asyncio.create_task(talk())
    try:
        yield
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
        report.note(SERVED, **{f"slowest at {door}": f"{slowest:.2f} s"})


async def check_slow(report: Report, door: Door) -> None:
    """Byte by byte: headers that never end, a body that never ends, nothing at all."""
    whole = door.request()
    head, _, body = whole.partition(b"\r\n\r\n")
    cases = {
        "headers": (b"", head),
        "body": (head + b"\r\n\r\n", body),
        "chunks": (door.request(b"", transfer_encoding=b"chunked"), b"1\r\n \r\n" * 100),
        "silence": (b"", b""),
    }
    await asyncio.gather(*(_drip(report, door, name, *case) for name, case in cases.items() for _ in range(20)))


async def _drip(report: Report, door: Door, name: str, at_once: bytes, slowly: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    began = time.monotonic()

    async def drip() -> None:
        writer.write(at_once)
        for byte in slowly:
            writer.write(bytes([byte]))
            with contextlib.suppress(OSError):
                await writer.drain()
            await asyncio.sleep(0.25)

    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(DEADLINE_SECONDS + _SLACK_SECONDS + 10):
            answer = await raw.read_answer(reader)
    except TimeoutError:
        answer = raw.Answer(-2, {}, b"", is_whole=False)
    finally:
        dripping.cancel()
        writer.transport.abort()
    took = time.monotonic() - began
    in_time = took < DEADLINE_SECONDS + _SLACK_SECONDS
    report.check(ENDED, answer.status in {0, 408} and in_time, f"{door.name} {name}: {answer.status} in {took:.1f} s")


async def check_half_closed(report: Report, door: Door) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(door.request())
    writer.write_eof()
    try:
        async with asyncio.timeout(10):
            answer = await raw.read_answer(reader)
    except TimeoutError:
        answer = raw.NOTHING
    writer.transport.abort()
    # Who closes its half may get its answer or be taken for gone; it may not be left waiting, nor get half of one.
    is_fine = answer == raw.NOTHING or (answer.status == 200 and answer.is_whole)
    report.check(WHOLE, is_fine, f"{door.name}: {answer}")


async def check_too_large(report: Report, door: Door) -> None:
    large = b'{"a":"' + b"x" * (2 * MAX_BODY_BYTES) + b'"}'
    chunk = b"x" * 16_384
    chunks = (b"%x\r\n" % len(chunk) + chunk + b"\r\n") * (2 * MAX_BODY_BYTES // len(chunk)) + b"0\r\n\r\n"
    cases = {
        "with its length": door.request(large),
        "in chunks": door.request(chunks, transfer_encoding=b"chunked"),
        "of a claimed length": door.request(b"", content_length=b"99999999999"),
    }
    for name, sent in cases.items():
        answer = await raw.exchange(door.port, sent)
        report.check(TOO_LARGE, answer.status == 413 and answer.is_whole, f"{door.name} {name}: {answer.status}")


async def check_garbage(report: Report, door: Door) -> None:
    good = door.request(connection=b"keep-alive")
    smuggled = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
    chunked = b"transfer-encoding: chunked\r\n"
    start = b"POST " + door.target + b" HTTP/1.1\r\nhost: x\r\n"
    cases = {
        "binary": bytes(range(256)) * 8,
        "TLS": bytes.fromhex("1603010200010001fc0303") + os.urandom(500),
        "HTTP/0.9": b"GET /\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/9.9": b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        "no version": b"GET /health\r\nhost: x\r\n\r\n",
        "blank method": b" / HTTP/1.1\r\nhost: x\r\n\r\n",
        "long line": b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        "long header": b"GET /nowhere HTTP/1.1\r\nhost: x\r\na: " + b"x" * 200_000 + b"\r\n\r\n",
        "many headers": b"GET /nowhere HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        "header without colon": b"GET /nowhere HTTP/1.1\r\nhost: x\r\nnothing\r\n\r\n",
        "header with NUL": b"GET /nowhere HTTP/1.1\r\nhost: x\r\na: b\x00c\r\n\r\n",
        "bare line feed": b"GET /nowhere HTTP/1.1\nhost: x\na: b\r\r\n\n",
        "two lengths": start + b"content-length: 2\r\ncontent-length: 40\r\n\r\n{}" + smuggled,
        "length and chunks": start + b"content-length: 4\r\n" + chunked + b"\r\n0\r\n\r\n" + smuggled,
        "minus one": start + b"content-length: -1\r\n\r\n{}" + smuggled,
        "plus": start + b"content-length: +2\r\n\r\n{}" + smuggled,
        "chunks of no size": start + chunked + b"\r\nzz\r\n{}\r\n0\r\n\r\n" + smuggled,
        "endless chunk size": start + chunked + b"\r\n" + b"f" * 400 + b"\r\n{}\r\n0\r\n\r\n",
        "hidden chunks": start + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n" + smuggled,
        "chunks twice": start + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + smuggled,
        "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: x\r\n\r\n",
        "proxy": b"GET http://127.0.0.1:22/ HTTP/1.1\r\nhost: x\r\n\r\n",
        "upgrade": b"GET /nowhere HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n",
        "TRACE": b"TRACE / HTTP/1.1\r\nhost: x\r\n\r\n",
    }
    await asyncio.gather(*(_check_refused(report, door, name, sent) for name, sent in cases.items()))
    statuses = [answer.status for answer in await _answers(door, good * 20)]
    report.check(GARBAGE, statuses == [200] * 20, f"{door.name} pipelined: {statuses}")
    statuses = [answer.status for answer in await _answers(door, good + b"\x00garbage\r\n\r\n")]
    report.check(GARBAGE, set(statuses) <= {200, 400, 0}, f"{door.name} garbage behind a request: {statuses}")


async def _check_refused(report: Report, door: Door, name: str, sent: bytes) -> None:
    answers = await _answers(door, sent)
    statuses = [answer.status for answer in answers]
    # Nothing that stands in the middle of it is taken for a request of its own: that one would be a 404 or a 401.
    is_one = len([status for status in statuses if status]) <= 1
    fine = all(status == 0 or 400 <= status < 500 or name in _LENIENT for status in statuses)
    report.check(GARBAGE, fine and (is_one or b"smuggled" not in sent), f"{door.name} {name}: {statuses}")


async def _answers(door: Door, sent: bytes) -> list[raw.Answer]:
    """All answers, up to the end of the connection or two seconds of silence."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port, limit=2**26)
    answers: list[raw.Answer] = []
    writer.write(sent)
    with contextlib.suppress(OSError):
        await writer.drain()
    try:
        while not answers or answers[-1].status > 0:
            async with asyncio.timeout(DEADLINE_SECONDS / 2 if answers else DEADLINE_SECONDS + _SLACK_SECONDS):
                answers.append(await raw.read_answer(reader))
    except TimeoutError:
        pass
    finally:
        writer.transport.abort()
    return answers


async def check_vanished(report: Report, door: Door) -> None:
    """Two hundred who hang up in the middle of everything."""
    whole = door.request()
    before = time.monotonic()
    for number in range(200):
        _, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(whole[: max(1, len(whole) * (number % 20) // 19)])
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.transport.abort()
    answer = await raw.exchange(door.port, whole)
    report.check(WHOLE, answer.status == 200, f"{door.name} after 200 hung up: {answer.status}")
    report.note(WHOLE, hangups=f"200 in {time.monotonic() - before:.1f} s")


async def check_idle(report: Report, door: Door, count: int) -> None:
    """Half of them say nothing at all, half have asked once and keep the connection."""
    report.say(f"{door.name}: {count} idle connections")
    asked = raw.request(b"GET", b"/health/live", {}, close=False)
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    failed = 0

    async def one(number: int) -> None:
        nonlocal failed
        try:
            async with asyncio.timeout(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
                opened.append((reader, writer))
                if number % 2:
                    writer.write(asked)
                    answer = await raw.read_answer(reader)
                    failed += answer.status != 200
        except (OSError, TimeoutError):
            failed += 1

    for start in range(0, count, 200):
        await asyncio.gather(*map(one, range(start, min(start + 200, count))))
    answer = await _timed(lambda: raw.exchange(door.port, door.request()))
    report.check(IDLE, failed == 0, f"{door.name}: {failed} of {count} could not connect, or got no answer")
    report.check(IDLE, answer < _LONGEST_SECONDS, f"{door.name}: a request beside them took {answer:.1f} s")
    silent = [pair for index, pair in enumerate(opened) if not index % 2]
    began = time.monotonic()
    ends = asyncio.gather(*(_end_of(reader) for reader, _ in silent))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DEADLINE_SECONDS + 10):
            await ends
    took = time.monotonic() - began
    report.check(IDLE, ends.done(), f"{door.name}: silent connections are open after {took:.0f} s")
    for _, writer in opened:
        writer.transport.abort()
    report.note(IDLE, **{door.name: f"{len(opened)} open at once, a request beside them {answer * 1000:.0f} ms"})


async def _end_of(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        await reader.read()


async def _timed(work: Callable[[], Awaitable[raw.Answer]]) -> float:
    began = time.monotonic()
    answer = await work()
    return time.monotonic() - began if answer.status == 200 else float("inf")
