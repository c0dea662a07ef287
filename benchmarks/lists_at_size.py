"""python -m benchmarks.lists_at_size: lists, stats, usage and search on a large data set beside a small one.

Starts a session_service on each of two loaded databases and calls them in turn, so that both figures of a row were
taken under the same conditions. Prints a table: median and 95th percentile in ms, and the ratio of the medians.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.processes import free_port, start_session_service

Params = dict[str, Any]
Call = tuple[str, Params]


@contextmanager
def _service(url: str, folder: Path) -> Iterator[httpx.Client]:
    with (
        start_session_service(url, folder, free_port()) as service,
        httpx.Client(base_url=f"{service.url}/api/v1", timeout=60, trust_env=False) as client,
    ):
        yield client


def _calls(chance: random.Random, client: httpx.Client, sessions: int, users: int) -> dict[str, Callable[[], Call]]:
    """By name, what makes the next call of that kind; a deep cursor is walked to beforehand."""
    heavy = "heavy-0"
    deep = _deep_cursor(client, heavy, pages=min(30, sessions // 2000 + 1))

    def user() -> str:
        number = chance.randrange(users)
        return f"user-{number if number % 10 else number + 1}"

    return {
        "list, first page": lambda: (f"/users/{user()}/sessions", {"page_size": 50}),
        "list of a heavy user, first page": lambda: (f"/users/{heavy}/sessions", {"page_size": 50}),
        "list of a heavy user, deep cursor": lambda: (f"/users/{heavy}/sessions", {"page_size": 50, "cursor": deep}),
        "active only": lambda: (f"/users/{heavy}/sessions", {"active_only": True}),
        "stats of all": lambda: ("/sessions/stats", {}),
        "stats of a user": lambda: (f"/users/{user()}/stats", {}),
        "stats of a heavy user": lambda: (f"/users/{heavy}/stats", {}),
        "usage by day, all": lambda: ("/sessions/stats/usage", {"bucket": "day"}),
        "usage by day, a user": lambda: ("/sessions/stats/usage", {"bucket": "day", "user_id": user()}),
        "search, a user": lambda: ("/sessions/search", {"user_id": user(), "q": "time year"}),
        "search, a heavy user, rare word": lambda: ("/sessions/search", {"user_id": heavy, "q": "topic17"}),
        "search, Chinese": lambda: ("/sessions/search", {"user_id": user(), "q": "对话记录"}),
    }


def _deep_cursor(client: httpx.Client, user_id: str, pages: int) -> str | None:
    cursor: str | None = None
    for _ in range(pages):
        params: Params = {"page_size": 100, **({"cursor": cursor} if cursor else {})}
        cursor = client.get(f"/users/{user_id}/sessions", params=params).json()["next_cursor"] or cursor
    return cursor


def _timed_ms(client: httpx.Client, call: Call) -> float:
    path, params = call
    started_at = time.perf_counter()
    answer = client.get(path, params={name: value for name, value in params.items() if value is not None})
    seconds = time.perf_counter() - started_at
    answer.raise_for_status()
    return seconds * 1000


def measure(large: str, small: str, arguments: argparse.Namespace) -> None:
    chance = random.Random(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        _service(large, Path(folder)) as large_client,
        _service(small, Path(folder)) as small_client,
    ):
        of_large = _calls(chance, large_client, arguments.sessions, arguments.users)
        of_small = _calls(chance, small_client, arguments.small_sessions, arguments.small_users)
        print(f"{'':36}{'p50 ms':>8}{'p95 ms':>8}{'small p50':>11}{'ratio':>7}")
        for name, next_call in of_large.items():
            taken: tuple[list[float], list[float]] = ([], [])
            for _ in range(arguments.rounds):
                taken[0].append(_timed_ms(large_client, next_call()))
                taken[1].append(_timed_ms(small_client, of_small[name]()))
            p50, small_p50 = statistics.median(taken[0]), statistics.median(taken[1])
            p95 = statistics.quantiles(taken[0], n=20)[-1]
            print(f"{name:36}{p50:8.1f}{p95:8.1f}{small_p50:11.1f}{p50 / small_p50:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lists_at_size", description=__doc__)
    parser.add_argument("--large", required=True, help="URL of a database filled by benchmarks.load_dataset")
    parser.add_argument("--small", required=True, help="URL of one with fewer sessions")
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--small-sessions", type=int, default=1_000)
    parser.add_argument("--small-users", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    measure(arguments.large, arguments.small, arguments)


if __name__ == "__main__":
    main()
