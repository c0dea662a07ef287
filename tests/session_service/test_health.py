"""Health, metrics, description; tokens; and starting under good and bad settings."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import migrate
from tests.processes import ROOT, Process, ServiceProcess, free_port, start_consul, start_session_service
from tests.session_service.calls import TIME, User, fine, new_user_id, refused, said

HEALTH = ["status", "service", "port", "version", "timestamp"]


@pytest.fixture(scope="module")
def guarded(database_url: str, scratch: Path) -> Iterator[ServiceProcess]:
    """A service that wants a token."""
    with start_session_service(database_url, scratch, free_port(), SESSION_SERVICE_TOKENS="one, two") as service:
        yield service


@pytest.mark.parametrize(("path", "status"), [("/health", "healthy"), ("/health/live", None), ("/health/ready", None)])
async def test_health(
    session_service: ServiceProcess, sessions: httpx.AsyncClient, path: str, status: str | None
) -> None:
    body = fine(await sessions.get(session_service.url + path))
    assert list(body) == HEALTH
    assert (body["service"], body["port"], body["version"]) == ("session_service", session_service.port, "1.0.0")
    assert status is None or body["status"] == status
    assert TIME.fullmatch(body["timestamp"])


async def test_detailed_health(session_service: ServiceProcess, sessions: httpx.AsyncClient) -> None:
    body = fine(await sessions.get(session_service.url + "/health/detailed"))
    assert [name for name in body if name in HEALTH] == HEALTH
    assert (body["status"], body["database_connected"]) == ("operational", True)
    assert body["schema_revision"]
    assert set(body["pool"]) == {"size", "idle", "max"}
    assert 1 <= body["pool"]["size"] <= body["pool"]["max"]


def sample(metrics: str, name: str) -> float:
    found = [line for line in metrics.splitlines() if line.startswith(name + " ")]
    return float(found[0].split(" ")[1]) if found else 0.0


async def test_metrics(session_service: ServiceProcess, sessions: httpx.AsyncClient, user: User) -> None:
    before = await sessions.get(session_service.url + "/metrics")
    assert before.status_code == 200
    assert before.headers["content-type"].startswith("text/plain; version=")
    chat = await user.chat(session_id=f"secret-{user.id}")
    await chat.append("x")
    turn = await chat.open(said("y"), said("z"))
    after = (await sessions.get(session_service.url + "/metrics")).text
    assert sample(after, "sessions_appends_total") >= sample(before.text, "sessions_appends_total") + 3
    assert sample(after, "sessions_open_turns") >= 1
    assert 'route="/api/v1/sessions/{session_id}/turns"' in after
    assert 'method="POST",route="' in after.replace(" ", "") or 'method="POST"' in after
    await sessions.get("/sessions/x/nowhere")
    await sessions.request("BREW", "/sessions")
    await turn.complete()
    after = (await sessions.get(session_service.url + "/metrics")).text
    assert user.id not in after  # neither a user, nor a session, nor a path that anybody may invent
    assert "nowhere" not in after
    assert "BREW" not in after


async def test_no_user_no_session_and_no_text_in_the_log(session_service: ServiceProcess, user: User) -> None:
    chat = await user.chat(session_id=f"log-{user.id}", title=f"title-{user.id}")
    await chat.append(f"text-{user.id}")
    await user.http.get("/sessions/x", params={"user_id": f"{user.id}\0"})
    log = session_service.logged()
    assert f"text-{user.id}" not in log
    assert f"title-{user.id}" not in log
    for line in log.splitlines():
        assert json.loads(line)["service"] == "session_service"


async def test_the_description(session_service: ServiceProcess, sessions: httpx.AsyncClient) -> None:
    described = fine(await sessions.get(session_service.url + "/openapi.json"))
    paths = described["paths"]
    session = "/api/v1/sessions/{session_id}"
    expected = {
        "/api/v1/sessions": {"get", "post"},
        session: {"get", "put", "delete"},
        f"{session}/summary": {"get"},
        f"{session}/messages": {"get", "post"},
        f"{session}/turns": {"get", "post"},
        f"{session}/turns/{{turn_id}}": {"get"},
        f"{session}/turns/{{turn_id}}/renew": {"post"},
        f"{session}/turns/{{turn_id}}/complete": {"post"},
        f"{session}/align": {"post"},
        f"{session}/context": {"get"},
        f"{session}/memory": {"get", "post"},
        f"{session}/memories": {"get"},
        f"{session}/memories/{{memory_id}}": {"put", "delete"},
        "/api/v1/users/{user_id}/sessions": {"get"},
        "/api/v1/users/{user_id}/memories": {"get"},
        "/api/v1/users/{user_id}/stats": {"get"},
        "/api/v1/sessions/stats": {"get"},
        "/api/v1/sessions/stats/usage": {"get"},
        "/health": {"get"},
        "/health/ready": {"get"},
        "/health/detailed": {"get"},
    }
    for path, methods in expected.items():
        assert methods <= set(paths[path]), path
        for method in methods:
            answers = paths[path][method]["responses"]
            if "422" in answers:  # FastAPI's own; here validation is 400
                assert "HTTPValidationError" not in json.dumps(answers["422"]), (method, path)
            if path.startswith("/api"):
                assert {"200", "400", "503"} <= set(answers), (method, path)
    assert "text/html" in (await sessions.get(session_service.url + "/docs")).headers["content-type"]


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "one",
        "Bearer",
        "Bearer three",
        "Basic one",
        "Bearer one,two",
        "Bearer ONE",
        "Token one",
        "Bearer one two",
        "Bearer \xe9",
    ],
)
async def test_without_one_of_the_tokens(guarded: ServiceProcess, sent: str | None) -> None:
    headers = httpx.Headers([] if sent is None else [(b"authorization", sent.encode("latin-1"))])
    async with httpx.AsyncClient(base_url=guarded.url, trust_env=False) as client:
        for method, path in (
            ("GET", "/api/v1/sessions?user_id=u"),
            ("POST", "/api/v1/sessions"),
            ("GET", "/api/v1/sessions/stats"),
            ("GET", "/docs"),
            ("GET", "/openapi.json"),
            ("GET", "/nowhere"),
            ("GET", "/api/v1/../health/../api/v1/sessions/stats"),
        ):
            answer = await client.request(method, path, headers=headers)
            refused(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/health/live", "/health/ready", "/health/detailed", "/metrics"):
            assert (await client.get(path, headers=headers)).status_code == 200


@pytest.mark.parametrize("sent", ["Bearer one", "Bearer two", "bearer one", "BEARER  two"])
async def test_with_one_of_the_tokens(guarded: ServiceProcess, sent: str) -> None:
    headers = {"authorization": sent}
    async with httpx.AsyncClient(base_url=f"{guarded.url}/api/v1", trust_env=False, headers=headers) as client:
        await User(client, new_user_id()).create()
    assert "one" not in json.dumps([json.loads(line).get("authorization") for line in guarded.logged().splitlines()])


# ── starting and stopping ───────────────────────────────────────────────────────────────────────


def start_badly(**settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.session_service.main"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/root", **settings}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20, check=False)


BAD_SETTINGS = [
    ({"ENVIRONMENT": "production", "DATABASE_URL": "postgresql://x/x"}, "SESSION_SERVICE_TOKENS"),
    ({"ENVIRONMENT": "staging", "SESSION_SERVICE_TOKENS": "t"}, "DATABASE_URL"),
    ({"ENVIRONMENT": "test", "SERVICE_PORT": "secret-port"}, "SERVICE_PORT"),
    ({"ENVIRONMENT": "test", "DB_SCHEMA": 'secret"; DROP'}, "DB_SCHEMA"),
]


@pytest.mark.parametrize(("environment", "named"), BAD_SETTINGS)
def test_settings_that_are_wrong_stop_the_start_with_one_line(environment: dict[str, str], named: str) -> None:
    ended = start_badly(**environment)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert named in ended.stderr
    assert "secret" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_stops_the_start_with_one_line(session_service: ServiceProcess, database_url: str) -> None:
    ended = start_badly(ENVIRONMENT="test", DATABASE_URL=database_url, SERVICE_PORT=str(session_service.port))
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert str(session_service.port) in ended.stderr


async def test_another_schema(own_database: str, scratch: Path) -> None:
    """Until its tables are there the service says so; then it needs no restart."""
    with start_session_service(own_database, scratch, free_port(), wait=False, DB_SCHEMA="other_1") as service:
        service.wait_until("/health/live")
        service.wait_until("/health/ready", status=503)
        refused(httpx.get(f"{service.url}/api/v1/sessions?user_id=u", trust_env=False), 503, "not_initialized")
        migrate(own_database, schema="other_1")
        service.wait_until("/health/ready", 10)
        async with httpx.AsyncClient(base_url=f"{service.url}/api/v1", trust_env=False) as client:
            await (await User(client, "u").chat()).append("x")


@pytest.fixture
def agent(scratch: Path) -> Iterator[Process]:
    with start_consul(scratch) as process:
        yield process


async def test_stopping_says_draining_leaves_consul_first_and_finishes_what_runs(
    database_url: str, scratch: Path, agent: Process
) -> None:
    settings: dict[str, Any] = {"CONSUL_HOST": "127.0.0.1", "CONSUL_PORT": str(agent.port)}
    with start_session_service(database_url, scratch, free_port(), **settings) as service:
        async with httpx.AsyncClient(base_url=f"{service.url}/api/v1", trust_env=False) as client:
            name = f"session_service-127.0.0.1-{service.port}"

            async def registered() -> bool:
                return name in (await client.get(f"{agent.url}/v1/agent/services")).json()

            while not await registered():
                pass
            check = (await client.get(f"{agent.url}/v1/health/service/session_service")).json()[0]
            assert (check["Service"]["Address"], check["Service"]["Port"]) == ("127.0.0.1", service.port)
            assert {each["Status"] for each in check["Checks"]} == {"passing"}
            [own] = [each for each in check["Checks"] if each["ServiceID"] == name]
            assert own["Type"] == "http"
            chat = await User(client, new_user_id()).chat()
            turn = await chat.open(said("x"))
            service.popen.send_signal(signal.SIGTERM)
            while await registered():
                pass
            draining = await client.get(f"{service.url}/health")
            assert (draining.status_code, draining.json()["status"]) == (503, "draining")
            assert list(draining.json()) == HEALTH
            assert (await client.get(f"{service.url}/health/ready")).status_code == 503
            assert (await client.get(f"{service.url}/health/live")).status_code == 200
            await turn.complete(said("still served", "assistant"))
        assert service.popen.wait(10) == 0
