"""Secrets: everything a stack leaves behind is searched for them.

Its one invariant: it knows every secret of its world, because the world has made them.
"""

import asyncio
import base64
import uuid
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx

from tests.fire.clients import User
from tests.fire.report import Report
from tests.fire.world import MODEL, Json, World, world
from tests.proxy.client import TestProxy

LOGS = "no secret is in a log"
ROWS = "no secret is in the database"
DISK = "no secret is in the spool or a service's folder"
BODIES = "no secret is in an error's body, nor in what admins are shown"

_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'dev'"


def forms(secret: str) -> list[bytes]:
    """The secret as it is, and as it would stand in a URL, in base64 and in a dump of bytes."""
    plain = secret.encode()
    coded = base64.b64encode(plain).decode().rstrip("=")[: max(8, len(plain))]
    return [plain, quote(secret, safe="").encode(), coded.encode(), plain.hex().encode()]


def found_in(content: bytes, made: World) -> list[str]:
    """The first letters of the secrets in this."""
    return [secret[:8] for secret in made.secrets.all() if any(form in content for form in forms(secret))]


async def scan(report: Report, made: World) -> None:
    """Logs, disk and database, as they are now."""
    for path in [*made.folder.glob("*.log"), *made.postgres_dir.glob("*.log")]:
        report.check(LOGS, not (seen := found_in(path.read_bytes(), made)), f"{path.name}: {seen}")
    for path in made.folder.rglob("*"):
        is_ours = path.is_file() and made.postgres_dir not in path.parents and path.suffix != ".log"
        if is_ours:
            report.check(DISK, not (seen := found_in(path.read_bytes(), made)), f"{path.name}: {seen}")
    report.check(DISK, True)
    async with made.sql() as sql:
        for table in [row[0] for row in await sql.fetch(_TABLES)]:
            for row in await sql.fetch(f"SELECT t::text FROM dev.{table} t"):
                report.check(ROWS, not (seen := found_in(row[0].encode(), made)), f"{table}: {seen}")


async def run(report: Report, *, migrated: Path | None = None) -> None:
    """Makes everything fail that has a secret, and then looks everywhere."""
    password = f"proxy-password-{uuid.uuid4().hex}"
    with TestProxy.started(user="somebody", password=password) as proxy:
        async with world(migrated=migrated, settings={"DEBUG": "true", "RELAY_MAX_ATTEMPTS": "2"}) as made:
            made.secrets.others += [password, _basic("somebody", password)]
            await provoke(report, made, proxy)
            await scan(report, made)
            await check_the_scan_sees(report, made)


def _basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


async def provoke(report: Report, made: World, proxy: TestProxy) -> None:
    """Failures of upstream, proxy, store and database; every body is looked at."""
    user = User("leaks", key=await made.make_key("leaks"))
    key = made.secrets.upstream_keys[0]
    wrong_password = proxy.url.replace(":proxy-password", ":wrong-proxy-password")
    made.secrets.others.append(str(urlsplit(wrong_password).password))
    for number, (name, proxy_url) in enumerate([("good", proxy.url), ("bad", wrong_password)]):
        fields: Json = {"id": f"proxied-{name}", "proxy_url": proxy_url, "models": [f"m-{name}"]}
        await made.make_account(number, **fields)
    echo = {"type": "error", "error": {"type": "authentication_error", "message": f"invalid x-api-key: {key}"}}
    for status in (401, 403, 429, 500, 529):
        made.upstream.script({"status": status, "body": echo}, {"status": status, "body": f"<h1>{key}</h1>"})
    made.upstream.script({"garbage": f"{key} is no HTTP\r\n\r\n"}, {"redirect": f"http://127.0.0.1:1/{key}"})
    made.upstream.script({"close": True}, {"error_event": echo["error"], "match": {"stream": True}})
    bodies = [await _ask(made, user, MODEL, stream=number % 3 == 0) for number in range(12)]
    proxy.fail("refuse")
    bodies += [await _ask(made, user, model) for model in ("m-good", "m-bad", "m-good", "m-bad")]
    proxy.fail("reset")
    bodies.append(await _ask(made, user, "m-good"))
    bodies += await _wrong_calls(made, user)
    made.kill("store-0")
    bodies.append(await _ask(made, user, MODEL))
    await made.start("store-0")
    await asyncio.to_thread(made.kill, "postgres")
    bodies += [await _ask(made, user, MODEL), *await _admin_views(made)]
    await made.start("postgres")
    await made.revive()
    bodies += await _admin_views(made)
    for body in bodies:
        report.check(BODIES, not (seen := found_in(body, made)), f"{seen} in {body[:300]!r}")


