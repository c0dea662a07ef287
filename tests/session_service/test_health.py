"""Health, metrics, description; tokens; and starting under good and bad settings."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.session_service.settings import SessionServiceSettings
from shared.service import read_settings
from tests.processes import ROOT, Process, ServiceProcess, free_port, start_consul, start_session_service
from tests.session_service.calls import TIME, User, fine, new_user_id, said

HEALTH = ["status", "service", "port", "version", "timestamp"]


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
    keyed = {
        path
        for path, operations in paths.items()
        if any(each["name"] == "Idempotency-Key" for each in operations.get("post", {}).get("parameters", []))
    }
    creating = ("/messages", "/messages/batch", "/turns", "/turns/{turn_id}/complete", "/memory", "/fork")
    assert keyed == {"/api/v1/sessions", "/api/v1/sessions/import", *(session + each for each in creating)}
    for path, method in ((session, "get"), (session, "put"), (f"{session}/fork", "post"), ("/api/v1/sessions", "post")):
        assert "ETag" in paths[path][method]["responses"]["200"]["headers"]
    assert "turn_exists" in paths[f"{session}/turns"]["post"]["responses"]["409"]["description"]
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert {} in paths[session]["get"]["security"]
    assert "security" not in paths["/health"]["get"]
    assert "text/html" in (await sessions.get(session_service.url + "/docs")).headers["content-type"]


# ── starting and stopping ───────────────────────────────────────────────────────────────────────


BAD_SETTINGS: list[tuple[dict[str, str], list[str]]] = [
    ({"ENVIRONMENT": "production", "DATABASE_URL": "postgresql://secret/x"}, ["SESSION_SERVICE_TOKENS"]),
    ({"ENVIRONMENT": "staging", "SESSION_SERVICE_TOKENS": "secret"}, ["DATABASE_URL"]),
    (
        {"ENVIRONMENT": "production", "DATABASE_URL": "postgresql://secret/x", "SESSION_SERVICE_TOKENS": " , "},
        ["SESSION_SERVICE_TOKENS"],
    ),
    ({"DATABASE_URL": "mysql://secret/x"}, ["DATABASE_URL"]),
    ({"DATABASE_URL": "secret"}, ["DATABASE_URL"]),
    ({"SERVICE_PORT": "secret-port", "DB_SCHEMA": 'secret"; DROP'}, ["SERVICE_PORT", "DB_SCHEMA"]),
    ({"LIMITS__BODY_BYTES": "secret"}, ["LIMITS"]),
    ({"STATS_CACHE_SECONDS": "6"}, ["STATS_CACHE_SECONDS"]),
]


@pytest.mark.parametrize(("environment", "named"), BAD_SETTINGS)
def test_settings_that_are_wrong_stop_the_start_with_one_line(
    environment: dict[str, str], named: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(os.environ):
        if name.lower() in SessionServiceSettings.model_fields:
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        read_settings(SessionServiceSettings, "session_service")
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    assert all(name in said for name in named)
    assert "secret" not in said


def test_a_taken_port_stops_the_start_with_one_line(session_service: ServiceProcess, database_url: str) -> None:
    command = [sys.executable, "-m", "services.session_service.main"]
    settings = {"ENVIRONMENT": "test", "DATABASE_URL": database_url, "SERVICE_PORT": str(session_service.port)}
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/root", **settings}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert str(session_service.port) in ended.stderr


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
