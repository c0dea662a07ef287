"""When the store or the relay itself fails: what the client hears, and what is kept."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import free_port, start_session_service
from tests.relay.calls import Chat, error_of, events_of, streamed_text
from tests.relay.stack import frozen
from tests.upstream.client import TestUpstream

KIRO = "/claude-kiro-oauth/v1/messages"


async def test_no_upstream_call_while_the_store_is_away(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    chat: Chat = await chat_at(make_relay(session_service_url=f"http://127.0.0.1:{free_port()}"))
    answer = await chat.ask("Hello")
    error_of(answer, 529, "overloaded_error")
    assert int(answer.headers["retry-after"]) >= 1
    kiro = await chat.http.post(KIRO, json=chat.body("Hello"))
    assert kiro.status_code == 503
    assert kiro.json()["error"] == {
        "type": "service_unavailable",
        "message": "服务暂不可用：没有可用的Kiro账号",
    }
    assert upstream.requests() == []
    best = await chat.ask("Hello", headers={"x-session-store": "best-effort"})
    assert best.status_code == 200
    assert best.headers["x-session-persisted"] == "none"
    assert len(upstream.requests()) == 1


@pytest.fixture
def own_store(database_url: str, scratch: Path) -> Callable[..., Any]:
    """Starts a session_service of the test's own on a port, on the shared database."""

    def start(port: int) -> Any:
        return start_session_service(database_url, scratch, port)

    return start


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_store_that_goes_away_in_mid_turn(
    chat_at: Any, make_relay: Any, own_store: Any, upstream: TestUpstream, tmp_path: Path, streamed: bool
) -> None:
    """The answer is not held back; its completion waits on disk, and is delivered once, also by the next relay."""
    port = free_port()
    settings = {"session_service_url": f"http://127.0.0.1:{port}", "folder": tmp_path}
    upstream.script({"text": "kept", "delay_ms": 600})
    with own_store(port) as store:
        relay = make_relay(**settings)
        chat: Chat = await chat_at(relay, tmp_path)
        asking = asyncio.create_task(chat.ask("Hello", stream=streamed))
        await upstream.until(lambda state: state["running"] == 1)
        store.kill()
        answer = await asking
    if streamed:
        assert streamed_text(answer.content) == "kept"
        assert events_of(answer.content)[-1][0] == "message_stop"
    else:
        assert answer.headers["x-session-persisted"] == "deferred"
    entries = list((tmp_path / "spool").glob("*.json"))
    assert [entry.stat().st_mode & 0o777 for entry in entries] == [0o600]
    assert "relay_spool_entries 1.0" in httpx.get(f"{relay.url}/metrics", trust_env=False).text
    # The session waits for what belongs into it.
    assert (await chat.ask("Too early")).status_code == 529
    relay.kill()
    with own_store(port):
        again = make_relay(**settings)
        chat = await chat_at(again, tmp_path, session_id=chat.session_id)
        await chat.say("Next")
        history = await chat.history()
        assert history[:3] == [("user", "Hello"), ("assistant", "kept"), ("user", "Next")]
        assert len(history) == 4
        assert list((tmp_path / "spool").glob("*.json")) == []
        assert [each["status"] for each in await chat.turns()] == ["completed", "completed"]


async def test_a_store_that_comes_back_gets_what_waited(
    chat_at: Any, make_relay: Any, own_store: Any, upstream: TestUpstream, tmp_path: Path
) -> None:
    port = free_port()
    upstream.script({"text": "kept", "delay_ms": 400, "repeat": -1})
    relay = make_relay(session_service_url=f"http://127.0.0.1:{port}", folder=tmp_path)
    with own_store(port) as store:
        first: Chat = await chat_at(relay, tmp_path)
        chats = [first, *(Chat(first.http, first.sessions) for _ in range(4))]
        asking = [asyncio.create_task(each.ask("Hello")) for each in chats]
        await upstream.until(lambda state: state["running"] == 5)
        store.kill()
        answers = await asyncio.gather(*asking)
    assert [each.headers["x-session-persisted"] for each in answers] == ["deferred"] * 5
    with own_store(port):
        for each in chats:
            await each.until_turn("completed", seconds=10)
            assert await each.history() == [("user", "Hello"), ("assistant", "kept")]
    assert list((tmp_path / "spool").iterdir()) == []


