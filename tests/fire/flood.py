"""A flood: ten times what relay is set to serve, and a crowd at the store.

Its one invariant: requests are sent by the clock, whether or not the ones before were answered.
"""

import asyncio
import statistics
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.fire.clients import User
from tests.fire.report import Report
from tests.fire.world import MODEL, World, world

TOLD = "a refused request gets 429, 503 or 529 with retry-after"
QUICK = "refusals come quickly"
LATENCY = "accepted requests keep their latency"
GOODPUT = "a flood does not lower what is served"
MEMORY = "memory stays bounded"
RECOVERY = "everything recovers within 5 s"

TIMES = 10
QUEUE_SECONDS = 1.0
SETTINGS = {
    "RELAY_MAX_IN_FLIGHT": "50",
    "RELAY_MAX_QUEUED": "25",
    "RELAY_QUEUE_SECONDS": str(QUEUE_SECONDS),
    "LOG_LEVEL": "INFO",
}
_SLACK_SECONDS = 1.0
_MOST_MIB = 150
_RECOVERY_SECONDS = 5.0


@dataclass
class Seen:
    """Seconds that answers took, by what they were."""

    served: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @staticmethod
    def p95(seconds: list[float]) -> float:
        return statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else sum(seconds)


async def run(report: Report, *, seconds: float = 60, rate: int = 15, migrated: Path | None = None) -> None:
    """`rate`: the requests per second that relay is set to serve."""
    settings = SETTINGS | {"RELAY_REQUESTS_PER_SECOND": str(rate)}
    async with world(settings=settings, migrated=migrated) as made:
        await flood_relay(report, made, seconds, rate)
        await crowd_the_store(report, made, seconds / 4)


async def flood_relay(report: Report, made: World, seconds: float, rate: int) -> None:
    user = User("flood", key=await made.make_key("flood"))
    calm = await _at_rate(made, user, rate * 0.6, max(3.0, seconds / 10))
    report.check(TOLD, not calm.wrong and not calm.refused, f"below its rate: {calm.wrong} {len(calm.refused)} refused")
    before = _mib(made, "relay-0")
    report.say(f"calm: p95 {Seen.p95(calm.served):.3f} s; now {rate * TIMES}/s for {seconds:.0f} s")
    seen = await _at_rate(made, user, rate * TIMES, seconds)
    after = _mib(made, "relay-0")
    await check_recovery(report, made, user, rate)
    report.trial(TOLD, len(seen.refused) + len(seen.wrong))
    for wrong in seen.wrong:
        report.violation(TOLD, wrong)
    report.check(TOLD, seen.refused, "nothing was refused: that was no flood")
    slowest = Seen.p95(seen.refused)
    report.check(QUICK, slowest < QUEUE_SECONDS + _SLACK_SECONDS, f"p95 {slowest:.2f} s")
    usual, flooded = Seen.p95(calm.served), Seen.p95(seen.served)
    # Whoever is let in may have waited in the queue; nothing else may be slower than twice the usual.
    allowed = 2 * usual + 25 / rate + QUEUE_SECONDS + _SLACK_SECONDS
    report.check(LATENCY, flooded < allowed, f"p95 {flooded:.2f} s, usually {usual:.2f} s")
    wanted = 0.8 * rate * seconds
    report.check(GOODPUT, len(seen.served) >= wanted, f"{len(seen.served)} served, {wanted:.0f} wanted")
    report.check(MEMORY, after - before < _MOST_MIB, f"relay: {before:.0f} MiB, then {after:.0f}")
    report.note(TOLD, served=len(seen.served), refused=len(seen.refused))
    report.note(QUICK, p95=f"{slowest * 1000:.0f} ms")
    report.note(LATENCY, calm=f"{usual * 1000:.0f} ms", flooded=f"{flooded * 1000:.0f} ms", of="p95")
    report.note(MEMORY, relay=f"{before:.0f} to {after:.0f} MiB")


