"""The client of conversations at the real relay: start, follow, speak, pause, files; over broken ways, and by V0."""

import asyncio
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Response as HttpResponse

from shared.conversation_client import (
    Conflict,
    Conversation,
    ConversationClient,
    ConversationError,
    Event,
    FileTooLarge,
    NotFound,
    Refused,
    StartFailed,
    StartTimeout,
    Unauthorized,
    Unavailable,
    Unsupported,
)
from shared.conversation_v1 import V1
from tests.processes import ROOT, Process, free_port
from tests.relay.calls import MODEL, admin_headers
from tests.relay.conversing import User
from tests.relay.cutting import Way, way_to
from tests.shared.servers import answer, serving
from tests.upstream.client import TestUpstream

SLOW = {"text": "one two three four five six seven eight nine ten", "event_delay_ms": 100, "delta_characters": 5}
CREATE = b"POST /api/v1/app-conversations "

Connect = Callable[..., Awaitable[ConversationClient]]


@pytest_asyncio.fixture(loop_scope="session")
async def connect(caller: User) -> AsyncIterator[Connect]:
    """Makes clients for the caller, at the relay or at another address."""
    async with AsyncExitStack() as opened:

        async def make(url: str = str(caller.http.base_url), **more: Any) -> ConversationClient:
            key = caller.http.headers["x-api-key"]
            client = ConversationClient(url, key, **{"poll_seconds": 0.1, **more})
            return await opened.enter_async_context(client)

        yield make


@pytest_asyncio.fixture(loop_scope="session")
async def way(relay: Process) -> AsyncIterator[Way]:
    async with way_to(relay.port) as opened:
        yield opened


async def until(
    conversation: Conversation, status: str = "finished", *, times: int = 1, after: str | None = None
) -> list[Event]:
    """The events up to the one that tells of this status for the so manieth time."""
    seen: list[Event] = []
    async with asyncio.timeout(30), aclosing(conversation.events(after=after)) as events:
        while times:
            seen.append(await anext(events))
            times -= seen[-1].status == status
    return seen


async def until_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def all_of(events: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in events]


async def begun(events: AsyncGenerator[Event, None]) -> list[Event]:
    """The events that every conversation begins with."""
    seen = [await anext(events) for _ in range(2)]
    assert told(seen) == [("status", "idle")]
    return seen


def told(events: list[Event]) -> list[tuple[str, str]]:
    """What messages say, by their roles, and the statuses."""
    return [(event.role or "status", event.text or event.status or "") for event in events if event.kind != "other"]


ANSWERED = [("user", "Hello"), ("status", "running"), ("assistant", "Hi there"), ("status", "finished")]


async def test_round_trip(connect: Connect, caller: User, upstream: TestUpstream) -> None:
    client = await connect()
    apis = [client.api]
    upstream.script({"text": "Hi there"}, {"text": "Bye"})
    conversation = await client.create("Hello", model=MODEL, title="Greeting")
    assert [*apis, client.api] == [None, "V1"]
    seen = await until(conversation)
    assert told(seen) == [("status", "idle"), *ANSWERED]
    assert all(event.id and event.timestamp.tzinfo and event.raw["id"] == event.id for event in seen)
    assert seen[-2].content == ({"type": "text", "text": "Hi there"},)
    state = await conversation.refresh()
    assert (state.title, state.sandbox_status, state.execution_status) == ("Greeting", "RUNNING", "finished")
    assert state.model == MODEL
    assert state.session_api_key is not None
    assert state.session_api_key not in repr(state) + repr(conversation)
    stored = await caller.sessions.get(f"/sessions/{state.session_id}/messages", params={"user_id": caller.user_id})
    assert [each["content"] for each in stored.json()["messages"]] == ["Hello", "Hi there"]

    await conversation.send("Only kept", run=False)
    await conversation.send([{"type": "text", "text": "See you"}])
    more = await until(conversation, after=seen[-1].id)
    assert told(more) == [
        ("user", "Only kept"),
        ("user", "See you"),
        ("status", "running"),
        ("assistant", "Bye"),
        ("status", "finished"),
    ]
    assert told(await until(conversation, times=2)) == told(seen + more)


