"""Fills an empty, migrated database with many sessions and messages, by COPY.

Its one invariant: what it loads looks as if the service had written it: counters, search index and sums agree with
the rows (`python -m services.session_service.fsck` says so).
"""

import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from services.session_service import words
from shared.canonical import message_hash

DAYS = 365
PHRASES = 400
_CHUNK_LINES = 5_000
_WORDS = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend
"""
_VOCABULARY = _WORDS.split()
_CHINESE = "我们使用这个服务来保存对话记录并且可以搜索所有的消息今天天气很好请介绍一下数据库索引如何工作谢谢"


@dataclass(frozen=True, slots=True)
class Size:
    """How much to load. One user in a thousand is a heavy one, with a tenth of all sessions between them."""

    sessions: int
    messages: int
    users: int

    def user_of(self, session: int) -> str:
        if session % 10 == 0:
            return f"heavy-{session // 10 % max(1, self.users // 1000)}"
        return f"user-{session % self.users}"


@dataclass(frozen=True, slots=True)
class Phrase:
    """A text with what is stored beside it; `vector` has a mark where the user's own prefix goes."""

    text: str
    vector: str
    hash: str


_MARK = "\x01"


def _phrases(chance: random.Random) -> list[Phrase]:
    found = []
    for number in range(PHRASES):
        chosen = " ".join(chance.choices(_VOCABULARY, k=12)) + f" topic{number}"
        start = chance.randrange(len(_CHINESE) - 12)
        text = chosen if number % 4 else f"{_CHINESE[start : start + 12]} {chosen}"
        own = words.own_prefix("any")
        vector = words.vector("any", text)[0].replace(f"'{own}", f"'{_MARK}")
        found.append(Phrase(text, vector, "\\\\x" + message_hash("user", text).hex()))
    return found


def _moment(start: datetime, session: int, size: Size, place: int) -> str:
    moment = start + timedelta(days=DAYS) * (session / size.sessions) + timedelta(seconds=30 * place)
    return moment.isoformat()


def _counts(size: Size) -> Iterator[tuple[int, int]]:
    """Each session's number and how many messages it has."""
    base, more = divmod(size.messages, size.sessions)
    for session in range(size.sessions):
        yield session, base + (session < more)


def _session_lines(size: Size, start: datetime) -> Iterator[str]:
    for session, count in _counts(size):
        first, last = _moment(start, session, size, 0), _moment(start, session, size, count - 1)
        status = "active" if session % 3 else "ended"
        reason = "\\N" if session % 3 else "user"
        user = size.user_of(session)
        yield (
            f"{user}\ts-{session}\tSession {session}\t{status}\t{reason}\t{count}\t{count}\t{count * 10}\t"
            f"{count * 0.001:.6f}\t{first}\t{last}\t{last}\t1\t{count}\tt\t{'t' if session % 3 else 'f'}\t{count}\t"
            f"{count * 10}\t{count * 0.001:.6f}\t{last}\n"
        )


_SESSION_COLUMNS_TEXT = """
user_id session_id title status ended_reason message_count last_seq total_tokens total_cost created_at
updated_at last_activity indexed_version indexed_seq counted counted_active counted_messages counted_tokens
counted_cost counted_to
"""
_SESSION_COLUMNS = _SESSION_COLUMNS_TEXT.split()


def _message_lines(size: Size, start: datetime, phrases: list[Phrase]) -> Iterator[str]:
    for session, count in _counts(size):
        user = size.user_of(session)
        for place in range(count):
            phrase = phrases[(session * 7 + place) % PHRASES]
            role = "assistant" if place % 2 else "user"
            yield (
                f"{user}\ts-{session}\t{place + 1}\tm-{session}-{place}\t{role}\tchat\t{phrase.text}\t10\t0.001\t"
                f"30\tf\t{'f' if place % 2 else 't'}\t{phrase.hash}\t{_moment(start, session, size, place)}\n"
            )


_MESSAGE_COLUMNS_TEXT = """
user_id session_id seq message_id role message_type content tokens_used cost_usd context_tokens
context_tokens_reported begins_window canonical_hash created_at
"""
_MESSAGE_COLUMNS = _MESSAGE_COLUMNS_TEXT.split()


