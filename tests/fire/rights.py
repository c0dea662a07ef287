"""Who may do what: every route of both services, by every kind of caller, and the status that each gets.

Its one invariant: a route without a row, and a row without a route, are both violations.

To add a route: one row below. `KEYED` rows say what the key must be allowed (None: any valid key will do), and what
another user gets, to whom the owner's things do not exist.
"""

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx

from tests.fire import conversation_rights
from tests.fire.clients import MARKER, User
from tests.fire.report import Report
from tests.fire.routes import SOCKET, Call, relay_routes, store_routes
from tests.fire.rows import ADMIN, ALL, EITHER, KEYED, RUNTIME, Row
from tests.fire.world import MODEL, Json, World

EVERY_ROUTE = "every route has a row in the table of rights, and every row a route"
STATUS = "each caller gets the status that the table says"
NOTHING = "a caller without the right sees and changes nothing"

# ── relay ───────────────────────────────────────────────────────────────────────────────────────

_ASK = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "{text}"}]}
_CHAT = {"message": "{text}", "conversation_id": "{session_id}", "model": MODEL}
_NEW_ACCOUNT = {"id": "{new_id}", "name": "rights", "base_url": "http://127.0.0.1:9", "api_key": "{new_id}"}
_CLAUDE = ("", "/api", "/claude-kiro-oauth", "/api/v1/claude-kiro-oauth")


def _public(*paths: str) -> list[Row]:
    return [Row("GET", path, ALL) for path in paths]


def _admin(method: str, path: str, body: Any = None, owner: int = 200) -> Row:
    return Row(method, path, ADMIN, body=body, owner=owner)


RELAY: list[Row] = [
    *_public("/", "/health", "/health/live", "/health/ready", "/metrics", "/queue/health", "/api/v1/queue/health"),
    *_public("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"),
    *(
        row
        for prefix in _CLAUDE
        for row in (
            Row("POST", f"{prefix}/v1/messages", KEYED, "messages", _ASK),
            Row("POST", f"{prefix}/v1/messages/count_tokens", KEYED, "messages", _ASK),
            Row("GET", f"{prefix}/v1/models", KEYED, "messages"),
            Row("GET", f"{prefix}/v1/models/{{model_id:path}}", KEYED, "messages"),
            Row("GET", f"{prefix}/v1/turns/{{turn_id}}", KEYED, stranger=404),
        )
    ),
    *(
        row
        for prefix in ("", "/api/v1")
        for row in (
            Row("GET", f"{prefix}/sessions/{{session_id}}", KEYED, stranger=404),
            Row("POST", f"{prefix}/sessions/{{session_id}}/summarize", KEYED, "messages", {}, stranger=404),
            Row("POST", f"{prefix}/sessions/{{session_id}}/close", KEYED, stranger=404),
        )
    ),
    Row("POST", "/api/chat", KEYED, "chat", _CHAT),
    Row("POST", "/api/chat/stream", KEYED, "chat", _CHAT),
    Row("GET", "/api/sessions", KEYED, "chat"),
    Row("GET", "/api/sessions/{session_id}", KEYED, "chat", stranger=404),
    Row("DELETE", "/api/sessions/{session_id}", KEYED, "chat", stranger=404),
    _admin("GET", "/admin/accounts"),
    _admin("POST", "/admin/accounts", _NEW_ACCOUNT),
    _admin("GET", "/admin/accounts/{account_id}"),
    _admin("PATCH", "/admin/accounts/{account_id}", {"priority": 5}),
    _admin("POST", "/admin/accounts/{account_id}/disable"),
    _admin("POST", "/admin/accounts/{account_id}/test"),
    _admin("DELETE", "/admin/accounts/{account_id}"),
    _admin("POST", "/admin/accounts/{account_id}/enable", owner=404),
    _admin("GET", "/admin/api-keys"),
    _admin("POST", "/admin/api-keys", {"name": "{new_id}"}),
    _admin("GET", "/admin/api-keys/{key_id}"),
    _admin("PATCH", "/admin/api-keys/{key_id}", {"description": "x"}),
    _admin("PATCH", "/admin/api-keys/{key_id}/collect-session", {"collectSession": False}),
    _admin("DELETE", "/admin/api-keys/{key_id}"),
    _admin("POST", "/admin/api-keys/{key_id}/restore"),
    _admin("GET", "/admin/session-pool/stats"),
    _admin("POST", "/admin/session-pool/switch"),
    _admin("POST", "/admin/session-pool/set-current", {"sessionId": "nowhere"}, owner=404),
    _admin("DELETE", "/admin/session-pool"),
    *conversation_rights.ROWS,
]

