"""Accounts as administrators keep them: /admin/accounts, the models they serve, the demo account, their secrets."""

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.processes import free_port
from tests.relay.calls import Json, error_of
from tests.relay.stage import ALONE, KIRO, Operator, Stage, staged, until
from tests.upstream.client import TestUpstream

SHOWN = {
    *("id", "name", "provider", "base_url", "proxy_url", "models", "priority", "weight", "max_concurrency", "enabled"),
    *("state", "cooldown_until", "disabled_reason", "last_error", "in_flight", "requests", "failures", "last_used_at"),
    *("ineligible_reason", "ineligible_seconds"),
}
PROXY = "http://user:proxy-password@127.0.0.1:1"
LONG = "x" * 100_000


@pytest_asyncio.fixture(loop_scope="session")
async def stage(patient: Operator, upstream: TestUpstream) -> AsyncIterator[Stage]:
    async with staged(patient, upstream) as stage:
        yield stage


# ── the token ───────────────────────────────────────────────────────────────────────────────────

CALLS = [
    *(("GET", ""), ("POST", ""), ("GET", "/demo"), ("PATCH", "/demo"), ("DELETE", "/demo"), ("GET", "/nobody")),
    *(("POST", "/demo/enable"), ("POST", "/demo/disable"), ("POST", "/demo/test")),
]


@pytest.mark.parametrize(("method", "path"), CALLS)
async def test_the_token_comes_before_everything_else(patient: Operator, method: str, path: str) -> None:
    """Without the admin token nothing is read, told or done, whatever else is wrong with the call."""
    before = await patient.told("GET", "/demo")
    token = patient.headers["authorization"].partition(" ")[2]
    key = patient.http.headers["x-api-key"]
    wrong = ["", "Bearer", f"Bearer {token}x", f"Bearer {token[:-1]}", f"Basic {token}", token]
    for authorization in (None, *wrong, f"Bearer {key}", "Bearer \xff"):
        headers = [(b"authorization", authorization.encode("latin-1"))] if authorization is not None else []
        for content in (b"", b"not json", b'{"enabled": false, "name": "x"}'):
            answer = await patient.http.request(method, f"/admin/accounts{path}", headers=headers, content=content)
            message = error_of(answer, 401, "authentication_error")
            assert "admin token" in message
            assert answer.headers["www-authenticate"] == "Bearer"
    assert await patient.told("GET", "/demo") == before


async def test_any_case_of_bearer(patient: Operator) -> None:
    token = patient.headers["authorization"].partition(" ")[2]
    answer = await patient.http.get("/admin/accounts", headers={"authorization": f"bEARER {token}"})
    assert answer.status_code == 200


# ── making and showing ──────────────────────────────────────────────────────────────────────────


async def test_a_new_account(stage: Stage) -> None:
    """What is not said has its usual value; what comes back is the bare object, without secrets."""
    made = await stage.operator.told("POST", json=stage.body("a", proxy_url=PROXY))
    assert made.keys() >= SHOWN
    usual = {"provider": "anthropic", "priority": 0, "weight": 1.0, "max_concurrency": None, "enabled": True}
    unused = {"state": "active", "in_flight": 0, "requests": 0, "failures": 0, "last_used_at": None}
    nothing = dict.fromkeys(
        ("cooldown_until", "disabled_reason", "last_error", "ineligible_reason", "ineligible_seconds")
    )
    given = {"id": stage.id("a"), "name": "a", "base_url": stage.upstream.url, "models": [stage.model]}
    assert {name: made[name] for name in (*usual, *unused, *nothing, *given)} == {**usual, **unused, **nothing, **given}
    assert made["proxy_url"] == "http://user:***@127.0.0.1:1"
    assert await stage.get("a") == made


async def test_the_list_is_bare_and_in_order(stage: Stage) -> None:
    await stage.add("b", "a", "c")
    listed = await stage.operator.told("GET")
    assert isinstance(listed, list)
    assert [each["name"] for each in listed if each["id"].startswith(stage.model)] == ["b", "a", "c"]
    assert [each for each in listed if each["id"] == stage.id("a")] == [await stage.get("a")]


