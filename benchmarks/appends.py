"""python -m benchmarks.appends: does indexing for search, beside the request path, slow appends?

Two session_services on databases of their own, one that indexes and one that does not, are loaded in turn by the same
clients. Prints the rate of each round and the ratio of the medians: there every processor is busy, and what indexing
takes is missing elsewhere. Then how long appends take at half of that rate, from the moment each was due.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
import uuid
from pathlib import Path

import httpx

from shared.http_client import http_client
from tests.processes import free_port, start_session_service

CONNECTIONS = 32
TEXT = "The quick brown fox jumps over the lazy dog. 我们使用这个服务来保存对话记录。 " * 3


async def _round(client: httpx.AsyncClient, base: str, seconds: float) -> float:
    """Appends a second, by 32 connections that each have a session of their own."""
    user_id = f"user-{uuid.uuid4().hex}"
    done = 0
    until = time.monotonic() + seconds

    async def append(session_id: str) -> None:
        nonlocal done
        created = await client.post(f"{base}/sessions", json={"user_id": user_id, "session_id": session_id})
        created.raise_for_status()
        while time.monotonic() < until:
            body = {"role": "user", "content": TEXT, "tokens_used": 5}
            answer = await client.post(f"{base}/sessions/{session_id}/messages", params={"user_id": user_id}, json=body)
            answer.raise_for_status()
            done += 1

    await asyncio.gather(*(append(f"s{number}") for number in range(CONNECTIONS)))
    return done / seconds


async def _paced(client: httpx.AsyncClient, base: str, rate: float, seconds: float) -> list[float]:
    """How long each append took in ms, of so many a second, whether or not the ones before have been answered."""
    user_id = f"user-{uuid.uuid4().hex}"
    for number in range(CONNECTIONS):
        body = {"user_id": user_id, "session_id": f"s{number}"}
        (await client.post(f"{base}/sessions", json=body)).raise_for_status()
    started = time.monotonic()

    async def append(number: int) -> float:
        due = started + number / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        body = {"role": "user", "content": TEXT, "tokens_used": 5}
        url = f"{base}/sessions/s{number % CONNECTIONS}/messages"
        (await client.post(url, params={"user_id": user_id}, json=body)).raise_for_status()
        return (time.monotonic() - due) * 1000

    return await asyncio.gather(*(append(number) for number in range(int(rate * seconds))))


async def _compare(with_index: str, without: str, rounds: int, seconds: float) -> None:
    rates: dict[str, list[float]] = {"indexing": [], "not indexing": []}
    async with http_client(read_seconds=30, connect_seconds=5) as client:
        for number in range(rounds):
            for name, base in (("indexing", with_index), ("not indexing", without)):
                rates[name].append(await _round(client, f"{base}/api/v1", seconds))
            told = ", ".join(f"{name} {found[-1]:.0f}/s" for name, found in rates.items())
            print(f"round {number + 1}: {told}")
        rate = min(map(statistics.median, rates.values())) / 2
        paced: dict[str, list[float]] = {"indexing": [], "not indexing": []}
        for _ in range(rounds):
            for name, base in (("indexing", with_index), ("not indexing", without)):
                paced[name] += await _paced(client, f"{base}/api/v1", rate, seconds)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    ratio = medians["indexing"] / medians["not indexing"]
    print(f"medians: {medians['indexing']:.0f}/s and {medians['not indexing']:.0f}/s, ratio {ratio:.2f}")
    for name, found in paced.items():
        cuts = statistics.quantiles(found, n=100)
        print(f"at {rate:.0f}/s, {name}: p50 {cuts[49]:.1f} ms, p95 {cuts[94]:.1f} ms, p99 {cuts[98]:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.appends", description=__doc__)
    parser.add_argument("--one", required=True, help="URL of an empty, migrated database")
    parser.add_argument("--other", required=True, help="URL of another one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with (
            start_session_service(arguments.one, path, free_port()) as one,
            start_session_service(arguments.other, path, free_port(), NEWS_INTERVAL_SECONDS="0") as other,
        ):
            asyncio.run(_compare(one.url, other.url, arguments.rounds, arguments.seconds))


if __name__ == "__main__":
    main()
