"""What operators do and what machines do to them: rolling restarts, clocks that jump, a disk that is full.

Its one invariant: Postgres' clock is the true one, and is never touched.
"""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from tests.fire.audit import audit
from tests.fire.clients import Appender, Client, Doors, Talker, User
from tests.fire.kill import make_clients
from tests.fire.report import Report
from tests.fire.world import MODEL, Json, World, world

ROLLING = "a rolling restart under load fails no request"
LEAVES = "on SIGTERM an instance leaves Consul, then drains, and ends with 0"
CLOCKS = "clocks of the services that jump end no lease early or late"
FULL = "a full disk for the spool is told, and is not fatal"

_POLL_SECONDS = 0.2


# ── rolling restart ─────────────────────────────────────────────────────────────────────────────


class Balancer:
    """What stands before several instances: it asks for their health, and uses those that are well."""

    def __init__(self, http: httpx.AsyncClient, urls: list[str]) -> None:
        self._http = http
        self._urls = urls
        self.healthy = list(urls)

    async def watch(self) -> None:
        while True:
            self.healthy = [url for url in self._urls if await self._is_well(url)] or self._urls
            await asyncio.sleep(_POLL_SECONDS)

    async def _is_well(self, url: str) -> bool:
        try:
            return (await self._http.get(f"{url}/health/ready", timeout=2)).status_code == 200
        except httpx.HTTPError:
            return False


class _Balanced(Client):
    """Goes to the instances that are well; a connection that was refused is tried at the next one, as balancers do."""

    balancers: dict[str, Balancer] | None = None
    heard = ""

    async def insist(self, what: str, attempt: Any) -> Any:
        for _ in range(4):
            self._tries += 1
            self.heard = "no answer"
            if self.balancers is not None:
                self.doors.stores = self.balancers["store"].healthy
                self.doors.relays = self.balancers["relay"].healthy
            try:
                got = await attempt()
            except httpx.ConnectError:
                continue
            except (httpx.HTTPError, OSError) as error:
                self.report.check(ROLLING, False, f"{what}: {type(error).__name__} {error}")
                return None
            self.report.check(ROLLING, got is not None, f"{what}: {self.heard}")
            return got
        self.report.check(ROLLING, False, f"{what}: nobody could be reached")
        return None

    def is_fine(self, answer: httpx.Response, what: str) -> bool:
        self.look(answer.text, what)
        self.heard = f"{answer.status_code} {answer.text[-300:]}"
        return answer.status_code == 200

    async def read_back(self) -> None:
        """Nothing: it would not go through the balancer."""


class BalancedTalker(_Balanced, Talker):
    pass


class BalancedAppender(_Balanced, Appender):
    pass


async def run_rolling(
    report: Report,
    *,
    clients: int = 16,
    seed: int = 0,
    order: tuple[str, ...] = ("store-0", "relay-0", "store-1", "relay-1"),
    migrated: Path | None = None,
) -> None:
    settings = {"DRAIN_SECONDS": "2"}
    async with world(stores=2, relays=2, with_consul=True, settings=settings, migrated=migrated) as made:
        made.upstream.script({"event_delay_ms": 20, "delay_ms": 50, "repeat": -1})
        doors = Doors([made.store(0), made.store(1)], [made.relay(0), made.relay(1)], made.store_headers)
        cast = await make_clients(made, doors, report, clients, str(seed), (BalancedAppender, None, BalancedTalker))
        async with _balanced(made, doors, cast):
            over = asyncio.Event()
            running = [asyncio.create_task(client.run(over)) for client in cast]
            await asyncio.sleep(2)
            try:
                for name in order:
                    await _restart(report, made, name)
            finally:
                over.set()
                await asyncio.gather(*running)
        await audit(made, cast, report, held=False)
        report.note(ROLLING, restarts=len(order), acknowledged=sum(client.done for client in cast))


@asynccontextmanager
async def _balanced(made: World, doors: Doors, cast: list[Client]) -> AsyncIterator[None]:
    balancers = {"store": Balancer(made.http, list(doors.stores)), "relay": Balancer(made.http, list(doors.relays))}
    for client in cast:
        assert isinstance(client, _Balanced)
        client.balancers = balancers
    watching = [asyncio.create_task(each.watch()) for each in balancers.values()]
    try:
        yield
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def _restart(report: Report, made: World, name: str) -> None:
    report.say(f"restarting {name}")
    process = made.process(name)
    process.popen.terminate()
    if name.startswith("store"):
        await _check_leaves(report, made, process.port)
    code = await asyncio.to_thread(process.popen.wait, 60)
    report.check(LEAVES, code == 0, f"{name} ended with {code}")
    await made.start(name)
    await asyncio.sleep(4 * _POLL_SECONDS)


