"""The calls of the session door as its first documentation prints them: each line runs as it stands, in a shell.

Only the address, the key and, for the second round, the prefix of the paths are put in.
"""

import asyncio
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import Process
from tests.relay.calls import Chat, Json, admin_headers, assistant, events_of, text_of, user
from tests.upstream.client import TestUpstream

PLAIN = """
curl -X POST \\
  -H "Content-Type: application/json" \\
  -H "X-Api-Key: your-api-key" \\
  -d '{
    "model": "claude-sonnet-4-5",
    "messages": [
      {
        "role": "user",
        "content": "你好"
      }
    ],
    "stream": false
  }' \\
  http://localhost:8000/claude-kiro-oauth/v1/messages
"""
IN_A_SESSION = """
curl -X POST \\
  -H "Content-Type: application/json" \\
  -H "X-Api-Key: your-api-key" \\
  -d '{
    "model": "claude-sonnet-4-5",
    "messages": [
      {
        "role": "user",
        "content": "你好"
      }
    ],
    "stream": false,
    "metadata": {
      "session_id": "session_abc123"
    }
  }' \\
  http://localhost:8000/claude-kiro-oauth/v1/messages
"""
ON_AND_ON = """
curl -X POST \\
  -H "Content-Type: application/json" \\
  -H "X-Api-Key: your-api-key" \\
  -d '{
    "model": "claude-sonnet-4-5",
    "messages": [
      {
        "role": "user",
        "content": "你好"
      },
      {
        "role": "assistant",
        "content": "你好！有什么可以帮助你的吗？"
      },
      {
        "role": "user",
        "content": "请介绍一下Python"
      }
    ],
    "stream": false,
    "metadata": {
      "session_id": "session_abc123"
    }
  }' \\
  http://localhost:8000/claude-kiro-oauth/v1/messages
"""
STREAMED = """
curl -X POST \\
  -H "Content-Type: application/json" \\
  -H "X-Api-Key: your-api-key" \\
  -d '{
    "model": "claude-sonnet-4-5",
    "messages": [
      {
        "role": "user",
        "content": "你好"
      }
    ],
    "stream": true
  }' \\
  http://localhost:8000/claude-kiro-oauth/v1/messages
"""
CLOSE = """
curl -X POST \\
  -H "Content-Type: application/json" \\
  -H "X-Api-Key: your-api-key" \\
  http://localhost:8000/sessions/session_abc123/close
"""
LOOK = """
curl -X GET \\
  -H "Content-Type: application/json" \\
  -H "X-Api-Key: your-api-key" \\
  http://localhost:8000/sessions/session_abc123
"""
QUEUE = """
curl -X GET \\
  -H "Content-Type: application/json" \\
  -H "X-Api-Key: your-api-key" \\
  http://localhost:8000/queue/health
"""
GREETING = "你好！有什么可以帮助你的吗？"