async def test_a_message_that_is_only_stored_and_none_at_all(connect: Connect) -> None:
    client = await connect()
    kept = await client.create("Only kept", run=False, model=MODEL)
    assert kept.state.execution_status == "idle"
    async with aclosing(kept.events()) as events:
        assert told([await anext(events) for _ in range(3)]) == [("status", "idle"), ("user", "Only kept")]
    empty = await client.create()
    assert empty.state.title == f"Conversation {empty.id}"
    child = await client.create(parent_id=empty.id)
    assert child.state.raw["parent_conversation_id"] == empty.id


async def test_pause_and_run(connect: Connect, upstream: TestUpstream) -> None:
    conversation = await (await connect()).create(model=MODEL)
    upstream.script(SLOW, {"text": " and the rest"})
    await conversation.send("Count")
    await upstream.until(lambda state: state["running"] > 0)
    with pytest.raises(Conflict) as refused:
        await conversation.run()
    assert refused.value.status == 409
    assert refused.value.detail
    await conversation.pause()
    assert (await conversation.refresh()).execution_status == "paused"
    await conversation.run()
    seen = await until(conversation)
    assert [event.status for event in seen if event.status] == ["idle", "running", "paused", "running", "finished"]


async def test_a_stopped_conversation(connect: Connect, caller: User, upstream: TestUpstream) -> None:
    client = await connect()
    made = await client.create(model=MODEL)
    await caller.http.post(f"/api/v1/sandboxes/{made.state.sandbox_id}/pause", json={})
    stopped = await client.get(made.id)
    assert stopped.state.sandbox_status == "PAUSED"
    with pytest.raises(Conflict, match="PAUSED: resume it first"):
        await until(stopped)
    await stopped.pause()
    assert await (await client.get(made.id)).refresh() == stopped.state
    with pytest.raises(Conflict):
        await stopped.upload("notes.txt", b"")
    upstream.script({"text": "Hi there"})
    await stopped.send("Hello", run=False)
    await stopped.run()
    assert ("assistant", "Hi there") in told(await until(stopped))
    assert stopped.state.sandbox_status == "RUNNING"

    await caller.http.post(f"/api/v1/sandboxes/{made.state.sandbox_id}/pause", json={})
    other = await client.get(made.id)
    await caller.http.post(f"/api/v1/sandboxes/{made.state.sandbox_id}/resume", json={})
    assert await other.upload("notes.txt", b"Some notes") == "/workspace/notes.txt"


async def test_lists_and_deletes(connect: Connect) -> None:
    client = await connect()
    made = [await client.create(title=f"No. {number}") for number in range(3)]
    assert [each.state.title async for each in client.list()] == ["No. 2", "No. 1", "No. 0"]
    assert (await client.get(made[0].id)).state == (await made[0].refresh())
    assert await made[0].delete() is True
    assert await client.delete(made[0].id) is False
    assert [each.id async for each in client.list()] == [made[2].id, made[1].id]
    with pytest.raises(NotFound) as missing:
        await client.get(made[0].id)
    assert missing.value.status == 404


async def test_files(connect: Connect) -> None:
    conversation = await (await connect()).create()
    content = bytes(range(256)) * (3 * 2**20 // 256)
    for path in ("/workspace/some folder/ü%2F?#.bin", "notes.txt"):
        stored = await conversation.upload(path, content)
        assert stored == (path if path.startswith("/") else f"/workspace/{path}")
        assert await conversation.download(path) == content
    with pytest.raises(FileTooLarge) as large:
        await conversation.upload("large", content + b".")
    assert large.value.status == 413
    with pytest.raises(Refused) as outside:
        await conversation.upload("/workspace/../etc/passwd", b"")
    assert outside.value.status == 400
    with pytest.raises(NotFound):
        await conversation.download("nothing")


async def test_the_example_in_the_readme(relay: Process, caller: User, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "ConversationClient" in block]
    (tmp_path / "api.key").write_text(caller.http.headers["x-api-key"])
    code = code.replace("http://127.0.0.1:8000", relay.url).replace(".data/dev/", f"{tmp_path}/")
    running = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stdout=subprocess.PIPE)
    printed, _ = await asyncio.wait_for(running.communicate(), 30)
    lines = printed.decode().splitlines()
    assert lines[0] == "user I am Ada."
    assert lines[1].startswith("assistant Hello Ada! I am the demo model, ")
    assert running.returncode == 0


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────