# ── session_service: whoever has a token may name any user; the owner is the user that is named ─

_SAID = {"role": "user", "content": "{text}"}
_MEMORY = {"memory_type": "custom", "content": "{text}"}


def _of_session(method: str, path: str, body: Any = None, owner: int = 200) -> Row:
    return Row(method, f"/api/v1/sessions/{{session_id}}{path}", KEYED, body=body, owner=owner, stranger=404)


STORE: list[Row] = [
    *_public("/health", "/health/live", "/health/ready", "/health/detailed", "/metrics"),
    *(Row("GET", path, KEYED) for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")),
    Row("GET", "/api/v1/sessions", KEYED),
    Row("GET", "/api/v1/sessions/search", KEYED, query={"q": "mine"}),
    Row("GET", "/api/v1/sessions/stats", KEYED),
    Row("GET", "/api/v1/sessions/stats/usage", KEYED, query={"bucket": "day"}),
    Row("GET", "/api/v1/users/{user_id}/sessions", KEYED),
    Row("GET", "/api/v1/users/{user_id}/memories", KEYED),
    Row("GET", "/api/v1/users/{user_id}/stats", KEYED),
    Row("POST", "/api/v1/sessions", KEYED, body={"user_id": "{user_id}", "title": "{text}"}),
    Row("POST", "/api/v1/sessions/import", KEYED, content="{{}}\n", owner=400, stranger=400),
    _of_session("GET", ""),
    _of_session("PUT", "", {"title": "{text}"}),
    _of_session("GET", "/summary"),
    _of_session("GET", "/context"),
    _of_session("GET", "/export"),
    _of_session("GET", "/messages"),
    _of_session("GET", "/messages/{message_id:anything}"),
    _of_session("POST", "/messages", _SAID),
    _of_session("POST", "/messages/batch", {"messages": [_SAID]}),
    _of_session("POST", "/align", {"hashes": []}),
    _of_session("GET", "/turns"),
    _of_session("GET", "/turns/{turn_id}"),
    Row("GET", "/api/v1/turns/{turn_id}", KEYED, stranger=404),
    _of_session("POST", "/turns/{turn_id}/renew", {"lease_token": "{lease_token}"}, owner=409),
    _of_session("POST", "/turns/{turn_id}/complete", {"lease_token": "x", "status": "completed"}, owner=409),
    _of_session("POST", "/memory", _MEMORY),
    _of_session("GET", "/memory"),
    _of_session("GET", "/memories"),
    _of_session("PUT", "/memories/{memory_id}", {"content": "{text}"}),
    _of_session("DELETE", "/memories/{memory_id}"),
    _of_session("POST", "/fork", {}),
    _of_session("POST", "/rewind", {"to_seq": 0}),
    _of_session("POST", "/turns", {"messages": [_SAID]}),
    _of_session("DELETE", ""),
    Row("DELETE", "/api/v1/users/{user_id}", KEYED),
]


_PERMISSIONS = {"messages", "chat", "conversations"}
_TABLES = """
SELECT c.table_name FROM information_schema.columns c JOIN information_schema.tables t USING (table_schema, table_name)
 WHERE c.table_schema = 'dev' AND c.column_name = 'user_id' AND t.table_type = 'BASE TABLE' ORDER BY 1
"""

# ── the check ───────────────────────────────────────────────────────────────────────────────────


def check_coverage(report: Report, service: str, rows: list[Row], routes: list[Call]) -> None:
    listed = [row.call for row in rows]
    report.check(EVERY_ROUTE, len(listed) == len(set(listed)), f"{service}: a row is there twice")
    for call in sorted(set(routes) | set(listed)):
        missing = "row" if call not in listed else "route"
        report.check(EVERY_ROUTE, call in listed and call in routes, f"{service}: {' '.join(call)} has no {missing}")


async def run(report: Report, made: World) -> None:
    check_coverage(report, "relay", RELAY, relay_routes())
    check_coverage(report, "session_service", STORE, store_routes())
    await _check_relay(report, made, await prepare(made))
    await _check_store(report, made, await prepare(made))


@dataclass
class Owner:
    """What belongs to one user, by the names in paths and bodies."""

    user: User
    names: dict[str, str]
    runtime_key: str = ""


async def prepare(made: World) -> Owner:
    user = User(f"owner-{uuid.uuid4().hex[:8]}")
    user.key = await made.make_key(user.id)
    names = {"user_id": user.id, "session_id": "same-for-all", "text": f"{user.marker} mine", "model_id:path": "demo"}
    body = {**_ASK, "messages": [{"role": "user", "content": f"{user.marker} mine"}]}
    headers = {"x-api-key": user.key, "x-session-id": names["session_id"]}
    asked = await made.http.post(f"{made.relay()}/v1/messages", json=body, headers=headers)
    assert asked.status_code == 200, asked.text
    names["turn_id"] = asked.headers["x-turn-id"]
    query = {"user_id": user.id}
    path = f"{made.store()}/api/v1/sessions/{names['session_id']}"
    listed = await made.http.get(f"{path}/messages", params=query, headers=made.store_headers)
    names["message_id:anything"] = listed.json()["messages"][0]["message_id"]
    memory = {"memory_type": "custom", "content": f"{user.marker} mine"}
    kept = await made.http.post(f"{path}/memory", params=query, json=memory, headers=made.store_headers)
    names["memory_id"] = kept.json()["memory_id"]
    names["account_id"], names["lease_token"] = f"account-{user.id}", "x"
    await made.make_account(1, id=names["account_id"])
    spare = {"name": "spare", "userId": "spare"}
    answer = await made.http.post(f"{made.relay()}/admin/api-keys", json=spare, headers=made.admin_headers)
    names["key_id"] = answer.json()["data"]["id"]
    models = await made.http.get(f"{made.relay()}/v1/models", headers={"x-api-key": user.key})
    names["model_id:path"] = next((each["id"] for each in models.json()["data"]), MODEL)
    conversation = await _conversation(made, user, names["text"])
    return Owner(user, names | conversation.names, conversation.runtime_key)


async def _conversation(made: World, user: User, text: str) -> Owner:
    """A conversation of the user, with a file, that has answered."""
    headers = {"x-api-key": user.key}
    url = f"{made.relay()}/api/conversations"
    body = {"initial_user_msg": text}
    started = await made.http.post(url, json=body, headers=headers)
    assert started.status_code == 200, started.text
    names = {"id": started.json()["conversation_id"], "path:anything": "%2Fworkspace%2Fmine.txt"}
    names["id:anything"] = names["id"]
    url = f"{url}/{names['id']}"
    while len((await made.http.get(f"{url}/trajectory", headers=headers)).json()["trajectory"]) < 2:
        await asyncio.sleep(0.05)
    info = (await made.http.get(url, headers=headers)).json()
    names["sandbox_id"] = (await made.http.get(f"{url}/config", headers=headers)).json()["runtime_id"]
    runtime_key = str(info["session_api_key"])
    made.secrets.issued.append(runtime_key)
    upload = f"{made.relay()}/api/file/upload/{names['path:anything']}"
    files = {"file": ("mine.txt", text.encode(), "text/plain")}
    kept = await made.http.post(upload, files=files, headers={"x-session-api-key": runtime_key})
    assert kept.status_code == 200, kept.text
    return Owner(user, names, runtime_key)


def filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, dict):
        return {key: filled(each, names) for key, each in value.items()}
    return [filled(each, names) for each in value] if isinstance(value, list) else value


