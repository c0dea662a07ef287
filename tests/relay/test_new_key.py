"""Making a key on the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx

from tests.processes import ROOT, Process


def _new_key(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.relay.new_key", *arguments]
    kept = {"PATH": os.environ["PATH"], "ENVIRONMENT": "test", **environment}
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=60, check=False)


def test_a_made_key_lets_its_user_in(relay: Process, database_url: str, user_id: str, data_dir: Path) -> None:
    made = _new_key("--user", user_id, DATABASE_URL=database_url, DATA_DIR=str(data_dir))
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert re.fullmatch(r"cr_[0-9a-f]{64}", key)
    body = {"model": "demo", "messages": [{"role": "user", "content": "My name is Ada"}]}
    headers = {"x-api-key": key, "x-session-id": "made"}
    answer = httpx.post(f"{relay.url}/v1/messages", json=body, headers=headers, timeout=30, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert "Ada" in answer.json()["content"][0]["text"]
    other = httpx.get(f"{relay.url}/sessions/made", headers={"x-api-key": key}, timeout=30, trust_env=False)
    assert other.json()["message_count"] == 2


def test_a_user_that_cannot_be_is_refused() -> None:
    refused = _new_key("--user", "a/b", DATABASE_URL="postgresql://unused")
    assert refused.returncode == 2
    assert "--user: An id has no control characters" in refused.stderr