async def test_an_id_is_made_where_none_is_given(stage: Stage) -> None:
    body = stage.body("a")
    del body["id"]
    ids = {(await stage.operator.told("POST", json=body))["id"] for _ in range(2)}
    assert len({uuid.UUID(each) for each in ids}) == 2
    for each in ids:
        await stage.operator.told("DELETE", f"/{each}")


async def test_a_taken_id(stage: Stage) -> None:
    """The account that has it stays as it is."""
    await stage.add("a")
    before = await stage.get("a")
    answer = await stage.operator.call("POST", json=stage.body("a", api_key="another-key", priority=9))
    assert "id" in error_of(answer, 409, "invalid_request_error")
    assert await stage.get("a") == before
    assert await stage.is_served()


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/enable"), ("POST", "/disable"), ("POST", "/test")],
)
async def test_an_unknown_id(patient: Operator, method: str, path: str) -> None:
    for account_id in ("nobody", "n%C3%B6", "x" * 100):
        answer = await patient.call(method, f"/{account_id}{path}", json={} if method == "PATCH" else None)
        error_of(answer, 404, "not_found_error")


# ── bad input ───────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[str, Any]] = [
    *(("name", each) for each in ("", "  ", "x" * 101, "a\nb", "a\0b", 7, None)),
    *(("provider", each) for each in ("", "openai", 1, None)),
    *(("base_url", each) for each in ("", "nothing", "ftp://h", "http://", "http://u:p@h", "http://h?a=1", 1, None)),
    *(
        ("base_url", each)
        for each in ("http://h/v1", "http://h/v1/", "http://a..b", f"http://{'a' * 64}", "http://[v1.x]")
    ),
    *(
        ("base_url", each)
        for each in ("http://h:0", "http://h:99999", "http://xn--a", "http://256.1.1.1", f"http://h/{LONG}")
    ),
    *(("api_key", each) for each in ("", "a b", "sk-ä", "a\nb", LONG, 1, None)),
    *(("api_key", f"sk-ant-{kind}01-of-a-consumers-login") for kind in ("oat", "ort", "sid")),
    *(("proxy_url", each) for each in ("h:1", "ftp://h:1", "http://", "http://h:99999", "http://a b:1", 1)),
    *(("proxy_url", each) for each in ("socks4://h:1", "http://h:0", "http://h:x", f"http://h:1/{LONG}", ["x"])),
    *(("proxy_url", each) for each in ("socks5://h", "http://a..b:1", f"socks5://{'a' * 64}:1", "http://[v1.x]:1")),
    *(("proxy_url", each) for each in ("http://u:%C3%A4@h:1", "http://u:%FF@h:1", "socks5://u:a%0Ab@h:1")),
    *(("proxy_url", each) for each in ("http://u%3Av:p@h:1", f"socks5://u:{'p' * 256}@h:1")),
    *(("models", each) for each in ("m", [1], [""], [None], {"": "m"}, {"m": ""}, {"m": 1}, ["a\x01"], ["m" * 256], 1)),
    ("models", [f"m{number}" for number in range(1001)]),
    *(("priority", each) for each in ("1", 1.5, True, 2**31, -(2**31), None)),
    *(("weight", each) for each in (0, -1, "1", True, 1e7, None)),
    *(("max_concurrency", each) for each in (-1, 1.5, "3", True, 10_001)),
    *(("enabled", each) for each in (1, "true", None)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{number}" for number, (name, _) in enumerate(BAD)])
async def test_bad_fields_are_named(stage: Stage, name: str, value: Any) -> None:
    """400 with the field's name, not with what was sent; nothing is made or changed by it."""
    answer = await stage.operator.call("POST", json=stage.body("b") | {name: value})
    if value is not None or name in {"name", "provider", "base_url", "api_key"}:
        message = error_of(answer, 400, "invalid_request_error")
        assert name in message
        assert "consumers-login" not in message
        error_of(await stage.operator.call("GET", f"/{stage.id('b')}"), 404, "not_found_error")
    await stage.add("a")
    before = await stage.get("a")
    answer = await stage.operator.call("PATCH", f"/{stage.id('a')}", json={"name": "new", name: value})
    assert name in error_of(answer, 400, "invalid_request_error")
    assert await stage.get("a") == before


@pytest.mark.parametrize("value", ["", "a b", "a/b", "ä", "a\n", "x" * 101, 7, ".", ".."])
async def test_bad_ids_are_named(stage: Stage, value: Any) -> None:
    """An id is something that a path can hold."""
    answer = await stage.operator.call("POST", json=stage.body("a") | {"id": value})
    assert "id" in error_of(answer, 400, "invalid_request_error")


@pytest.mark.parametrize("name", ["name", "base_url", "api_key"])
async def test_missing_fields_are_named(stage: Stage, name: str) -> None:
    body = stage.body("a")
    del body[name]
    answer = await stage.operator.call("POST", json=body)
    assert name in error_of(answer, 400, "invalid_request_error")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', '{"name": NaN}', '\ufeff{"name": "x"}'])
async def test_bodies_that_are_no_json_object(stage: Stage, content: str) -> None:
    await stage.add("a")
    for method, path in (("POST", ""), ("PATCH", f"/{stage.id('a')}")):
        answer = await stage.operator.call(method, path, content=content.encode())
        assert "body" in error_of(answer, 400, "invalid_request_error")


# ── changing ────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_absent_stays(stage: Stage) -> None:
    """Each field by itself, and all of them at once; null empties those that may be empty."""
    await stage.add("a")
    before = await stage.get("a")
    changes: Json = {
        "name": "another",
        "base_url": f"{stage.upstream.url}/some/path",
        "proxy_url": "socks5://127.0.0.1:1",
        "models": {"m": "n"},
        "priority": -3,
        "weight": 2.5,
        "max_concurrency": 7,
        "enabled": False,
    }
    for name, value in changes.items():
        after = await stage.change("a", **{name: value})
        assert after[name] == value
        moved = {"updated_at", "state", "disabled_reason", "ineligible_reason"} if name == "enabled" else {"updated_at"}
        assert {each for each in before if before[each] != after[each]} <= {name, *moved}
        assert datetime.fromisoformat(after["updated_at"]) > datetime.fromisoformat(before["updated_at"])
        before = after
    emptied = await stage.change("a", proxy_url=None, models=None, max_concurrency=None)
    assert (emptied["proxy_url"], emptied["models"], emptied["max_concurrency"]) == (None, [], None)
    assert await stage.change("a", proxy_url="", max_concurrency=0) | {"updated_at": 0} == emptied | {"updated_at": 0}
    assert await stage.get("a") | {"updated_at": 0} == emptied | {"updated_at": 0}
    assert (await stage.change("a", base_url=f"{stage.upstream.url}/"))["base_url"] == stage.upstream.url


async def test_an_account_may_be_sent_back_as_it_was_shown(stage: Stage) -> None:
    """Read-only fields do nothing, and a proxy's hidden password is no new one."""
    await stage.add("a", proxy_url=PROXY)
    shown = await stage.get("a")
    assert await stage.change("a", **shown | {"requests": 99, "state": "cooling"}) | {"updated_at": 0} == shown | {
        "updated_at": 0
    }
    told = await stage.change("a", proxy_url=None)
    assert told["proxy_url"] is None
    assert await stage.is_served()


async def test_a_providers_change_is_refused(stage: Stage) -> None:
    await stage.add("a")
    answer = await stage.operator.call("PATCH", f"/{stage.id('a')}", json={"provider": "demo"})
    assert "provider" in error_of(answer, 400, "invalid_request_error")
    assert (await stage.change("a", provider="anthropic"))["provider"] == "anthropic"


async def test_a_new_key_and_url_are_used_at_once(stage: Stage) -> None:
    await stage.add("a", base_url="http://127.0.0.1:1")
    await stage.change("a", base_url=f"{stage.upstream.url}/under/here", api_key="another-key")
    assert (await stage.ask()).status_code == 200
    (entry,) = stage.upstream.requests()
    assert (entry["path"], entry["headers"]["x-api-key"]) == ("/under/here/v1/messages", "another-key")


@pytest.mark.parametrize("by", ["post", "patch", "made"])
async def test_disabled_by_an_administrator(stage: Stage, by: str) -> None:
    """No new request takes it, those that run go on; enabling ends it. All three ways are the same."""
    await stage.add("a", enabled=by != "made")
    if by != "made":
        stage.script("a", {"delay_ms": 300, "text": "still there"})
        running = asyncio.create_task(stage.ask())
        await stage.upstream.until(lambda state: state["running"] == 1)
        told = await (stage.post("a", "disable") if by == "post" else stage.change("a", enabled=False))
        assert (told["enabled"], told["state"], told["ineligible_reason"]) == (False, "disabled", "disabled")
        assert (await running).json()["content"] == [{"type": "text", "text": "still there"}]
    told = await stage.get("a")
    assert (told["enabled"], told["state"], told["cooldown_until"]) == (False, "disabled", None)
    assert told["disabled_reason"] == "disabled by an administrator"
    assert (told["ineligible_reason"], told["ineligible_seconds"]) == ("disabled", None)
    answer = await stage.ask()
    error_of(answer, 529, "overloaded_error")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-relay-attempts"] == "0"
    answer = await stage.ask(path=KIRO)
    assert answer.status_code == 503
    assert answer.json() == {
        "type": "error",
        "error": {"type": "service_unavailable", "message": "服务暂不可用：没有可用的Kiro账号"},
    }
    stage.upstream.reset()
    told = await (stage.change("a", enabled=True) if by == "patch" else stage.post("a", "enable"))
    assert (told["enabled"], told["state"], told["disabled_reason"]) == (True, "active", None)
    assert (told["ineligible_reason"], told["ineligible_seconds"]) == (None, None)
    assert await stage.is_served()


@pytest.mark.parametrize("by", ["post", "patch"])
async def test_enabling_ends_a_cooldown(stage: Stage, by: str) -> None:
    await stage.add("a")
    stage.script("a", {"status": 429, "headers": {"retry-after": "900"}})
    error_of(await stage.ask(), 429, "rate_limit_error")
    assert (await stage.get("a"))["state"] == "cooling"
    told = await (stage.change("a", enabled=True) if by == "patch" else stage.post("a", "enable"))
    assert (told["state"], told["cooldown_until"], told["ineligible_reason"]) == ("active", None, None)
    assert await stage.is_served()


async def test_a_deleted_account(stage: Stage) -> None:
    """It is gone at once, and what it still answers comes whole."""
    await stage.add("a", max_concurrency=3)
    await stage.add("other", models=["something-else"])
    stage.script("a", {"delay_ms": 300, "text": "still there"})
    running = asyncio.create_task(stage.ask())
    await stage.upstream.until(lambda state: state["running"] == 1)
    told = await stage.delete("a")
    assert isinstance(told, dict)
    assert told["id"] == stage.id("a")
    error_of(await stage.operator.call("GET", f"/{stage.id('a')}"), 404, "not_found_error")
    error_of(await stage.ask(), 404, "not_found_error")
    assert (await running).json()["content"] == [{"type": "text", "text": "still there"}]


async def test_another_account_of_the_same_id_begins_anew(stage: Stage) -> None:
    """What the deleted one was used, and what it rested for, is not told of the new one."""
    await stage.add("a")
    assert await stage.is_served()
    stage.script("a", {"status": 403})
    await stage.ask()
    told = await stage.get("a")
    assert (told["requests"], told["failures"], told["state"]) == (2, 1, "cooling")
    await stage.delete("a")
    await stage.add("a")
    told = await stage.get("a")
    assert (told["requests"], told["failures"], told["in_flight"], told["last_used_at"]) == (0, 0, 0, None)
    assert (told["state"], told["last_error"]) == ("active", None)
    assert await stage.is_served()
    assert (await stage.get("a"))["requests"] == 1


# ── trying ──────────────────────────────────────────────────────────────────────────────────────


async def test_trying_an_account(stage: Stage) -> None:
    """Asks with the account's own key and model, whatever state it is in, and changes nothing."""
    await stage.add("a", models={name: f"theirs-{name}" for name in (stage.model, "second")}, enabled=False)
    before = await stage.get("a")
    told = await stage.post("a", "test")
    assert (told["id"], told["ok"], told["status"], told["error"]) == (stage.id("a"), True, 200, None)
    assert told["model"] in {stage.model, "second"}
    assert told["latency_ms"] > 0
    (entry,) = stage.entries()
    assert (entry["json"]["model"], entry["json"]["max_tokens"]) == (f"theirs-{told['model']}", 1)
    chosen = await stage.operator.told("POST", f"/{stage.id('a')}/test", json={"model": stage.model})
    assert chosen["model"] == stage.model
    assert stage.entries()[-1]["json"]["model"] == f"theirs-{stage.model}"
    for status in (401, 403, 429, 500):
        stage.script("a", {"status": status})
        told = await stage.post("a", "test")
        assert (told["ok"], told["status"], told["error"]) == (False, status, f"upstream answered {status}")
    await stage.change("a", base_url=f"http://127.0.0.1:{free_port()}")
    told = await stage.post("a", "test")
    assert (told["ok"], told["status"]) == (False, None)
    assert "connect" in told["error"]
    after = await stage.get("a")
    same = ("state", "disabled_reason", "last_error", "failures", "requests", "cooldown_until", "ineligible_reason")
    assert [after[name] for name in same] == [before[name] for name in same]


async def test_trying_the_demo_account(patient: Operator) -> None:
    told = await patient.told("POST", "/demo/test")
    assert (told["ok"], told["status"], told["error"]) == (True, 200, None)


@pytest.mark.parametrize("body", [{"model": ""}, {"model": 1}, {"model": "x" * 256}])
async def test_trying_a_bad_model(stage: Stage, body: Json) -> None:
    await stage.add("a")
    answer = await stage.operator.call("POST", f"/{stage.id('a')}/test", json=body)
    assert "model" in error_of(answer, 400, "invalid_request_error")
    assert stage.entries() == []


# ── why not ─────────────────────────────────────────────────────────────────────────────────────


async def test_why_an_account_is_not_eligible(stage: Stage, sql: asyncpg.Connection) -> None:
    """The reason and the seconds, for each of the reasons there are."""

    async def why() -> tuple[str | None, float | None]:
        told = await stage.get("a")
        return told["ineligible_reason"], told["ineligible_seconds"]

    await stage.add("a", max_concurrency=1)
    assert await why() == (None, None)
    stage.script("a", {"hang_seconds": 30})
    running = asyncio.create_task(stage.ask())
    await stage.upstream.until(lambda state: state["running"] == 1)
    reason, seconds = await why()
    assert reason == "full"
    assert seconds is not None
    stage.upstream.reset()
    await running
    for step, expected, least, most in (
        ({"status": 403}, "forbidden", 1700, 1800),
        ({"status": 429, "headers": {"retry-after": "70"}}, "rate_limited", 30, 70),
        ({"status": 500, "headers": {"retry-after": "50"}}, "failing", 10, 50),
    ):
        await stage.post("a", "enable")
        stage.script("a", step)
        await stage.ask()
        reason, seconds = await why()
        assert reason == expected
        assert seconds is not None
        assert least < seconds <= most
        told = await stage.get("a")
        assert told["state"] == "cooling"
        left = datetime.fromisoformat(told["cooldown_until"]).timestamp() - datetime.now().astimezone().timestamp()
        assert least < left <= most
    stage.script("a", {"status": 403, "body": {"error": {"message": "This organization has been disabled."}}})
    await stage.post("a", "enable")
    await stage.ask()
    assert await why() == ("disabled", None)
    await stage.post("a", "enable")
    await stage.add("b", models=["something-else"])
    secrets_of_b = "(SELECT secrets FROM relay_accounts WHERE id = $2)"
    await sql.execute(f"UPDATE relay_accounts SET secrets = {secrets_of_b} WHERE id = $1", stage.id("a"), stage.id("b"))

    async def is_unreadable() -> bool:
        return await why() == ("unreadable", None)

    await until(is_unreadable)
    error_of(await stage.ask(), 529, "overloaded_error")
    await stage.add("c")
    stage.script("c", {"status": 429, "headers": {"retry-after": "60"}})
    for _ in range(2):  # of those that could be tried, every one is rate-limited
        error_of(await stage.ask(), 429, "rate_limit_error")
    await stage.delete("c")
    told = await stage.post("a", "test")
    assert (told["ok"], told["status"]) == (False, None)
    answer = await stage.operator.call("PATCH", f"/{stage.id('a')}", json={"proxy_url": PROXY})
    assert "api_key" in error_of(answer, 400, "invalid_request_error")
    await stage.change("a", api_key=stage.key("a"))
    assert await why() == (None, None)
    assert await stage.is_served()


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────


async def everything(sql: asyncpg.Connection) -> str:
    """All rows of all tables as text, bytes as they are and as hex."""
    tables = await sql.fetch("SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'dev'")
    rows = [row for (table,) in tables for row in await sql.fetch(f"SELECT t::text, t.* FROM {table} t")]
    values = [value for row in rows for value in row.values()]
    return "\n".join(value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in values)


async def test_secrets_are_nowhere(stage: Stage, hasty: Operator, sql: asyncpg.Connection) -> None:
    """Not in an answer, an error, a log (with everything logged) or the database, whatever goes wrong."""
    stage = stage.at(hasty)
    key, password = f"sk-ant-api-{uuid.uuid4().hex}", f"pw{uuid.uuid4().hex}"
    proxy = f"http://user:{password}@127.0.0.1:{free_port()}"
    told: list[httpx.Response] = []

    async def call(method: str, path: str = "", **content: Any) -> None:
        told.append(await stage.operator.call(method, path, **content))

    own = f"/{stage.id('a')}"
    body = stage.body("a", api_key=key, proxy_url=proxy)
    await call("POST", json=body)
    await call("POST", json=body)
    await call("POST", json=body | {"priority": "x"})
    await call("POST", content=json.dumps(body).encode()[:-1])
    told.append(await stage.ask())
    await call("POST", f"{own}/test")
    await call("PATCH", own, json={"proxy_url": None})
    echo = {"error": {"type": "authentication_error", "message": f"{key} is disabled: {password}"}}
    for status in (401, 500, 429):
        stage.upstream.script({"match": {"api_key": key}, "status": status, "body": echo})
        told.append(await stage.ask())
        await call("POST", f"{own}/enable")
    stage.upstream.script(
        {"match": {"api_key": key}, "error_event": {"type": "error", "error": {"type": "api_error", "message": key}}}
    )
    await call("GET", own)
    for name, bad in (("api_key", key + " "), ("api_key", key + "\n"), ("proxy_url", proxy + " ")):
        await call("PATCH", own, json={name: bad})
        assert told[-1].status_code == 400
    await call("PATCH", own, json={"name": "x", "api_key": key, "proxy_url": proxy, "weight": -1})
    await call("PATCH", own, json={"proxy_url": proxy})
    await call("GET")
    told += [await stage.operator.http.get(path) for path in ("/v1/models", "/metrics", "/queue/health", "/health")]
    row = await sql.fetchrow("SELECT secrets, secrets_key_id FROM relay_accounts WHERE id = $1", stage.id("a"))
    assert row is not None
    assert row["secrets_key_id"] == "dev"
    forms = {key, key[10:], password}
    forms |= {base64.b64encode(each.encode()).decode()[:-4] for each in (key, password)}
    forms |= {each.encode().hex() for each in (key, password)}
    sealed = {row["secrets"].hex(), base64.b64encode(row["secrets"]).decode()}
    shown = "".join(f"{each.text}{each.headers}" for each in told)
    for secret in forms | sealed:
        assert secret not in shown
        assert secret not in stage.operator.relay.logged()
    stored = await everything(sql)
    assert stage.id("a") in stored
    for secret in forms:
        assert secret not in stored
    await call("DELETE", own)
    assert not any(secret in told[-1].text for secret in forms | sealed)


async def test_a_clients_credentials_do_not_go_upstream(stage: Stage) -> None:
    await stage.add("a")
    token = stage.operator.headers["authorization"]
    await stage.operator.http.post("/v1/messages", json=stage.request(), headers={**ALONE, "authorization": token})
    (entry,) = stage.entries()
    assert stage.operator.http.headers["x-api-key"] not in str(entry["headers"])
    assert "authorization" not in entry["headers"]


# ── models ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_model_is_mapped_to_upstreams_name(stage: Stage) -> None:
    """Messages, streams and counts; names that the object lacks are not served by its account."""
    await stage.add("a", models={stage.model: "their-name", "same": "same"})
    assert (await stage.ask()).json()["model"] == "their-name"
    assert b"message_stop" in (await stage.ask(stream=True)).content
    counted = await stage.operator.http.post("/v1/messages/count_tokens", json=stage.request())
    assert counted.json()["input_tokens"] > 0
    assert [entry["json"]["model"] for entry in stage.entries()] == ["their-name"] * 3
    assert stage.entries()[0]["json"] == stage.request(model="their-name")


async def test_only_accounts_that_serve_the_model_are_asked(stage: Stage) -> None:
    await stage.add("a", "c", models=["something-else-of-theirs"])
    await stage.add("b")
    assert [(await stage.ask()).status_code for _ in range(4)] == [200] * 4
    assert stage.asked() == ["b"] * 4


async def test_a_model_that_nobody_serves(stage: Stage) -> None:
    """404 on all paths, and no session is made for it."""
    await stage.add("a", models=["something-else"])
    for path in ("/v1/messages", "/api/v1/messages", KIRO, "/v1/messages/count_tokens"):
        answer = await stage.ask(path=path)
        error_of(answer, 404, "not_found_error")
    answer = await stage.operator.http.post("/v1/messages", json=stage.request(), headers={"x-session-id": stage.model})
    error_of(answer, 404, "not_found_error")
    assert "x-turn-id" not in answer.headers
    assert stage.upstream.requests() == []


async def test_the_list_of_models(stage: Stage) -> None:
    """Each model of an enabled account, once; what a client may name, not what upstream calls it."""
    await stage.add("a", models=[stage.model, f"{stage.model}-2"])
    await stage.add("b", models={f"{stage.model}-2": "x", f"{stage.model}-3": "hidden-name"})
    await stage.add("c", models=[f"{stage.model}-4"], enabled=False)

    async def listed(**params: Any) -> Json:
        answer = await stage.operator.http.get("/v1/models", params={"limit": 1000, **params})
        assert answer.status_code == 200
        return dict(answer.json())

    told = await listed()
    ids = [each["id"] for each in told["data"]]
    assert [each for each in ids if each.startswith(stage.model)] == [f"{stage.model}{end}" for end in ("", "-2", "-3")]
    assert "demo" in ids
    assert "hidden-name" not in ids
    assert (told["has_more"], told["first_id"], told["last_id"]) == (False, ids[0], ids[-1])
    for each in told["data"]:
        assert each.keys() >= {"type", "id", "display_name", "created_at"}
        assert each["type"] == "model"
    first = await listed(limit=1, after_id=stage.model)
    assert [each["id"] for each in first["data"]] == [f"{stage.model}-2"]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, f"{stage.model}-2", f"{stage.model}-2")
    before = await listed(limit=1, before_id=f"{stage.model}-2")
    assert [each["id"] for each in before["data"]] == [stage.model]
    for prefix in ("/api", "/claude-kiro-oauth", "/api/v1/claude-kiro-oauth"):
        assert (await stage.operator.http.get(f"{prefix}/v1/models", params={"limit": 1000})).json() == told
    one = await stage.operator.http.get(f"/v1/models/{stage.model}")
    assert one.json() == next(each for each in told["data"] if each["id"] == stage.model)
    for missing in ("hidden-name", f"{stage.model}-4", "a/b"):
        error_of(await stage.operator.http.get(f"/v1/models/{missing}"), 404, "not_found_error")
    for path in ("/v1/models", f"/v1/models/{stage.model}"):
        error_of(await stage.operator.http.get(path, headers={"x-api-key": "wrong"}), 401, "authentication_error")
    await stage.delete("a")
    assert stage.model not in [each["id"] for each in (await listed())["data"]]


