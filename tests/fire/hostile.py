"""Hostile input: every answer is a success or a described refusal, in time, and nothing stays of what was refused.

Its one invariant: each case is a request of its own, on a connection of its own, byte by byte as it stands.
"""

import asyncio
import random
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.fire import corpus, raw, rights
from tests.fire.corpus import Case
from tests.fire.report import Report
from tests.fire.rows import ADMIN, RUNTIME, Row
from tests.fire.world import MODEL, Json, Sql, World

REFUSED = "hostile input gets a success or a described refusal, never a fault"
IN_TIME = "hostile input is answered within 5 s"
KEPT_OUT = "nothing is stored of what was refused"
SHAPE = "every answer has a request id; every error is JSON, and holds no SQL and no trace"
DESCRIBED = "calls made up from the services' own descriptions get described answers (schemathesis)"

_LONGEST_SECONDS = 5.0
_INSIDE = (b"Traceback", b"asyncpg", b"sqlalchemy", b"SELECT ", b"dev.session", b'File "')
# What the door and the router say before a route is known: they are described nowhere, or at every route.
_DOOR = {400, 404, 405, 413, 431}
_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_ROWS = (
    "SELECT (SELECT count(*) FROM dev.session_messages WHERE superseded_at IS NULL)"
    " + (SELECT count(*) FROM dev.session_memories)"
    " + (SELECT count(*) FROM dev.relay_api_keys) + (SELECT count(*) FROM dev.relay_accounts)"
)
# The sweeper moves versions on, too: by one for each session and turn that has run out.
_STORE_ROWS = (
    f"{_ROWS} + (SELECT coalesce(sum(version), 0) + count(*) - count(*) FILTER (WHERE ended_reason = 'expired')"
    " FROM dev.sessions) - (SELECT count(*) FROM dev.session_turns WHERE status = 'expired')"
)

EXTRA: list[Row] = [
    Row("POST", "/v1/messages", "key", "messages", body)
    for body in (
        {
            "model": MODEL,
            "max_tokens": 50,
            "system": [{"type": "text", "text": "x"}],
            "tools": [{"name": "t", "input_schema": {"type": "object"}}],
            "metadata": {"user_id": "u", "session_id": "s"},
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        },
    )
]
FULL: dict[tuple[str, str], Json] = {
    ("POST", "/api/v1/sessions"): {
        "user_id": "{user_id}",
        "session_id": "x",
        "title": "x",
        "metadata": {"a": 1},
        "conversation_data": {"a": 1},
        "idle_timeout_seconds": 60,
        "if_exists": "return",
    },
    ("POST", "/api/v1/sessions/{session_id}/messages"): {
        "role": "user",
        "content": [{"type": "text", "text": "x"}],
        "message_type": "chat",
        "tokens_used": 1,
        "cost_usd": 0.1,
        "metadata": {"a": 1},
        "native": {"a": 1},
        "message_id": "x",
    },
    ("POST", "/api/v1/sessions/{session_id}/turns"): {
        "messages": [{"role": "user", "content": "x"}],
        "rewind_to_seq": 0,
        "create_session": {"if_exists": "return"},
        "context": {"max_tokens": 1000, "max_messages": 10, "memories": True, "format": "claude"},
        "lease_seconds": 5,
        "wait_seconds": 0,
    },
    ("POST", "/api/v1/sessions/{session_id}/turns/{turn_id}/complete"): {
        "lease_token": "x",
        "status": "completed",
        "messages": [{"role": "assistant", "content": "x"}],
        "usage": {"input_tokens": 1},
        "cost_usd": 0.1,
        "stop_reason": "end_turn",
        "model": "m",
        "upstream": {"a": 1},
        "error": {"a": 1},
    },
    ("PUT", "/api/v1/sessions/{session_id}"): {
        "title": "x",
        "metadata": {"a": 1},
        "conversation_data": {"a": 1},
        "session_summary": "x",
        "summary_to_seq": 1,
        "status": "active",
        "idle_timeout_seconds": 60,
    },
    ("POST", "/admin/api-keys"): {
        "name": "x",
        "description": "x",
        "userId": "u",
        "collectSession": False,
        "tokenLimit": 1,
        "concurrencyLimit": 1,
        "rateLimitWindow": 1,
        "rateLimitRequests": 1,
        "dailyCostLimit": 1,
        "totalCostLimit": 1,
        "permissions": ["messages"],
        "allowedModels": ["m"],
        "expiresAt": "2030-01-01T00:00:00Z",
        "isActive": True,
        "tags": ["x"],
    },
    ("POST", "/admin/accounts"): {
        "id": "{new_id}",
        "name": "x",
        "provider": "anthropic",
        "base_url": "http://127.0.0.1:9",
        "api_key": "x",
        "proxy_url": "http://u:p@127.0.0.1:9",
        "models": ["nobody-asks-for-it"],
        "priority": 1,
        "weight": 1,
        "max_concurrency": 1,
        "enabled": False,
    },
}


async def run(report: Report, made: World, *, at_most: int = 0, seed: int = 0, examples: int = 20) -> None:
    """All cases, or so many of them chosen by the seed; then schemathesis, so many examples a call."""
    await run_corpus(report, made, at_most=at_most, seed=seed)
    if examples:
        await run_schemathesis(report, made, examples)