def _search_lines(size: Size, phrases: list[Phrase]) -> Iterator[str]:
    own: dict[str, str] = {}
    for session, count in _counts(size):
        user = size.user_of(session)
        prefix = own.get(user) or own.setdefault(user, words.own_prefix(user))
        yield f"{user}\ts-{session}\t0\t'{prefix}session':1 '{prefix}{session}':2\tf\n"
        for place in range(count):
            phrase = phrases[(session * 7 + place) % PHRASES]
            yield f"{user}\ts-{session}\t{place + 1}\t{phrase.vector.replace(_MARK, prefix)}\tf\n"


_SEARCH_COLUMNS = ("user_id", "session_id", "seq", "words", "is_long")

# What the worker beside the request path would have made of these rows.
_SUMS = """
INSERT INTO {schema}.session_totals (user_id, sessions, active, messages, tokens, cost)
SELECT scope, count(*), count(*) FILTER (WHERE counted_active), sum(counted_messages), sum(counted_tokens),
       sum(counted_cost)
FROM {schema}.sessions, unnest(ARRAY[user_id, '']) AS scope GROUP BY scope;
INSERT INTO {schema}.usage_buckets (user_id, bucket, start, messages, tokens, cost, active_sessions)
SELECT scope, bucket, date_trunc(bucket, created_at, 'UTC'), sum(n), sum(tokens), sum(cost), count(*)
FROM (
    SELECT user_id, session_id, bucket, date_trunc(bucket, created_at, 'UTC') AS created_at, count(*) AS n,
           sum(tokens_used) AS tokens, sum(cost_usd) AS cost
    FROM {schema}.session_messages, unnest(ARRAY['hour', 'day', 'month']) AS bucket
    GROUP BY 1, 2, 3, 4
) AS by_session, unnest(ARRAY[user_id, '']) AS scope GROUP BY 1, 2, 3;
"""


async def _copy(connection: Any, schema: str, table: str, columns: Any, lines: Iterator[str], total: int) -> None:
    started_at = time.monotonic()

    async def source() -> AsyncIterator[bytes]:
        done, chunk = 0, []
        for line in lines:
            chunk.append(line)
            if len(chunk) == _CHUNK_LINES:
                done += len(chunk)
                yield "".join(chunk).encode()
                chunk.clear()
                sys.stderr.write(f"\r{table}: {done / total:4.0%}")
        yield "".join(chunk).encode()

    await connection.copy_to_table(table, schema_name=schema, columns=list(columns), source=source(), timeout=600)
    sys.stderr.write(f"\r{table}: {total} rows in {time.monotonic() - started_at:.1f} s\n")


async def load(url: str, schema: str, size: Size) -> None:
    """Loads everything; indexes that are slow to grow are made after their rows."""
    started_at = time.monotonic()
    phrases = _phrases(random.Random(1))
    start = datetime.now(UTC) - timedelta(days=DAYS, hours=1)
    connection = await asyncpg.connect(url, timeout=30, command_timeout=1200)
    try:
        await connection.execute("SET synchronous_commit = off")
        await connection.execute("SET maintenance_work_mem = '1GB'; SET work_mem = '256MB'")
        await connection.execute("SET session_replication_role = replica")  # foreign keys hold by construction
        words_index = await connection.fetchval(
            "SELECT indexdef FROM pg_indexes WHERE schemaname = $1 AND indexname = 'session_search_words_idx'", schema
        )
        await connection.execute(f"DROP INDEX {schema}.session_search_words_idx")
        await _copy(connection, schema, "sessions", _SESSION_COLUMNS, _session_lines(size, start), size.sessions)
        messages = _message_lines(size, start, phrases)
        await _copy(connection, schema, "session_messages", _MESSAGE_COLUMNS, messages, size.messages)
        found = _search_lines(size, phrases)
        await _copy(connection, schema, "session_search", _SEARCH_COLUMNS, found, size.messages + size.sessions)
        for what, sql in (
            ("search index", words_index),
            ("sums", _SUMS.format(schema=schema)),
            ("statistics", "ANALYZE"),
        ):
            step_at = time.monotonic()
            await connection.execute(sql)
            sys.stderr.write(f"{what}: {time.monotonic() - step_at:.1f} s\n")
    finally:
        await connection.close()
    sys.stderr.write(f"loaded in {time.monotonic() - started_at:.0f} s\n")