async def test_the_models_of_an_account_that_takes_all(stage: Stage) -> None:
    """Its upstream is asked, once in a while; a changed account's anew; one that does not answer keeps nobody."""
    await stage.add("a", models=[])

    async def listed() -> set[str]:
        answer = await stage.operator.http.get("/v1/models", params={"limit": 1000})
        assert answer.status_code == 200
        return {each["id"] for each in answer.json()["data"]}

    theirs = {"test-model", "claude-sonnet-4-5", "claude-haiku-4-5"}
    for _ in range(3):
        assert await listed() == theirs | {"demo"}
    assert [entry["path"] for entry in stage.entries()] == ["/v1/models"]
    await stage.change("a", base_url=f"{stage.upstream.url}/under/here")
    assert await listed() == theirs | {"demo"}
    assert [entry["path"] for entry in stage.entries()] == ["/v1/models", "/under/here/v1/models"]
    stage.upstream.script({"match": {"path": "/v1/models"}, "status": 500})
    await stage.change("a", api_key=stage.key("a") + "-new")
    assert await listed() == {"demo"}
    assert (await stage.ask()).status_code == 200
    await stage.change("a", base_url="http://127.0.0.1:1")
    assert await listed() == {"demo"}


# ── the demo account ────────────────────────────────────────────────────────────────────────────