async def test_a_start_that_fails(connect: Connect, relay: Process, data_dir: Path) -> None:
    client = await connect()
    url = f"{relay.url}/admin/accounts/anthropic/disable"
    assert httpx.post(url, headers=admin_headers(data_dir), trust_env=False).is_success
    with pytest.raises(StartFailed) as failed:
        await client.create("Hello", model=MODEL)
    assert failed.value.status is None
    assert "account" in failed.value.detail.lower()


async def test_a_start_that_takes_too_long(connect: Connect, way: Way, upstream: TestUpstream) -> None:
    client = await connect(way.url)
    first = await client.create(model=MODEL)
    upstream.script({"status": 429, "headers": {"retry-after": "120"}, "body": {"type": "error"}, "repeat": -1})
    await first.send("Hello")
    await until(first, "error")
    begun = time.monotonic()
    way.heard.clear()
    with pytest.raises(StartTimeout, match=r"not ready after 0\.5 s, last status: WAITING_FOR_SANDBOX") as late:
        await client.create("Hello", model=MODEL, timeout_seconds=0.5)
    assert time.monotonic() - begun < 2
    assert late.value.last_status == "WAITING_FOR_SANDBOX"
    assert late.value.task_id
    looks = sum(line.startswith(b"GET /api/v1/app-conversations/start-tasks?") for line in way.heard)
    assert 2 <= looks <= 6, way.heard  # at once, then every 0.1 s


async def test_network_errors_while_a_start_is_looked_after(connect: Connect, way: Way, upstream: TestUpstream) -> None:
    client = await connect(way.url)
    way.answers[b"GET /api/v1/app-conversations/start-tasks"] = b""  # hangs up
    making = asyncio.create_task(client.create("Hello", model=MODEL))
    await until_true(lambda: sum(line.startswith(b"GET") for line in way.heard) >= 2)
    way.refuse, way.answers = 2, {b"GET /api/v1/app-conversations?": answer(503, b"{}", retry_after="0")}
    await until_true(lambda: any(line.startswith(b"GET /api/v1/app-conversations?") for line in way.heard))
    way.answers = {}
    conversation = await making
    assert way.refused == 2
    assert sum(line.startswith(CREATE) for line in way.heard) == 1
    assert conversation.state.sandbox_status == "RUNNING"


async def test_a_start_that_nobody_can_be_asked_about(connect: Connect, way: Way) -> None:
    client = await connect(way.url)
    way.answers[b"GET "] = b""
    with pytest.raises(StartTimeout, match="last status: WORKING; at last: GET /api/v1/app-conv") as late:
        await client.create(timeout_seconds=0.5)
    assert late.value.task_id


async def test_refusals(connect: Connect, caller: User) -> None:
    client = await connect()
    with pytest.raises(NotFound, match="Parent"):
        await client.create(parent_id="0" * 32)
    assert client.api is None
    with pytest.raises(Refused, match=r"422: .*title") as wrong:
        await client.create(title="x" * 10_000)
    assert wrong.value.status == 422
    async with ConversationClient(str(caller.http.base_url), "sk-wrong") as stranger:
        with pytest.raises(Unauthorized) as unknown:
            await stranger.create("Hello")
        assert unknown.value.status == 401
        assert unknown.value.detail
    async with ConversationClient(f"http://127.0.0.1:{free_port()}", "key") as nowhere:
        with pytest.raises(Unavailable) as away:
            await nowhere.create("Hello")
        assert away.value.status is None
    async with serving(answer(200, b"<html>", "text/html")) as other, ConversationClient(other.url) as client:
        with pytest.raises(ConversationError, match="no JSON"):
            await client.create("Hello")
    with pytest.raises(ValueError, match="base_url"):
        ConversationClient("localhost:8000")