async def _send(
    made: World, base: str, row: Row, names: dict[str, str], headers: dict[str, str], **query: str
) -> httpx.Response:
    names = {**names, "new_id": uuid.uuid4().hex}
    if row.method == SOCKET:
        return await _socket(base + filled(row.path, names), headers)
    sent: Json = {"params": {**filled(row.query, names), **query}, "headers": headers}
    if row.content:
        sent["content"] = row.content
    elif row.files:
        sent["files"] = {row.files: ("mine.txt", names["text"].encode(), "text/plain")}
    elif row.body is not None:
        sent["json"] = filled(row.body, names)
    return await made.http.request(row.method, base + filled(row.path, names), **sent)


async def _socket(url: str, headers: dict[str, str]) -> httpx.Response:
    """What a WebSocket is told, as a status: its first frame, or why it was closed."""
    async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=headers) as socket:
        frame = await socket.receive(10)
        status = {4001: 401, 4004: 404}.get(socket.close_code or 0, 200 if frame.type is aiohttp.WSMsgType.TEXT else 0)
        return httpx.Response(status, text=str(frame.data))


async def _check_relay(report: Report, made: World, owner: Owner) -> None:
    stranger = User(f"stranger-{uuid.uuid4().hex[:8]}")
    stranger.key = await made.make_key(stranger.id)
    useless = await _useless_keys(made, owner.user.id)
    other = await _conversation(made, stranger, "not mine")
    own = {"x-session-api-key": owner.runtime_key}
    strangers = {
        "another user": {"x-api-key": stranger.key},
        "another user by bearer": {"authorization": f"Bearer {stranger.key}"},
    }
    forbidden = {
        permission: {"x-api-key": await made.make_key(owner.user.id, permissions=[*(_PERMISSIONS - {permission})])}
        for permission in _PERMISSIONS
    }
    session = {"x-session-id": owner.names["session_id"]}
    before = await _fingerprint(made, owner.user.id)
    for row in RELAY:
        for who, headers in useless.items():
            await _try(report, made, row, owner, who, headers | session, 200 if row.kind == ALL else 401)
        if row.kind != ADMIN:  # what the admin may do is done last
            expected = 200 if row.kind == ALL else 401
            await _try(report, made, row, owner, "the admin", made.admin_headers | session, expected)
        for who, headers in strangers.items():
            await _try_stranger(report, made, row, owner, who, headers | session)
        if row.permission:
            headers = forbidden[row.permission] | session
            await _try(report, made, row, owner, f"a key without {row.permission}", headers, 403)
        headers = {"x-session-api-key": other.runtime_key} | session
        expected = {ALL: 200, RUNTIME: row.other_runtime}.get(row.kind, 401)
        await _try(report, made, row, owner, "another conversation's key", headers, expected)
        if row.kind in {KEYED, ADMIN}:
            await _try(report, made, row, owner, "a runtime key", own | session, 401)
        if row.kind == RUNTIME:
            await _try(report, made, row, owner, "the user's key", {"x-api-key": owner.user.key}, 401)
            await _try(report, made, row, owner, "an empty key", {"x-session-api-key": ""}, 401)
    report.check(NOTHING, await _fingerprint(made, owner.user.id) == before, "the owner's rows have changed")
    of_owner = {ADMIN: made.admin_headers, RUNTIME: own}
    for row in RELAY:
        headers = of_owner.get(row.kind, {"x-api-key": owner.user.key})
        await _try(report, made, row, owner, "owner", headers | session, row.owner, sees=True)
        if row.kind == EITHER:
            await _try(report, made, row, owner, "its runtime key", own, row.owner, sees=True)