async def _at_rate(made: World, user: User, per_second: float, seconds: float) -> Seen:
    seen = Seen()
    began, count, sending = time.monotonic(), 0, set[asyncio.Task[None]]()
    while (now := time.monotonic() - began) < seconds:
        while count < now * per_second:
            count += 1
            task = asyncio.create_task(_one(made, user, seen, streams=count % 2 == 0))
            sending.add(task)
            task.add_done_callback(sending.discard)
        await asyncio.sleep(0.005)
    await asyncio.gather(*sending)
    return seen


async def _one(made: World, user: User, seen: Seen, *, streams: bool) -> None:
    body = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "Hello"}], "stream": streams}
    headers = {"x-api-key": user.key, "x-session-id": f"f-{uuid.uuid4().hex[:12]}"}
    began = time.monotonic()
    try:
        answer = await made.http.post(f"{made.relay()}/v1/messages", json=body, headers=headers)
    except httpx.HTTPError as error:
        seen.wrong.append(f"{type(error).__name__}: {error}")
        return
    _sort(answer, time.monotonic() - began, seen)


def _sort(answer: httpx.Response, took: float, seen: Seen) -> None:
    if answer.status_code == 200:
        seen.served.append(took)
    elif answer.status_code in {429, 503, 529} and int(answer.headers.get("retry-after", "0")) >= 1:
        seen.refused.append(took)
    else:
        seen.wrong.append(f"{answer.status_code} {answer.text[:200]}")


async def check_recovery(report: Report, made: World, user: User, rate: int) -> None:
    """How long until a calm second has no refusal."""
    began = time.monotonic()
    while time.monotonic() - began < 4 * _RECOVERY_SECONDS:
        seen = await _at_rate(made, user, rate * 0.4, 0.5)
        if not seen.refused and not seen.wrong:
            break
    took = time.monotonic() - began
    report.check(RECOVERY, took < _RECOVERY_SECONDS, f"{took:.1f} s")
    report.note(RECOVERY, took=f"{took:.1f} s")


async def crowd_the_store(report: Report, made: World, seconds: float, crowd: int = 500) -> None:
    """Hundreds at once, each as fast as it can: the store has no rate of its own, it has a pool and deadlines."""
    before = _mib(made, "store-0")
    until = time.monotonic() + seconds
    seen = Seen()

    async def one(number: int) -> None:
        path = f"{made.store()}/api/v1/sessions/crowd-{number % 50}/messages"
        create = {"user_id": "crowd", "session_id": f"crowd-{number % 50}", "if_exists": "return"}
        await made.http.post(f"{made.store()}/api/v1/sessions", json=create, headers=made.store_headers)
        while time.monotonic() < until:
            began = time.monotonic()
            body = {"role": "user", "content": "x"}
            answer = await made.http.post(path, json=body, params={"user_id": "crowd"}, headers=made.store_headers)
            _sort(answer, time.monotonic() - began, seen)

    await asyncio.gather(*map(one, range(crowd)))
    after = _mib(made, "store-0")
    report.trial(TOLD, len(seen.served) + len(seen.refused))
    for wrong in seen.wrong:
        report.violation(TOLD, f"session_service: {wrong}")
    report.check(MEMORY, after - before < _MOST_MIB, f"session_service: {before:.0f} MiB, then {after:.0f}")
    report.note(MEMORY, session_service=f"{before:.0f} to {after:.0f} MiB")
    began = time.monotonic()
    fine = await made.http.get(
        f"{made.store()}/api/v1/sessions", params={"user_id": "crowd"}, headers=made.store_headers
    )
    took = time.monotonic() - began
    report.check(RECOVERY, fine.status_code == 200 and took < _RECOVERY_SECONDS, f"{fine.status_code} in {took:.1f} s")


def _mib(made: World, name: str) -> float:
    return float(psutil.Process(made.process(name).pid).memory_info().rss) / 2**20