async def _check_leaves(report: Report, made: World, port: int) -> None:
    """Whether the port still answers when Consul does not name it any more."""
    url = f"http://127.0.0.1:{made.consul_port}/v1/health/service/session_service"
    for _ in range(100):
        named = [each["Service"]["Port"] for each in (await made.http.get(url)).json()]
        if port not in named:
            break
        await asyncio.sleep(0.02)
    try:
        status = (await made.http.get(f"http://127.0.0.1:{port}/health")).status_code
    except httpx.HTTPError:
        status = 0
    report.check(LEAVES, port not in named and status == 503, f"named: {port in named}, /health: {status}")


# ── clocks ──────────────────────────────────────────────────────────────────────────────────────


def faketime_library() -> Path | None:
    """libfaketime (Debian: libfaketime), where it is installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return found[0] if found else None


async def run_clocks(report: Report, *, migrated: Path | None = None) -> None:
    library = faketime_library()
    if library is None:
        report.violation(CLOCKS, "libfaketime is not installed (apt-get install libfaketime)")
        return
    async with _jumping(library, migrated) as (made, clock):
        user = User("clocks", key=await made.make_key("clocks"))
        for jump in ("+3600", "-3600"):
            report.say(f"clocks: {jump} s")
            clock.write_text("+0")
            await asyncio.gather(
                _check_lease(report, made, clock, jump), _check_relay_turn(report, made, user, clock, jump)
            )


@asynccontextmanager
async def _jumping(library: Path, migrated: Path | None) -> AsyncIterator[tuple[World, Path]]:
    """A world whose services read the time from a file."""
    settings = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": "/tmp/fire-clock",
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }

    async def prepare(made: World) -> None:
        clock = made.folder / "clock"
        clock.write_text("+0")
        made.settings["FAKETIME_TIMESTAMP_FILE"] = str(clock)

    async with world(prepare=prepare, settings=settings, migrated=migrated) as made:
        yield made, made.folder / "clock"


async def _check_lease(report: Report, made: World, clock: Path, jump: str) -> None:
    """A turn that was opened before the jump: held until the database says so, free right after."""
    path = f"{made.store()}/api/v1/sessions/lease{jump}/turns"
    sent: Json = {"params": {"user_id": "clocks"}, "headers": made.store_headers}
    body = {"messages": [{"role": "user", "content": "x"}], "create_session": {}, "lease_seconds": 5}
    body["create_session"] = {"idle_timeout_seconds": 1800, "if_exists": "return"}
    opened = await made.http.post(path, json=body, **sent)
    report.check(CLOCKS, opened.status_code == 200, opened.text)
    clock.write_text(jump)
    await _check_jumped(report, made, jump)
    renewal = {"lease_token": opened.json()["lease_token"]}
    renewed = await made.http.post(f"{path}/{opened.json()['turn_id']}/renew", json=renewal, **sent)
    if not report.check(CLOCKS, renewed.status_code == 200, f"{jump}: renew {renewed.status_code} {renewed.text}"):
        return
    ends_at = datetime.fromisoformat(renewed.json()["lease_expires_at"])
    async with made.sql() as sql:
        left = (ends_at - await sql.fetchval("SELECT now()")).total_seconds()
        report.check(CLOCKS, 4 < left <= 5, f"{jump}: renewed for {left:.1f} s, not 5")
        while True:
            before = await sql.fetchval("SELECT now()")
            next_one = await made.http.post(path, json=body, **sent)
            if next_one.status_code != 409:
                break
            await asyncio.sleep(0.1)
        after = await sql.fetchval("SELECT now()")
    late, early = (before - ends_at).total_seconds(), (ends_at - after).total_seconds()
    held = next_one.status_code == 200 and early <= 0 and late < 1
    report.check(CLOCKS, held, f"{jump}: {next_one.status_code}, {early:.2f} s early, {late:.2f} s late")


async def _check_jumped(report: Report, made: World, jump: str) -> None:
    """The services believe it: what they log now has the other time."""
    for name, url in (("store-0", made.store()), ("relay-0", made.relay())):
        for _ in range(20):
            await made.http.get(f"{url}/nowhere", headers=made.store_headers)
            await asyncio.sleep(0.05)
            last = made.process(name).logged().splitlines()[-1]
            offset = datetime.fromisoformat(json.loads(last)["timestamp"]).timestamp() - time.time()
            if has_jumped := abs(offset - int(jump)) < 30:
                break
        report.check("the clocks have really jumped", has_jumped, f"{name} {jump}: {offset:.0f} s off")


async def _check_relay_turn(report: Report, made: World, user: User, clock: Path, jump: str) -> None:
    """A stream longer than the turn's lease, with a jump in the middle, and somebody who waits behind it."""
    text = "word " * 40
    made.upstream.script({"text": text, "event_delay_ms": 140, "delta_characters": 4})
    headers = {"x-api-key": user.key, "x-session-id": f"stream{jump}"}

    def body(stream: bool) -> Json:
        return {"model": MODEL, "max_tokens": 99, "messages": [{"role": "user", "content": "x"}], "stream": stream}

    url = f"{made.relay()}/v1/messages"
    streaming = asyncio.create_task(made.http.post(url, json=body(True), headers=headers, timeout=60))
    await made.upstream.until(lambda state: state["running"] == 1)
    waiting = asyncio.create_task(made.http.post(url, json=body(False), headers=headers, timeout=60))
    await asyncio.sleep(1)
    clock.write_text(jump)
    first, second = await asyncio.gather(streaming, waiting)
    report.check(
        CLOCKS, "message_stop" in first.text and "event: error" not in first.text, f"{jump}: {first.text[-300:]}"
    )
    report.check(CLOCKS, second.status_code == 200, f"{jump}: {second.status_code} {second.text[:300]}")
    report.check(CLOCKS, "I see 3 messages" in second.text, f"{jump}: {second.text[:300]}")
    told = await made.http.get(f"{made.relay()}/v1/turns/{first.headers['x-turn-id']}", headers=headers)
    answer = told.json()
    held = (answer.get("status"), answer.get("persisted")) == ("completed", "yes")
    report.check(CLOCKS, held, f"{jump}: {told.text[:300]}")