async def test_close_codes(connect: Connect, caller: User) -> None:
    client = await connect()
    one, other = await client.create(), await client.create()
    one.state = dataclasses.replace(one.state, session_api_key=other.state.session_api_key)
    with pytest.raises(Unauthorized, match="4001") as wrong:
        await until(one)
    assert wrong.value.status == 401
    events = other.events()
    await begun(events)
    assert await other.delete()
    with pytest.raises(NotFound, match="4004") as gone:
        await asyncio.wait_for(all_of(events), 10)
    assert gone.value.status == 404
    with pytest.raises(NotFound, match="4004"):
        await until(other)


# ── connections that are lost ───────────────────────────────────────────────────────────────────


async def test_cut_again_and_again(connect: Connect, way: Way, upstream: TestUpstream) -> None:
    conversation = await (await connect(way.url)).create(model=MODEL)
    direct = await (await connect()).get(conversation.id)
    watching = asyncio.create_task(until(conversation, times=6))
    for number in range(6):
        upstream.script({**SLOW, "event_delay_ms": 30})
        if number % 2:
            way.cut_after_bytes = 150 * number  # in the middle of a frame, most likely
        opened = way.opened
        await direct.send(f"Question {number}")
        await upstream.until(lambda state: state["running"] > 0)
        way.cut()
        await until_true(lambda opened=opened: way.opened > opened)  # type: ignore[misc]
        await direct.send(f"Aside {number}", run=False)
        await until(direct, times=number + 1)
    seen = await watching
    expected = await until(direct, times=6)
    assert [event.id for event in seen] == [event.id for event in expected]
    assert seen == expected


async def test_while_the_relay_is_away(connect: Connect, way: Way, upstream: TestUpstream) -> None:
    conversation = await (await connect(way.url)).create(model=MODEL)
    direct = await (await connect()).get(conversation.id)
    upstream.script({"text": "Hi there"})
    events = conversation.events()
    seen = await begun(events)
    way.refuse = 2
    way.cut()
    await direct.send("Hello")
    while told(seen)[-1] != ("status", "finished"):
        seen.append(await asyncio.wait_for(anext(events), 10))
    assert told(seen) == [("status", "idle"), *ANSWERED]
    assert way.refused == 2
    asked = [line for line in way.heard if line.startswith(b"GET /sockets/")][-1]
    assert f"last_event_id={seen[1].id}".encode() in asked
    await events.aclose()


async def test_patience_ends(connect: Connect, way: Way) -> None:
    conversation = await (await connect(way.url, patience_seconds=0.2)).create(model=MODEL)
    events = conversation.events()
    await begun(events)
    way.refuse = 1000
    way.cut()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(anext(events), 5)


async def test_a_dead_connection_is_noticed(connect: Connect, way: Way, upstream: TestUpstream) -> None:
    conversation = await (await connect(way.url, keepalive_seconds=0.3)).create(model=MODEL)
    direct = await (await connect()).get(conversation.id)
    upstream.script({"text": "Hi there"})
    events = conversation.events()
    seen = await begun(events)
    way.freeze()
    await direct.send("Hello")
    while told(seen)[-1] != ("status", "finished"):
        seen.append(await asyncio.wait_for(anext(events), 10))
    assert told(seen) == [("status", "idle"), *ANSWERED]
    await events.aclose()


async def test_a_reader_who_takes_its_time(connect: Connect, upstream: TestUpstream) -> None:
    conversation = await (await connect(keepalive_seconds=0.2)).create(model=MODEL)
    events = conversation.events()
    seen = await begun(events)
    for number in range(40):
        await conversation.send(f"{number}: {'x' * 100_000}", run=False)
    await asyncio.sleep(1)  # longer than the keepalive: nothing was read all the while
    while len(seen) < 42:
        seen.append(await asyncio.wait_for(anext(events), 10))
    assert [event.text.partition(":")[0] for event in seen[2:]] == [str(number) for number in range(40)]
    await events.aclose()


def frame(number: int) -> str:
    told = {"id": str(number), "timestamp": "2026-11-20T10:00:00Z", "source": "user", "kind": "OtherEvent"}
    return json.dumps(told)