async def _try_stranger(report: Report, made: World, row: Row, owner: Owner, who: str, headers: dict[str, str]) -> None:
    """Another user, to whom nothing of the owner's exists."""
    expected = {ALL: 200, ADMIN: 401, RUNTIME: 401}.get(row.kind, row.stranger)
    # Its own requests have made it a session of the same id: one that it has none of shows whose they are.
    is_apart = row.kind == KEYED and row.stranger == 404 and "{session_id}" in row.path
    names = {"session_id": "only-of-the-owner"} if is_apart else {}
    await _try(report, made, row, owner, who, headers | ({"x-session-id": "none"} if is_apart else {}), expected, names)


async def _useless_keys(made: World, user_id: str) -> dict[str, dict[str, str]]:
    """Headers of callers who are nobody."""
    revoked, switched_off, expired = [await made.make_key(user_id) for _ in range(3)]
    base = f"{made.relay()}/admin/api-keys"
    by_key = {key: await _id_of(made, key) for key in (revoked, switched_off, expired)}
    await made.http.delete(f"{base}/{by_key[revoked]}", headers=made.admin_headers)
    changes = {switched_off: {"isActive": False}, expired: {"expiresAt": "2020-01-01T00:00:00Z"}}
    for key, change in changes.items():
        answer = await made.http.patch(f"{base}/{by_key[key]}", json=change, headers=made.admin_headers)
        assert answer.status_code == 200, answer.text
    return {
        "nobody": {},
        "a wrong key": {"x-api-key": "cr_" + "0" * 64},
        "a wrong bearer": {"authorization": f"Bearer {'0' * 64}"},
        "the store's token": made.store_headers,
        "a revoked key": {"x-api-key": revoked},
        "a key switched off": {"x-api-key": switched_off},
        "an expired key": {"x-api-key": expired},
        "an admin token without Bearer": {"authorization": made.secrets.admin_token},
        "an admin token as a key": {"x-api-key": made.secrets.admin_token},
    }