# ── a full disk ─────────────────────────────────────────────────────────────────────────────────

_ROOM_BYTES = 64


def _no_room(name: str, log: Path) -> list[str]:
    """Starts a relay that can make files of 64 bytes and no more; its log goes through a pipe, which has no size."""
    if not name.startswith("relay"):
        return []
    script = f'exec prlimit --fsize={_ROOM_BYTES} "$@" > >(exec cat >> "$0") 2>&1'
    return [shutil.which("bash") or "bash", "-c", script, str(log)]


async def run_full_disk(report: Report, *, migrated: Path | None = None) -> None:
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "RELAY_COMPLETE_TIMEOUT_SECONDS": "1"}
    async with world(settings=settings, program=_no_room, migrated=migrated) as made:
        user = User("disk", key=await made.make_key("disk"))
        plain, stream = [await _store_away(made, user, stream=stream) for stream in (False, True)]
        persisted = plain.headers.get("x-session-persisted")
        report.check(FULL, plain.status_code == 200 and persisted == "none", f"{plain.status_code} {persisted}")
        is_whole = "message_stop" in stream.text and "event: error" not in stream.text
        report.check(FULL, stream.status_code == 200 and is_whole, f"{stream.status_code} {stream.text[-200:]}")
        report.check(FULL, made.is_up("relay-0"), "relay has ended")
        await _check_told(report, made)
        left = [path.name for path in made.data_dir().glob("spool/*")]
        report.check(FULL, left == [], f"left in the spool: {left}")
        for name in ("plain", "stream"):
            answer = await _once_free(made, user, name)
            report.check(FULL, answer.status_code == 200, f"afterwards: {answer.status_code} {answer.text[:200]}")
            persisted = answer.headers.get("x-session-persisted")
            report.check(FULL, persisted == "yes", f"afterwards: {persisted}")
        checked = await asyncio.to_thread(made.fsck)
        report.check(FULL, checked.returncode == 0, checked.stdout)


async def _check_told(report: Report, made: World) -> None:
    def errors() -> list[Json]:
        lines = [json.loads(line) for line in (made.folder / "relay-0.log").read_text().splitlines() if line[:1] == "{"]
        return [line for line in lines if line["level"] == "error"]

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            while len(errors()) < 2:
                await asyncio.sleep(0.05)
    events = [line["event"] for line in errors()]
    report.check(FULL, set(events) == {"spool_unusable"} and len(events) >= 2, f"logged: {events}")


async def _store_away(made: World, user: User, *, stream: bool) -> httpx.Response:
    """An answer whose turn cannot be completed: the store is killed while upstream is at it."""
    made.upstream.script({"delay_ms": 2000, "event_delay_ms": 30})
    headers = {"x-api-key": user.key, "x-session-id": "stream" if stream else "plain"}
    body = {"model": MODEL, "max_tokens": 99, "messages": [{"role": "user", "content": "x"}], "stream": stream}
    asking = asyncio.create_task(made.http.post(f"{made.relay()}/v1/messages", json=body, headers=headers))
    await made.upstream.until(lambda state: state["running"] == 1)
    made.kill("store-0")
    try:
        return await asking
    finally:
        await made.start("store-0")


async def _once_free(made: World, user: User, session_id: str) -> httpx.Response:
    """The next message of the session, when the lease of the lost turn has run out."""
    body = {"model": MODEL, "max_tokens": 99, "messages": [{"role": "user", "content": "again"}]}
    headers = {"x-api-key": user.key, "x-session-id": session_id}
    deadline = time.monotonic() + 20
    while True:
        answer = await made.http.post(f"{made.relay()}/v1/messages", json=body, headers=headers)
        if answer.status_code == 200 or time.monotonic() > deadline:
            return answer
        await asyncio.sleep(0.2)