async def test_a_frozen_store_does_not_hold_the_answer_back(
    chat_at: Any, make_relay: Any, own_store: Any, upstream: TestUpstream, tmp_path: Path
) -> None:
    port = free_port()
    upstream.script({"text": "kept", "delay_ms": 400})
    relay = make_relay(
        session_service_url=f"http://127.0.0.1:{port}", folder=tmp_path, RELAY_COMPLETE_TIMEOUT_SECONDS="0.5"
    )
    with own_store(port) as store:
        chat: Chat = await chat_at(relay, tmp_path)
        asking = asyncio.create_task(chat.ask("Hello"))
        await upstream.until(lambda state: state["running"] == 1)
        os.kill(store.pid, signal.SIGSTOP)
        answer = await asking
        assert answer.headers["x-session-persisted"] == "deferred"
        os.kill(store.pid, signal.SIGCONT)
        await chat.until_turn("completed", seconds=15)
        assert await chat.history() == [("user", "Hello"), ("assistant", "kept")]


async def test_no_client_hangs_on_a_frozen_store(
    chat_at: Any, make_relay: Any, own_store: Any, upstream: TestUpstream, tmp_path: Path
) -> None:
    port = free_port()
    relay = make_relay(session_service_url=f"http://127.0.0.1:{port}", folder=tmp_path)
    with own_store(port) as store:
        chat: Chat = await chat_at(relay, tmp_path)
        other = Chat(chat.http, chat.sessions)
        with frozen(store.pid):
            async with asyncio.timeout(15):
                best = asyncio.create_task(other.ask("Hello", headers={"x-session-store": "best-effort"}))
                refused = await chat.ask("Hello")
                error_of(refused, 529, "overloaded_error")
                assert int(refused.headers["retry-after"]) >= 1
                assert ((await best).status_code, (await best).headers["x-session-persisted"]) == (200, "none")
        assert len(upstream.requests()) == 1


async def test_a_relay_that_is_killed_leaves_a_session_that_goes_on(
    chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    relay = make_relay(RELAY_LEASE_SECONDS="5")
    doomed: Chat = await chat_at(relay)
    upstream.script({"text": "never heard", "delay_ms": 20_000})
    asking = asyncio.create_task(doomed.ask("Hello"))
    await upstream.until(lambda state: state["running"] == 1)
    relay.kill()
    with pytest.raises(httpx.HTTPError):
        await asking
    chat: Chat = await chat_at(make_relay(), session_id=doomed.session_id)
    upstream.reset()
    assert await chat.say("Again")
    assert [content for role, content in await chat.history() if role == "user"] == ["Hello", "Again"]
    assert [each["status"] for each in await chat.turns()] == ["completed", "expired"]


async def test_the_lease_of_a_long_turn_is_renewed(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    relay, other = make_relay(RELAY_LEASE_SECONDS="5"), make_relay()
    chat: Chat = await chat_at(relay)
    upstream.script({"text": "long", "delay_ms": 7_000})
    asking = asyncio.create_task(chat.ask("u1"))
    await upstream.until(lambda state: state["running"] == 1)
    behind: Chat = await chat_at(other, session_id=chat.session_id)
    await behind.say("u2")
    assert (await asking).headers["x-session-persisted"] == "yes"
    assert [content for role, content in await chat.history() if role == "user"] == ["u1", "u2"]
    assert [each["status"] for each in await chat.turns()] == ["completed", "completed"]


async def test_a_relay_that_stops_keeps_what_has_come(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    relay = make_relay(GRACEFUL_STOP_SECONDS="1")
    chat: Chat = await chat_at(relay)
    upstream.script({"text": "word " * 2000, "event_delay_ms": 20})

    async def read() -> bytes:
        seen = b""
        try:
            async with chat.stream("Hello") as answer:
                async for chunk in answer.aiter_raw():
                    seen += chunk
        except httpx.HTTPError:
            pass
        return seen

    reading = asyncio.create_task(read())
    await upstream.until(lambda state: state["running"] == 1)
    await asyncio.sleep(0.5)
    assert await asyncio.to_thread(relay.stop) == 0
    seen = streamed_text((await reading).rpartition(b"\n\n")[0])
    await chat.until_turn("interrupted")
    assert (await chat.stored())[1]["content"].startswith(seen)


async def test_a_relay_that_stops_finishes_what_it_can(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    relay = make_relay()
    chat: Chat = await chat_at(relay)
    upstream.script({"text": "done", "delay_ms": 700})
    asking = asyncio.create_task(chat.ask("Hello"))
    await upstream.until(lambda state: state["running"] == 1)
    assert await asyncio.to_thread(relay.stop) == 0
    assert (await asking).status_code == 200
    assert await chat.history() == [("user", "Hello"), ("assistant", "done")]
