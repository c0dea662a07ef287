"""Sums that are made beside the request path are what the rows say, whatever happens to the rows."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.processes import ROOT, free_port, start_session_service

Json = dict[str, Any]
NO_NEWS = "SELECT count(*) FROM dev.sessions WHERE indexed_version < version"


async def _settled(url: str) -> None:
    """Returns once nothing is new any more."""
    connection = await asyncpg.connect(url)
    try:
        deadline = time.monotonic() + 15
        while await connection.fetchval(NO_NEWS):
            assert time.monotonic() < deadline, "there are still news"
            await asyncio.sleep(0.1)
    finally:
        await connection.close()


def _fsck(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.session_service.fsck", *arguments]
    environment = {"DATABASE_URL": url, "ENVIRONMENT": "test", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


async def _do_something(http: httpx.AsyncClient, chance: random.Random, user_id: str, session_id: str) -> None:
    params = {"user_id": user_id}
    path = f"/sessions/{session_id}"
    message = {"role": "user", "content": "hello there", "tokens_used": chance.randint(0, 9), "cost_usd": 0.25}
    match chance.choice(["append", "append", "batch", "rewind", "fork", "turn", "end", "restart"]):
        case "append":
            await http.post(f"{path}/messages", params=params, json=message)
        case "batch":
            await http.post(f"{path}/messages/batch", params=params, json={"messages": [message] * 7})
        case "rewind":
            await http.post(f"{path}/rewind", params=params, json={"to_seq": chance.randint(0, 5)})
        case "fork":
            await http.post(f"{path}/fork", params=params, json={})
        case "turn":
            opened = await http.post(f"{path}/turns", params=params, json={"messages": [message]})
            if opened.status_code == 200:
                told: Json = opened.json()
                status = chance.choice(["completed", "refused", "failed"])
                done = {"lease_token": told["lease_token"], "status": status}
                await http.post(f"{path}/turns/{told['turn_id']}/complete", params=params, json=done)
        case "end":
            await http.delete(path, params=params)
        case "restart":
            body = {"user_id": user_id, "session_id": session_id, "if_exists": "restart"}
            await http.post("/sessions", json=body)


@pytest.mark.parametrize("seed", [1, 2])
async def test_sums_are_the_rows_sums(make_database: Callable[[], str], scratch: Path, seed: int) -> None:
    url = make_database()
    chance = random.Random(seed)
    places = [(f"u{user}", f"s{session}") for user in range(3) for session in range(4)]
    with (
        start_session_service(url, scratch, free_port(), NEWS_INTERVAL_SECONDS="0.02") as one,
        start_session_service(url, scratch, free_port(), NEWS_INTERVAL_SECONDS="0.02") as other,
    ):
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
            bases = [f"{service.url}/api/v1" for service in (one, other)]

            async def worker(number: int) -> None:
                async with httpx.AsyncClient(base_url=bases[number % 2], timeout=30, trust_env=False) as mine:
                    for _ in range(25):
                        await _do_something(mine, chance, *chance.choice(places))

            for user_id, session_id in places:
                await http.post(f"{bases[0]}/sessions", json={"user_id": user_id, "session_id": session_id})
            await asyncio.gather(*(worker(number) for number in range(6)))
            await http.delete(f"{bases[0]}/users/u2")
            await _settled(url)
            checked = await asyncio.to_thread(_fsck, url)
            assert (checked.returncode, checked.stdout) == (0, "")
            await _compare_with_live(url, http, bases[0])


async def _compare_with_live(url: str, http: httpx.AsyncClient, base: str) -> None:
    """The stored sums against the figures that the service adds up live for so few sessions."""
    connection = await asyncpg.connect(url)
    try:
        for scope, path in (("u0", "/users/u0/stats"), ("u1", "/users/u1/stats")):
            live = (await http.get(base + path)).json()
            row = await connection.fetchrow("SELECT * FROM dev.session_totals WHERE user_id = $1", scope)
            assert row is not None
            assert (row["sessions"], row["active"], row["messages"], row["tokens"], float(row["cost"])) == (
                live["total_sessions"],
                live["active_sessions"],
                live["total_messages"],
                live["total_tokens"],
                live["total_cost"],
            )
            for bucket in ("hour", "day", "month"):
                usage = (
                    await http.get(f"{base}/sessions/stats/usage", params={"user_id": scope, "bucket": bucket})
                ).json()
                stored = await connection.fetch(
                    "SELECT sum(messages) m, sum(tokens) t FROM dev.usage_buckets WHERE user_id = $1 AND bucket = $2",
                    scope,
                    bucket,
                )
                assert (stored[0]["m"], stored[0]["t"]) == (
                    sum(item["messages"] for item in usage["items"]),
                    sum(item["tokens"] for item in usage["items"]),
                )
        gone = await connection.fetchval("SELECT count(*) FROM dev.usage_buckets WHERE user_id = 'u2'")
        assert gone == 0
    finally:
        await connection.close()


async def test_fsck_finds_and_repairs(make_database: Callable[[], str], scratch: Path) -> None:
    url = make_database()
    with start_session_service(url, scratch, free_port()) as service:
        async with httpx.AsyncClient(base_url=f"{service.url}/api/v1", timeout=30, trust_env=False) as http:
            for session_id in ("a", "b", "c"):
                await http.post("/sessions", json={"user_id": "u", "session_id": session_id})
                body = {"messages": [{"role": "user", "content": "x", "tokens_used": 2}] * 3}
                await http.post(f"/sessions/{session_id}/messages/batch", params={"user_id": "u"}, json=body)
            await http.post("/sessions/c/turns", params={"user_id": "u"}, json={"messages": []})
            turn = {"messages": body["messages"], "create_session": {}}
            told = (await http.post("/sessions/d/turns", params={"user_id": "u"}, json=turn)).json()
            done = {"lease_token": told["lease_token"], "status": "completed", "messages": body["messages"]}
            await http.post(f"/sessions/d/turns/{told['turn_id']}/complete", params={"user_id": "u"}, json=done)
        await _settled(url)
    assert (await asyncio.to_thread(_fsck, url)).returncode == 0
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "UPDATE dev.sessions SET message_count = 2, total_tokens = 7 WHERE session_id = 'a';"
            "DELETE FROM dev.session_messages WHERE session_id = 'b' AND seq = 2;"
            "UPDATE dev.sessions SET lease_expires_at = NULL WHERE session_id = 'c';"
            "UPDATE dev.session_turns SET output_to_seq = 7 WHERE session_id = 'd';"
        )
    finally:
        await connection.close()
    found = await asyncio.to_thread(_fsck, url)
    assert found.returncode == 1
    problems = {tuple(line.split("\t")[1:3]) for line in found.stdout.splitlines()}
    assert problems >= {
        ("a", "counter differs from its rows"),
        ("b", "gap in the seqs"),
        ("c", "open turn without a lease"),
        ("d", "turn without its messages"),
    }
    repaired = await asyncio.to_thread(_fsck, url, "--repair")
    assert repaired.returncode == 1  # a gap is nothing that rows could mend
    left = await asyncio.to_thread(_fsck, url)
    assert left.returncode == 1
    assert {line.split("\t")[2] for line in left.stdout.splitlines()} == {
        "gap in the seqs",
        "turn without its messages",
        "usage differs from the messages",
    }


# More of both than are added up when asked for.
MANY_SESSIONS, MANY_MESSAGES = 5_100, 20_400
BEGIN = datetime(2026, 2, 20, tzinfo=UTC)
LOAD = """
    INSERT INTO dev.sessions (user_id, session_id, last_seq, message_count, total_tokens, total_cost,
                              created_at, updated_at, last_activity)
    SELECT 'u', s::text, 4, 4, 8, 1, $1, $1, $1 FROM generate_series(1, $2) s
