"""Afterwards: is everything there that clients were told, once, in order, with sums that agree and nothing held?

Its one invariant: it only reads.
"""

import asyncio
import time
from collections import Counter, defaultdict
from typing import Any

from tests.fire import leaks
from tests.fire.clients import MARKER, Client, Entry
from tests.fire.report import Report
from tests.fire.world import Sql, World

KEPT = "what was acknowledged is stored, as it was told"
ONCE = "nothing is stored twice"
# Deferred by a relay that then died, while another relay went on with the session: the store takes it no more.
ASIDE = "an answer that came too late for its turn is set aside on disk, not lost"
ASKED = "nothing is stored that nobody sent"
SEQS = "seqs are 1, 2, 3 … without a gap or a twin"
SUMS = "counters equal the rows' sums (fsck)"
FREE = "no lease, slot, reservation, key or spool entry stays held"
ONE_USER = "a request upstream holds text of one user only"

_DRAIN_SECONDS = 60.0
_HELD = {
    "open turns": "SELECT count(*) FROM dev.session_turns WHERE status = 'open'",
    "leases": "SELECT count(*) FROM dev.sessions WHERE lease_expires_at IS NOT NULL",
    "slots": "SELECT count(*) FROM dev.relay_slots WHERE expires_at > now()",
    "reservations": "SELECT count(*) FROM dev.relay_key_reservations",
    "requests in flight": "SELECT coalesce(sum(in_flight), 0) FROM dev.relay_key_use",
    "reserved tokens": "SELECT coalesce(sum(reserved_tokens), 0) FROM dev.relay_key_use",
    "idempotency keys": "SELECT count(*) FROM dev.relay_idempotency WHERE status = 'running'"
    " AND lease_expires_at > now()",
    "sessions not indexed": "SELECT count(*) FROM dev.sessions WHERE indexed_version < version",
}
_COUNTERS = """
SELECT s.user_id, s.session_id, s.message_count, s.total_tokens, s.total_cost,
       count(m.seq) FILTER (WHERE m.superseded_at IS NULL) AS rows, coalesce(sum(m.tokens_used), 0) AS tokens,
       coalesce(sum(m.cost_usd), 0) AS cost, coalesce(max(m.seq), 0) AS last, count(m.seq) AS all_rows
  FROM dev.sessions s LEFT JOIN dev.session_messages m USING (user_id, session_id)
 GROUP BY s.user_id, s.session_id
"""


async def audit(world: World, clients: list[Client], report: Report, *, held: bool = True) -> None:
    """Everything is up again and nobody writes; reports what is found.

    With `held` it also waits for what is held to be free, and looks for secrets. What a killed process held is free
    when its lease has run out, half a minute at most.
    """
    report.say("auditing")
    if held:
        await check_nothing_is_held(world, report)
    await check_journals(clients, report, world.set_aside())
    async with world.sql() as sql:
        await check_counters(sql, report)
    checked = await asyncio.to_thread(world.fsck)
    report.check(SUMS, (checked.returncode, checked.stdout) == (0, ""), checked.stdout + checked.stderr[-500:])
    if held:
        await leaks.scan(report, world)
    for entry in await asyncio.to_thread(world.upstream.requests):
        markers = set(MARKER.findall(entry["body"].decode(errors="replace")))
        report.check(ONE_USER, len(markers) <= 1, f"request {entry['number']}: {sorted(markers)}")


async def check_nothing_is_held(world: World, report: Report) -> None:
    deadline = time.monotonic() + _DRAIN_SECONDS
    async with world.sql() as sql:
        while (left := await _held(world, sql)) and time.monotonic() < deadline:
            await asyncio.sleep(0.25)
    for name in [*_HELD, "spool entries"]:
        report.check(FREE, not left.get(name), f"{left.get(name)} {name} after {_DRAIN_SECONDS} s")


async def _held(world: World, sql: Sql) -> dict[str, int]:
    found = {name: await sql.fetchval(statement) for name, statement in _HELD.items()}
    found["spool entries"] = len(world.spooled())
    return {name: count for name, count in found.items() if count}


async def check_counters(sql: Sql, report: Report) -> None:
    """Without the code under test: fsck is ours, this is SQL."""
    for row in await sql.fetch(_COUNTERS):
        place = f"{row['user_id']} {row['session_id']}"
        report.check(SEQS, row["last"] == row["all_rows"], f"{place}: {row['all_rows']} rows, last {row['last']}")
        told = (row["message_count"], row["total_tokens"], row["total_cost"])
        counted = (row["rows"], row["tokens"], row["cost"])
        report.check(SUMS, told == counted, f"{place}: {told}, by its rows {counted}")


async def check_journals(clients: list[Client], report: Report, set_aside: list[str]) -> None:
    """`set_aside` are completions that came too late: another relay had gone on with the session meanwhile."""
    by_session: dict[tuple[str, str], list[Client]] = defaultdict(list)
    for client in clients:
        by_session[client.user.id, client.session_id].append(client)
    for sharing in by_session.values():
        stored = await _stored(sharing[0])
        entries = [entry for client in sharing for entry in client.journal]
        place = f"{sharing[0].user.id} {sharing[0].session_id}"
        seqs = [message["seq"] for message in stored]
        report.check(SEQS, seqs == list(range(1, len(seqs) + 1)), f"{place}: {seqs[:50]}")
        _compare(place, entries, stored, report, set_aside)


async def _stored(client: Client) -> list[dict[str, Any]]:
    """All messages of its session, in order, those taken back too."""
    found: list[dict[str, Any]] = []
    while True:
        params = {"after_seq": found[-1]["seq"] if found else 0, "limit": 1000, "include_superseded": True}
        page = await client.store("GET", f"{client.path}/messages", params=params)
        if page.status_code == 404:
            return []
        client.look(page.text, "audit")
        messages = page.json()["messages"]
        if not messages:
            return found
        found += messages


def _compare(
    place: str, entries: list[Entry], stored: list[dict[str, Any]], report: Report, set_aside: list[str]
) -> None:
    visible = [message for message in stored if message["superseded_at"] is None]
    texts = Counter((message["role"], message["content"]) for message in visible)
    at = {(message["role"], message["content"]): message for message in visible}
    for entry in entries:
        key = (entry.role, entry.text)
        if entry.is_told:
            report.trial(KEPT)
            message = at.get(key)
            if message is None and entry.role == "assistant" and any(entry.text in each for each in set_aside):
                report.trial(ASIDE)
                report.say(f"{ASIDE}: {place} {entry.text!r}")
            elif message is None:
                report.violation(KEPT, f"{place}: lost {entry}")
            elif entry.seq is not None and (entry.seq, entry.message_id) != (message["seq"], message["message_id"]):
                report.violation(KEPT, f"{place}: told {entry}, stored {message['seq']} {message['message_id']}")
        report.check(ONCE, texts[key] <= 1, f"{place}: {texts[key]} times {entry.text!r}")
    sent = {entry.text for entry in entries if entry.role == "user"} | {entry.text for entry in entries}
    for message in visible:
        if message["role"] == "user":
            report.check(ASKED, message["content"] in sent, f"{place}: {message['content']!r}")
    answered = Counter(text for (role, text), count in texts.items() if role == "assistant" for _ in range(count))
    report.check(ONCE, all(count == 1 for count in answered.values()), f"{place}: {answered.most_common(2)}")
