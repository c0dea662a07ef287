"""Every statement of a request path finds its rows by an index, whatever the size of the tables."""

import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy.sql import ClauseElement

from services.session_service import history, listing, stats
from shared.database import compile_statement

NOUNS = [
    "align",
    "batches",
    "counting",
    "creation",
    "erasure",
    "export",
    "forks",
    "gathering",
    "idempotency",
    "imported_rows",
    "completion",
    "indexing",
    "leases",
    "memories",
    "messages",
    "opening",
    "recent",
    "rewind",
    "search",
    "sessions",
    "turns",
]
# Over all users: cached, or of a few sessions only (more of them are read from sums), or beside the request path.
ACROSS_USERS = {"turns.COUNT_OPEN", "idempotency.FORGET", "indexing.PUT"}
TABLES = {
    *("sessions", "session_messages", "session_turns", "session_memories", "session_search"),
    *("idempotency_records", "session_totals", "usage_buckets"),
}


def _statements() -> Iterator[tuple[str, ClauseElement]]:
    for noun in NOUNS:
        module = importlib.import_module(f"services.session_service.{noun}")
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, ClauseElement) and hasattr(value, "compile") and _runs(value):
                yield f"{noun}.{name}", value
        for name, value in vars(module).get("PARTS", {}).items():
            yield f"{noun}.PARTS.{name}", value
    for name in ("LIVE_OF_USER", "OVERDUE_OF_USER", "SUMS", "USAGE", "MESSAGES"):
        yield f"stats.{name}", getattr(stats, name)
    for bucket in ("hour", "day", "month"):
        yield f"stats.LIVE_USAGE.{bucket}", stats.LIVE_USAGE[bucket, True]
    wanted = history.Filter()
    yield "history.page", history.page_statement(wanted, "asc")
    yield "history.after", history._beside(wanted, "after")
    yield "history.before", history._beside(wanted, "before")
    for status in (None, "active", "ended"):
        for of_ids in (False, True):
            name = f"{status}.{of_ids}"
            yield f"listing.count.{name}", listing._count(status, of_ids=of_ids)
            yield f"listing.page.{name}", listing._page(status, "last_activity", by_cursor=True, of_ids=of_ids)


def _runs(value: ClauseElement) -> bool:
    return getattr(value, "is_select", False) or getattr(value, "is_dml", False)


def _scans(plan: dict[str, Any]) -> Iterator[str]:
    if plan["Node Type"] == "Seq Scan" and plan.get("Relation Name") in TABLES:
        yield plan["Relation Name"]
    for below in plan.get("Plans", ()):
        yield from _scans(below)


@pytest.fixture(scope="module")
def plans_database(make_database: Callable[[], str]) -> str:
    return make_database()


async def test_no_statement_of_a_request_scans_a_table(plans_database: str) -> None:
    connection = await asyncpg.connect(plans_database)
    try:
        if connection.get_server_version().major < 16:
            pytest.skip("EXPLAIN (GENERIC_PLAN) came with PostgreSQL 16")
        # With small tables a scan is cheapest; forbidden, it is taken only where there is no other way.
        await connection.execute("SET enable_seqscan = off")
        scanned = {}
        seen = 0
        for name, statement in _statements():
            seen += 1
            plan = await _explained(connection, compile_statement(statement, "dev").sql)
            if found := sorted(_scans(plan)):
                scanned[name] = found
    finally:
        await connection.close()
    assert seen > 40
    assert {name: tables for name, tables in scanned.items() if name not in ACROSS_USERS} == {}


async def _explained(connection: "asyncpg.Connection[asyncpg.Record]", sql: str) -> dict[str, Any]:
    """The generic plan of a statement with parameters."""
    quoted = sql.replace("'", "''")
    await connection.execute(
        "CREATE OR REPLACE FUNCTION pg_temp.explained() RETURNS json LANGUAGE plpgsql AS $f$ DECLARE found json; BEGIN "
        f"EXECUTE 'EXPLAIN (GENERIC_PLAN, FORMAT JSON) {quoted}' INTO found; RETURN found; END $f$"
    )
    found: str = await connection.fetchval("SELECT pg_temp.explained()")
    plan: dict[str, Any] = json.loads(found)[0]["Plan"]
    return plan