"""
LOAD_MESSAGES = """
    INSERT INTO dev.session_messages (user_id, session_id, seq, message_id, role, message_type, content, context_tokens,
        context_tokens_reported, begins_window, canonical_hash, created_at, tokens_used, cost_usd)
    SELECT 'u', s::text, m, s || '-' || m, 'user', 'chat', 'x', 1, false, true, '', $1::timestamptz
        + s * interval '11 minutes' + (m - 1) * interval '9 days', 2, 0.25
    FROM generate_series(1, $2) s, generate_series(1, 4) m
"""
COUNTED = """
    SELECT date_trunc($1, created_at, 'UTC') AS start, count(*) AS messages, sum(tokens_used) AS tokens,
        sum(cost_usd)::float AS cost, count(DISTINCT session_id) AS active_sessions
    FROM dev.session_messages WHERE created_at >= $2 AND created_at < $3 AND superseded_at IS NULL GROUP BY 1
"""


async def test_figures_from_the_sums_are_those_of_the_rows(make_database: Callable[[], str], scratch: Path) -> None:
    """Buckets asked for whole and in part, before and after messages were taken back."""
    url, chance = make_database(), random.Random(3)
    db = await asyncpg.connect(url)
    await db.execute("SET timezone = 'UTC'")
    await db.execute(LOAD, BEGIN, MANY_SESSIONS)
    await db.execute(LOAD_MESSAGES, BEGIN, MANY_SESSIONS)
    with start_session_service(url, scratch, free_port(), STATS_CACHE_SECONDS="0") as service:
        async with httpx.AsyncClient(base_url=f"{service.url}/api/v1", timeout=30, trust_env=False) as http:
            await _settled(url)
            for session in (1, 2500):
                answer = await http.post(f"/sessions/{session}/rewind", params={"user_id": "u"}, json={"to_seq": 2})
                assert answer.status_code == 200
            await http.delete("/sessions/7", params={"user_id": "u"})
            await _settled(url)
            for path in ("/sessions/stats", "/users/u/stats"):
                told = (await http.get(path)).json()
                assert (told["total_sessions"], told["active_sessions"]) == (MANY_SESSIONS, MANY_SESSIONS - 1)
                sums = (MANY_MESSAGES - 4, 2 * (MANY_MESSAGES - 4), (MANY_MESSAGES - 4) / 4)
                assert (told["total_messages"], told["total_tokens"], told["total_cost"]) == sums
            for _ in range(40):
                bucket = chance.choice(("hour", "day", "month"))
                since, until = sorted(BEGIN + timedelta(seconds=chance.randrange(-(10**6), 8 * 10**6)) for _ in "ab")
                if chance.random() < 0.5:
                    since = since.replace(minute=0, second=0, hour=chance.choice([0, since.hour]))
                params = {"bucket": bucket, "from": since.isoformat(), "to": until.isoformat(), "user_id": "u"}
                for scope in (params, {name: params[name] for name in ("bucket", "from", "to")}):
                    items = (await http.get("/sessions/stats/usage", params=scope)).json()["items"]
                    rows = {row["start"]: dict(row) for row in await db.fetch(COUNTED, bucket, since, until)}
                    found = {datetime.fromisoformat(item.pop("start")): item for item in items}
                    assert {start: row for start, row in rows.items() if start not in found} == {}
                    for start, item in found.items():
                        expected = rows.get(start) or dict.fromkeys(item, 0)
                        assert item == {name: expected[name] for name in item}, (bucket, since, until, start)
    await db.close()