async def run_corpus(report: Report, made: World, *, at_most: int = 0, seed: int = 0) -> None:
    chance = random.Random(seed)
    ready = await Ready.of(made)
    for service, rows in (("session_service", rights.STORE), ("relay", [*rights.RELAY, *EXTRA])):
        found = list(corpus.cases([replace(row, body=FULL.get(row.call, row.body)) for row in rows]))
        if at_most and len(found) > at_most:
            found = chance.sample(found, at_most)
        report.say(f"{service}: {len(found)} cases")
        async with made.sql() as sql:
            for case in found:
                await ready.send(report, service, case, sql)
    for part, name in (("store-0", "session_service"), ("relay-0", "relay")):
        report.check(REFUSED, made.is_up(part), f"{name} has ended")
        faults = [line for line in made.process(part).logged().splitlines() if '"unhandled_error"' in line]
        report.check(REFUSED, not faults, f"{name} logged {faults[:1]}")


class Ready:
    """Credentials, ids that exist, and what the services say of themselves."""

    def __init__(self, made: World, owner: rights.Owner, described: dict[str, Json]) -> None:
        self._made = made
        self._names = owner.names
        self._key = owner.user.key
        self._runtime_key = owner.runtime_key
        self._described = described

    @classmethod
    async def of(cls, made: World) -> "Ready":
        owner = await rights.prepare(made)
        described: dict[str, Json] = {}
        for service, base in (("session_service", made.store()), ("relay", made.relay())):
            answer = await made.http.get(f"{base}/openapi.json", headers=made.store_headers)
            described[service] = answer.json()["paths"]
        return cls(made, owner, described)

    async def send(self, report: Report, service: str, case: Case, sql: Sql) -> None:
        statement = _STORE_ROWS if service == "session_service" else _ROWS
        before = await sql.fetchval(statement)
        began = time.monotonic()
        port = (self._made.store_ports if service == "session_service" else self._made.relay_ports)[0]
        try:
            answer = await raw.exchange(port, self._bytes(service, case), seconds=20)
        except TimeoutError:
            report.check(IN_TIME, False, f"{service} {case.name}: no answer")
            return
        seconds = time.monotonic() - began
        report.check(IN_TIME, seconds < _LONGEST_SECONDS, f"{service} {case.name}: {seconds:.1f} s")
        told = f"{service} {case.name}: {answer.status} {answer.text[:200]}"
        is_fine = 200 <= answer.status < 300
        report.check(REFUSED, is_fine or self._is_described(service, case, answer.status), told)
        is_error_json = is_fine or answer.headers.get("content-type") == "application/json"
        is_silent = not any(word in answer.body for word in _INSIDE) or is_fine
        report.check(SHAPE, "x-request-id" in answer.headers and is_error_json and is_silent, told)
        if 400 <= answer.status < 500:
            after = await sql.fetchval(statement)
            report.check(KEPT_OUT, after == before, told)

    def _is_described(self, service: str, case: Case, status: int) -> bool:
        if not 400 <= status < 500:
            return False
        if status in _DOOR:
            return True
        path = case.row.path.replace(":path}", "}").replace(":anything}", "}")
        for prefix in ("", "/api/v1", "/api"):
            operation = self._described[service].get(path.removeprefix(prefix), {}).get(case.row.method.lower())
            if operation:
                return str(status) in operation["responses"] or "4XX" in operation["responses"]
        return case.row.path == "/"

    def _bytes(self, service: str, case: Case) -> bytes:
        headers = {b"content-type": b"application/json"}
        if service == "session_service":
            query = {**case.row.query, "user_id": self._names["user_id"]}
            headers[b"authorization"] = self._made.store_headers["authorization"].encode()
        else:
            query = rights.filled(case.row.query, self._names)
            headers |= {b"authorization": self._made.admin_headers["authorization"].encode()}
            keys = {RUNTIME: {b"x-session-api-key": self._runtime_key.encode()}, ADMIN: {}}
            headers |= keys.get(case.row.kind, {b"x-api-key": self._key.encode()})
        names = {**self._names, "new_id": uuid.uuid4().hex, "session_id": f"hostile-{uuid.uuid4().hex[:8]}"}
        names["session_id"] = names["session_id"] if service == "relay" else self._names["session_id"]
        target = case.target.encode()
        if case.raw_segment is not None:
            name, segment = case.raw_segment
            target = target.replace(b"{" + name.encode() + b"}", segment)
        target = rights.filled(target.decode("latin-1"), names).encode("latin-1")
        queries = [each for each in (case.query, urlencode(query).encode()) if each]
        target += b"?" + b"&".join(queries) if queries else b""
        body = case.body
        if body is not None:
            body = rights.filled(body.decode("latin-1"), names).encode("latin-1")
        return raw.request(case.row.method.encode(), target, {**headers, **case.headers}, body)


async def run_schemathesis(
    report: Report, made: World, examples: int, services: tuple[str, ...] = ("session_service", "relay")
) -> None:
    key = await made.make_key(f"made-up-{uuid.uuid4().hex[:8]}")
    store = ["-H", f"Authorization: Bearer {made.secrets.store_token}", "--exclude-path", "/api/v1/sessions/import"]
    # Accounts would be made that lead to any place in the world.
    relay = ["-H", f"Authorization: Bearer {made.secrets.admin_token}", "-H", f"x-api-key: {key}"]
    relay += ["--exclude-path-regex", "^/admin/accounts"]
    for service, base, more in (("session_service", made.store(), store), ("relay", made.relay(), relay)):
        if service not in services:
            continue
        done = await asyncio.to_thread(_schemathesis, base, more, examples, made.folder)
        if not report.check(DESCRIBED, done.returncode == 0, f"{service}: {done.stdout[-8000:]}"):
            continue
        report.note(DESCRIBED, **{service: _generated(done.stdout)})


def _schemathesis(base: str, more: list[str], examples: int, folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "run", f"{base}/openapi.json", "--checks", _CHECKS, "--max-examples", str(examples)]
    command += ["--phases", "coverage,fuzzing", *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)


def _generated(output: str) -> Any:
    return next((line.split()[0] for line in output.splitlines() if " generated" in line), "?")