async def _id_of(made: World, key: str) -> str:
    async with made.sql() as sql:
        found = await sql.fetchval("SELECT id FROM dev.relay_api_keys WHERE $1 LIKE prefix || '%'", key)
    return str(found)


async def _try(
    report: Report,
    made: World,
    row: Row,
    owner: Owner,
    who: str,
    headers: dict[str, str],
    expected: int,
    names: dict[str, str] | None = None,
    *,
    sees: bool = False,
) -> None:
    names = owner.names | (names or {}) | ({} if sees else {"text": "not mine"})
    answer = await _send(made, made.relay(), row, names, headers)
    what = f"relay {row.method} {row.path} as {who}"
    report.check(STATUS, answer.status_code == expected, f"{what}: {answer.status_code}, not {expected} {answer.text}")
    if not sees:
        report.check(NOTHING, owner.user.marker not in answer.text, f"{what} saw the owner's text")


async def _check_store(report: Report, made: World, owner: Owner) -> None:
    stranger = f"stranger-{uuid.uuid4().hex[:8]}"
    before = await _fingerprint(made, owner.user.id)
    nobodies = {
        "nobody": {},
        "a wrong token": {"authorization": "Bearer wrong"},
        "an API key": {"x-api-key": owner.user.key, "authorization": f"Bearer {owner.user.key}"},
        "the admin": made.admin_headers,
        "a token without Bearer": {"authorization": made.secrets.store_token},
    }
    for row in STORE:
        for who, headers in nobodies.items():
            expected = 200 if row.kind == ALL else 401
            await _try_store(report, made, row, owner, who, headers, expected, owner.user.id)
        expected = 200 if row.kind == ALL else row.stranger
        await _try_store(report, made, row, owner, "another user", made.store_headers, expected, stranger)
    report.check(NOTHING, await _fingerprint(made, owner.user.id) == before, "the owner's rows have changed")
    for row in STORE:
        await _try_store(report, made, row, owner, "owner", made.store_headers, row.owner, owner.user.id, sees=True)


async def _try_store(
    report: Report,
    made: World,
    row: Row,
    owner: Owner,
    who: str,
    headers: dict[str, str],
    expected: int,
    user_id: str,
    *,
    sees: bool = False,
) -> None:
    names = owner.names | {"user_id": user_id} | ({} if sees else {"text": "not mine"})
    answer = await _send(made, made.store(), row, names, headers, user_id=user_id)
    what = f"session_service {row.method} {row.path} as {who}"
    report.check(STATUS, answer.status_code == expected, f"{what}: {answer.status_code}, not {expected} {answer.text}")
    if not sees:
        report.check(NOTHING, not MARKER.search(answer.text), f"{what} saw the owner's text")


async def _fingerprint(made: World, user_id: str) -> list[Any]:
    """Changes with every row of the user, once what is done beside the requests is done."""
    async with made.sql() as sql:
        tables = [row[0] for row in await sql.fetch(_TABLES)]
        while await sql.fetchval("SELECT count(*) FROM dev.sessions WHERE indexed_version < version"):
            await asyncio.sleep(0.02)
        await asyncio.sleep(1)  # a conversation that was answered gets its title
        return [
            await sql.fetchval(
                f"SELECT md5(coalesce(string_agg(t::text, '|' ORDER BY t::text), '')) FROM dev.{table} t"
                " WHERE user_id = $1",
                user_id,
            )
            for table in tables
        ]
