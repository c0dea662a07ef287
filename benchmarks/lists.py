"""Lists, stats, usage and search on a large data set beside a small one."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx

from benchmarks.dataset import Size, load
from benchmarks.figures import Findings, at_most, share
from benchmarks.stack import Stack

Params = dict[str, Any]
Call = tuple[str, Params]

_SMALL = Size(sessions=1_000, messages=3_000, users=20)
_HEAVY = "heavy-0"


def _calls(chance: random.Random, client: httpx.Client, size: Size) -> dict[str, Callable[[], Call]]:
    """By name, what makes the next call of that kind; a deep cursor is walked to beforehand."""
    deep = _deep_cursor(client, pages=min(30, size.sessions // 2000 + 1))

    def user() -> str:
        number = chance.randrange(size.users)
        return f"user-{number if number % 10 else number + 1}"

    return {
        "list, first page": lambda: (f"/users/{user()}/sessions", {"page_size": 50}),
        "list of a heavy user, first page": lambda: (f"/users/{_HEAVY}/sessions", {"page_size": 50}),
        "list of a heavy user, deep cursor": lambda: (f"/users/{_HEAVY}/sessions", {"page_size": 50, "cursor": deep}),
        "list, active only": lambda: (f"/users/{_HEAVY}/sessions", {"active_only": True}),
        "stats of all": lambda: ("/sessions/stats", {}),
        "stats of a user": lambda: (f"/users/{user()}/stats", {}),
        "stats of a heavy user": lambda: (f"/users/{_HEAVY}/stats", {}),
        "usage by day, all": lambda: ("/sessions/stats/usage", {"bucket": "day"}),
        "usage by day, a user": lambda: ("/sessions/stats/usage", {"bucket": "day", "user_id": user()}),
        "search, a user": lambda: ("/sessions/search", {"user_id": user(), "q": "time year"}),
        "search, a heavy user, rare word": lambda: ("/sessions/search", {"user_id": _HEAVY, "q": "topic17"}),
        "search, Chinese": lambda: ("/sessions/search", {"user_id": user(), "q": "对话记录"}),
    }


def _deep_cursor(client: httpx.Client, pages: int) -> str | None:
    cursor: str | None = None
    for _ in range(pages):
        params: Params = {"page_size": 100, **({"cursor": cursor} if cursor else {})}
        cursor = client.get(f"/users/{_HEAVY}/sessions", params=params).json()["next_cursor"] or cursor
    return cursor


def _timed_ms(client: httpx.Client, call: Call) -> float:
    path, params = call
    started_at = time.perf_counter()
    answer = client.get(path, params={name: value for name, value in params.items() if value is not None})
    seconds = time.perf_counter() - started_at
    answer.raise_for_status()
    return seconds * 1000


def run(stack: Stack) -> Findings:
    """Lists, stats, usage and search of many sessions, beside 1,000."""
    found = Findings()
    chance = random.Random(1)
    sessions = stack.pace.sessions
    large = Size(sessions=sessions, messages=3 * sessions, users=max(20, sessions // 50))
    kinds = []
    with ExitStack() as opened:
        for size in (large, _SMALL):
            url = stack.database()
            asyncio.run(load(url, "dev", size))
            base = f"{opened.enter_context(stack.store(url)).url}/api/v1"
            client = opened.enter_context(httpx.Client(base_url=base, timeout=60, trust_env=False))
            kinds.append((client, _calls(chance, client, size)))
        (of_large, large_calls), (of_small, small_calls) = kinds
        for name, next_call in large_calls.items():
            taken: tuple[list[float], list[float]] = ([], [])
            for _ in range(40 * stack.pace.rounds):
                taken[0].append(_timed_ms(of_large, next_call()))
                taken[1].append(_timed_ms(of_small, small_calls[name]()))
            medians = [statistics.median(each) for each in taken]
            what = f"{name}, {sessions:,} sessions, p50"
            found.add(share(what, "ms", medians[:1], "1,000 sessions", medians[1:], at_most(3)))
    return found