async def test_a_server_that_sends_more_or_nothing_or_nonsense(connect: Connect) -> None:
    conversation = await (await connect()).create()
    connections = handshakes = 0

    async def forgets(socket: ServerConnection) -> None:
        """Knows no last_event_id, and closes each time after one event more."""
        nonlocal connections
        connections += 1
        for number in range(connections):
            await socket.send(frame(number))
        if connections == 2:
            await socket.close(1013)
        if connections == 4:
            await socket.send("[]")

    def refuses(_: ServerConnection, __: object) -> HttpResponse | None:
        nonlocal handshakes
        handshakes += 1
        return HttpResponse(503, "Busy", Headers()) if handshakes == 2 else None

    async with serve(forgets, "127.0.0.1", 0, process_request=refuses) as server:
        port = server.sockets[0].getsockname()[1]
        client = ConversationClient(f"http://127.0.0.1:{port}", poll_seconds=0.1)
        events = Conversation(client._http, V1(client._http), client._times, conversation.state).events()
        assert [(await anext(events)).id for _ in range(4)] == ["0", "1", "2", "3"]
        with pytest.raises(ConversationError, match="what is no event"):
            await anext(events)
        await client.close()


# ── V0 ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [404, 405])
async def test_v0(connect: Connect, way: Way, upstream: TestUpstream, status: int) -> None:
    way.answers[CREATE] = answer(status, b'{"detail":"Not Found"}')
    client = await connect(way.url)
    upstream.script({"text": "Hi there"}, SLOW, {"text": " and the rest"}, {"text": "A picture"})
    conversation = await client.create("Hello", title="Greeting")
    assert client.api == "V0"
    assert (conversation.state.title, conversation.state.raw["conversation_version"]) == ("Greeting", "V0")
    seen = await until(conversation)
    assert told(seen) == [("status", "idle"), *ANSWERED]

    await conversation.send("Count")
    await upstream.until(lambda state: state["running"] > 0)
    await conversation.pause()
    assert (await conversation.refresh()).sandbox_status == "PAUSED"
    await conversation.run()
    assert (await conversation.refresh()).sandbox_status == "RUNNING"
    more = await until(conversation, after=seen[-1].id)
    assert [event.status for event in more if event.status] == ["running", "paused", "running", "finished"]
    image = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    await conversation.send([{"type": "text", "text": "What is it?"}, image])
    last = await until(conversation, after=more[-1].id)
    assert last[0].content[1] == {"type": "image", "image_urls": ["https://example.org/cat.png"]}
    assert told(last)[-2:] == [("assistant", "A picture"), ("status", "finished")]

    assert [each.id async for each in client.list()] == [conversation.id]
    assert (await client.get(conversation.id)).state.title == "Greeting"
    for refused in (conversation.send("x", run=False), client.create("x", run=False), conversation.download("x")):
        with pytest.raises(Unsupported):
            await refused
    assert await conversation.upload("notes.txt", b"Some notes") == "/workspace/notes.txt"
    with pytest.raises(Refused):
        await conversation.upload("/etc/passwd", b"")
    assert await conversation.delete() is True
    with pytest.raises(NotFound):
        await until(conversation)
    with pytest.raises(NotFound):
        await client.get(conversation.id)


async def test_v0_by_any_other_call(connect: Connect, way: Way) -> None:
    way.answers[b"GET /api/v1/"] = answer(404, b"<html>", "text/html")
    client = await connect(way.url)
    assert [each async for each in client.list()] == []
    assert client.api == "V0"


async def test_v0_over_lost_connections(connect: Connect, way: Way, upstream: TestUpstream) -> None:
    way.answers[CREATE] = answer(404, b"")
    client = await connect(way.url)
    conversation = await client.create()
    watching = asyncio.create_task(until(conversation, times=3))
    direct = await (await connect()).get(conversation.id)
    for number in range(3):
        upstream.script({"text": f"Answer {number}"})
        await direct.send(f"Question {number}")
        way.refuse = 1
        way.cut()
        await until(direct, times=number + 1)
    seen = await watching
    said = [(event.role, event.text) for event in seen if event.kind == "message"]
    assert said == [each for n in range(3) for each in (("user", f"Question {n}"), ("assistant", f"Answer {n}"))]
    assert len({event.id for event in seen}) == len(seen)
    assert told(seen) == told(await until(direct, times=3))