async def test_the_demo_account(start_operator: Any, own_database: str, upstream: TestUpstream) -> None:
    """Made at first start; serves other models only while it is alone; deleted, it does not come back."""
    async with start_operator(own_database, RELAY_RETRY_WAIT_SECONDS="0") as operator:
        stage = Stage(operator, upstream)
        (made,) = await operator.told("GET")
        assert (made["id"], made["provider"], made["state"], made["enabled"]) == ("demo", "demo", "active", True)
        assert (await stage.ask()).json()["usage"]["input_tokens"] > 0  # alone, it takes any name
        await stage.add("a")
        assert await stage.is_served()
        assert stage.asked() == ["a"]
        assert (await stage.ask(model="demo")).status_code == 200
        assert stage.asked() == ["a"]
        error_of(await stage.ask(model="something-else"), 404, "not_found_error")
        for step in ({"status": 500}, {"status": 403}, {"status": 429}, {"close": True}):
            stage.script("a", step)
            assert (await stage.ask()).status_code in {429, 529}
            assert (await stage.ask()).status_code in {429, 529}  # it rests
            await stage.post("a", "enable")
        await stage.post("a", "disable")
        error_of(await stage.ask(), 529, "overloaded_error")
        assert [each["id"] for each in await operator.told("GET")] == ["demo", stage.id("a")]
        assert (await operator.call("DELETE", "/demo")).status_code == 200
        error_of(await stage.ask(model="demo"), 404, "not_found_error")
    async with start_operator(own_database, RELAY_RETRY_WAIT_SECONDS="0") as operator:
        assert [each["id"] for each in await operator.told("GET")] == [stage.id("a")]
        await stage.at(operator).delete("a")
        error_of(await stage.at(operator).ask(model="demo"), 529, "overloaded_error")
        health = await operator.http.get("/queue/health")
        assert (health.status_code, health.json()["accounts"]["total"]) == (503, 0)
