"""Starting a relay: settings, the secrets of development, finding session_service, health."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from services.relay import development
from services.relay.settings import RelaySettings
from shared.service import ServiceStopped, read_settings
from tests.processes import ROOT, Process, free_port, running, start_session_service
from tests.relay.calls import Chat, start_relay

PRODUCTION = {
    "ENVIRONMENT": "production",
    "DATABASE_URL": "postgresql://somewhere/else",
    "RELAY_ADMIN_TOKEN": "a",
    "RELAY_KEY_PEPPER": "p",
    "SESSION_SERVICE_TOKENS": "t",
}


@pytest.mark.parametrize("missing", [name for name in PRODUCTION if name != "ENVIRONMENT"])
def test_a_missing_secret_is_named_in_one_line(missing: str) -> None:
    environment = {name: value for name, value in PRODUCTION.items() if name != missing}
    done = subprocess.run(
        [sys.executable, "-m", "services.relay.main"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1
    assert missing in lines[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("RELAY_UPSTREAM_URL", "http://x"), ("RELAY_ON_DISCONNECT", "what"), ("RELAY_PORT", "99999")],
)
def test_wrong_settings_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ServiceStopped):
        read_settings(RelaySettings, "relay")
    assert name in capsys.readouterr().err


def test_files_of_secrets_are_made_once(tmp_path: Path) -> None:
    settings = RelaySettings(data_dir=tmp_path / "new")
    first = development.secrets_of(settings)
    assert development.secrets_of(settings) == first
    assert first.api_key is not None
    assert re.fullmatch(r"cr_[0-9a-f]{64}", first.api_key)
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["admin.token", "api.key", "encryption.key", "key.pepper"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


async def test_many_that_make_a_secret_at_once_get_the_same(tmp_path: Path) -> None:
    made = await asyncio.gather(
        *(asyncio.to_thread(development.kept, tmp_path / "secret", f"value-{number}") for number in range(50))
    )
    assert len(set(made)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


async def test_two_relays_on_one_folder_share_the_key(make_relay: Any, chat_at: Any, tmp_path: Path) -> None:
    one, two = make_relay(folder=tmp_path), make_relay(folder=tmp_path)
    chat: Chat = await chat_at(one, tmp_path)
    other: Chat = await chat_at(two, tmp_path, session_id=chat.session_id)
    await chat.say("u1")
    await other.say("u2")
    assert len(await chat.stored()) == 4


async def test_a_new_database_learns_the_old_key(
    make_relay: Any, own_database: str, session_service: Process, tmp_path: Path
) -> None:
    make_relay(folder=tmp_path)
    key = (tmp_path / "api.key").read_text()
    with start_relay(own_database, session_service.url, tmp_path, {}) as relay:
        models = httpx.get(f"{relay.url}/v1/models", headers={"x-api-key": key.strip()}, trust_env=False)
        assert models.status_code == 200
        assert (tmp_path / "api.key").read_text() == key


async def test_a_revoked_key_is_out_within_a_second(chat: Chat, database_url: str) -> None:
    async def status() -> int:
        return (await chat.http.get("/v1/models")).status_code

    connection = await asyncpg.connect(database_url)
    try:
        for change, expected in (
            ("is_active = false", 401),
            ("is_active = true, expires_at = now()", 401),
            ("expires_at = now() + interval '1 hour'", 200),
            ("expires_at = NULL", 200),
        ):
            await connection.execute(f"UPDATE dev.relay_api_keys SET {change}")
            await asyncio.sleep(1.05)
            assert await status() == expected
    finally:
        await connection.execute("UPDATE dev.relay_api_keys SET is_active = true, expires_at = NULL")
        await asyncio.sleep(1.05)
        await connection.close()


async def test_health(chat: Chat, relay: Process) -> None:
    health = (await chat.http.get("/health")).json()
    assert (health["status"], health["agent_initialized"]) == ("healthy", True)
    assert isinstance(health["session_count"], int)
    queue = (await chat.http.get("/queue/health")).json()
    assert set(queue) == {"status", "in_flight", "queued", "max_in_flight", "accounts", "sessions"}
    await chat.say("Hello")
    metrics = (await chat.http.get("/metrics")).text
    for line in (
        'relay_turns_total{outcome="completed"}',
        'relay_upstream_requests_total{account="anthropic",status="200"}',
        'relay_tokens_total{model="test-model",type="input"}',
        "relay_in_flight_requests 0.0",
        "relay_spool_entries 0.0",
        "relay_build_info{",
    ):
        assert line in metrics


async def test_no_secret_is_logged(chat: Chat, relay: Process, data_dir: Path) -> None:
    await chat.say("Hello")
    logged = relay.logged()
    for name in ("api.key", "admin.token", "key.pepper"):
        assert (data_dir / name).read_text().strip() not in logged
    assert "upstream-key" not in logged


async def test_session_service_moves_to_another_port(
    consul: Process, make_relay: Any, chat_at: Any, database_url: str, scratch: Path
) -> None:
    found = {"CONSUL_HOST": "127.0.0.1", "CONSUL_PORT": str(consul.port)}
    with start_session_service(database_url, scratch, free_port(), wait=True, **found) as store:
        relay = make_relay(session_service_url="", **found)
        chat: Chat = await chat_at(relay)
        await chat.say("My name is Ada", model="demo")
        store.kill()
        with start_session_service(database_url, scratch, free_port(), wait=True, **found):
            assert "Your name is Ada" in await chat.say("What is my name?", model="demo")


def test_a_relay_that_finds_no_store_is_not_ready(
    consul: Process, database_url: str, data_dir: Path, relay: Process
) -> None:
    port = free_port()
    environment = {
        "ENVIRONMENT": "test",
        "DATABASE_URL": "postgresql://127.0.0.1:1/nowhere",
        "RELAY_PORT": str(port),
        "DATA_DIR": str(data_dir),
    }
    command = [sys.executable, "-m", "services.relay.main"]
    with running(command, port, data_dir / f"relay-{port}.log", environment) as process:
        process.wait_until("/health/ready", status=503)
        process.wait_until("/health/live")
        process.wait_until("/health")
        answer = httpx.post(f"{process.url}/v1/messages", json={}, trust_env=False)
        assert answer.status_code == 529
        assert answer.json()["error"]["type"] == "overloaded_error"
        assert process.stop() == 0