async def _ask(made: World, user: User, model: str, *, stream: bool = False) -> bytes:
    body = {"model": model, "max_tokens": 20, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    headers = {"x-api-key": user.key, "x-session-id": "leaks"}
    async with made.http.stream("POST", f"{made.relay()}/v1/messages", json=body, headers=headers) as answer:
        try:
            content = await answer.aread()
        except httpx.HTTPError:
            content = b""
    return _heads(answer) + content


def _heads(answer: httpx.Response) -> bytes:
    return b"\n".join(name + b": " + value for name, value in answer.headers.raw) + b"\n\n"


async def _wrong_calls(made: World, user: User) -> list[bytes]:
    """Secrets where they do not belong: in paths, queries, headers and fields."""
    answers = []
    for secret in [user.key, made.secrets.admin_token, made.secrets.store_token, made.secrets.upstream_keys[0]]:
        for base in (made.relay(), made.store()):
            request = made.http.build_request
            calls = [
                request("GET", f"{base}/v1/models", params={"key": secret, "limit": secret}),
                request("GET", f"{base}/{secret}/x"),
                request("POST", f"{base}/v1/messages", content=f'{{"model": "{secret}"', headers={"x-api-key": secret}),
                request("GET", f"{base}/admin/accounts", headers={"authorization": f"Bearer {secret}x"}),
                request("GET", f"{base}/health", headers={"x-forwarded-for": secret, "cookie": secret}),
                request("DELETE", f"{base}/{secret}"),
            ]
            answers += [await made.http.send(call) for call in calls]
    bad = {"id": "x", "name": "x", "base_url": "http://127.0.0.1:9", "api_key": made.secrets.upstream_keys[1], "x": 1}
    wrong: list[Json] = [{**bad, "weight": "heavy"}, {**bad, "proxy_url": "gopher://u:proxy-password@127.0.0.1"}]
    for body in wrong:
        url = f"{made.relay()}/admin/accounts"
        answers.append(await made.http.post(url, json=body, headers=made.admin_headers))
    return [answer.content for answer in answers]


async def _admin_views(made: World) -> list[bytes]:
    paths = ("/admin/accounts", "/admin/accounts/account-0", "/admin/accounts/proxied-bad", "/admin/api-keys")
    pages = ("/queue/health", "/metrics", "/health/ready", "/")
    urls = [f"{made.relay()}{path}" for path in paths + pages] + [f"{made.store()}/health/detailed"]
    answers = [await made.http.get(url, headers=made.admin_headers) for url in urls]
    return [_heads(answer) + answer.content for answer in answers]


async def check_the_scan_sees(report: Report, made: World) -> None:
    """The same search finds a secret that was put there: else it would prove nothing."""
    secret = made.secrets.upstream_keys[1]
    probe = Report(quiet=True)
    (made.folder / "probe.log").write_text(f'{{"url": "http://x/?key={quote(secret)}"}}\n')
    async with made.sql() as sql:
        await sql.execute("UPDATE dev.relay_accounts SET last_error = $1 WHERE id = 'account-1'", secret)
    await scan(probe, made)
    for promise in (LOGS, ROWS):
        report.check("a secret that was planted is found", promise in probe.broken(), promise)