@dataclass(frozen=True)
class Shell:
    """Runs the lines against the shared relay; `prefix` comes before their paths."""

    url: str
    key: str
    home: Path
    prefix: str = ""

    async def run(self, line: str) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body."""
        (self.home / ".curlrc").write_text('silent\nshow-error\ninclude\nnoproxy = "*"\n')
        line = line.replace("http://localhost:8000", self.url + self.prefix).replace("your-api-key", self.key)
        environment = {"PATH": os.environ["PATH"], "CURL_HOME": str(self.home)}
        process = await asyncio.create_subprocess_exec("bash", "-c", line, stdout=-1, stderr=-1, env=environment)
        out, complaints = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, complaints) == (0, b"")
        head, _, body = out.partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        headers = [(name, value) for name, _, value in (each.partition(": ") for each in rest)]
        return int(first.split()[1]), httpx.Headers(headers), body

    async def done(self, line: str) -> Json:
        status, headers, body = await self.run(line)
        assert (status, headers["content-type"]) == (200, "application/json"), body
        told: Json = json.loads(body)
        return told


@pytest.fixture(params=["", "/api/v1"])
def shell(request: pytest.FixtureRequest, relay: Process, data_dir: Path, tmp_path: Path) -> Shell:
    return Shell(relay.url, (data_dir / "api.key").read_text().strip(), tmp_path, request.param)


async def test_a_request_without_a_session(shell: Shell, chat: Chat, upstream: TestUpstream) -> None:
    status, headers, body = await shell.run(PLAIN)
    message = json.loads(body)
    assert (status, message["type"], message["role"]) == (200, "message", "assistant")
    assert headers["x-session-persisted"] == "yes"
    made = Chat(chat.http, chat.sessions, headers["x-session-id"])
    assert uuid.UUID(made.session_id).version == 7
    assert await made.history() == [("user", "你好"), ("assistant", text_of(message))]
    sent = upstream.requests("/v1/messages")[0]["json"]
    assert sent == {"model": "claude-sonnet-4-5", "messages": [user("你好")], "stream": False, "max_tokens": 4096}


async def test_a_session_from_its_first_request_to_its_end(shell: Shell, chat: Chat, upstream: TestUpstream) -> None:
    own = f"session_{uuid.uuid4().hex[:6]}"

    def line(text: str) -> str:
        return text.replace("session_abc123", own)

    assert (await shell.run(line(LOOK)))[0] == 404
    upstream.script({"text": GREETING}, {"text": "Python 是一种编程语言。"})
    status, headers, _ = await shell.run(line(IN_A_SESSION))
    assert (status, headers["x-session-id"]) == (200, own)
    status, headers, _ = await shell.run(line(ON_AND_ON))
    assert (status, headers["x-session-id"]) == (200, own)
    whole = [user("你好"), assistant(GREETING), user("请介绍一下Python")]
    assert upstream.requests("/v1/messages")[1]["json"]["messages"] == whole
    session = Chat(chat.http, chat.sessions, own)
    assert [text for _, text in await session.history()] == [
        *("你好", GREETING, "请介绍一下Python", "Python 是一种编程语言。"),
    ]
    shown = await shell.done(line(LOOK))
    assert (shown["session_id"], shown["status"], shown["message_count"]) == (own, "active", 4)
    assert await shell.done(line(CLOSE)) == shown | {"status": "ended"}
    assert (await shell.done(line(LOOK)))["status"] == "ended"


async def test_a_streamed_request(shell: Shell) -> None:
    status, headers, body = await shell.run(STREAMED)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert uuid.UUID(headers["x-session-id"]).version == 7
    names = [name for name, _ in events_of(body)]
    assert (names[0], names[-1]) == ("message_start", "message_stop")


async def test_the_queue(shell: Shell) -> None:
    told = await shell.done(QUEUE)
    assert told["status"] == "healthy"
    assert told["accounts"]["available"] >= 1
    assert told["sessions"]["max"] == 10_000


@pytest.mark.parametrize("line", [PLAIN, STREAMED, IN_A_SESSION])
async def test_without_an_account(shell: Shell, relay: Process, data_dir: Path, line: str) -> None:
    def account(action: str) -> None:
        url = f"{relay.url}/admin/accounts/anthropic/{action}"
        httpx.post(url, headers=admin_headers(data_dir), trust_env=False).raise_for_status()

    account("disable")
    status, headers, body = await shell.run(line)
    account("enable")
    expected: dict[str, Any] = {"type": "service_unavailable", "message": "服务暂不可用：没有可用的Kiro账号"}
    assert (status, json.loads(body)) == (503, {"type": "error", "error": expected})
    assert headers["content-type"] == "application/json"
    assert int(headers["retry-after"]) >= 1


@pytest.mark.parametrize("line", [PLAIN, STREAMED, CLOSE, LOOK])
async def test_with_a_wrong_key(shell: Shell, line: str) -> None:
    status, _, body = await Shell(shell.url, "cr_wrong", shell.home, shell.prefix).run(line)
    assert (status, json.loads(body)["error"]["type"]) == (401, "authentication_error")
