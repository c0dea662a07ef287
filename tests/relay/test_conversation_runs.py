"""Runs of conversations in all their turns: paused at any moment, broken off, behind other clients, taken back."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from tests.relay.calls import MODEL
from tests.relay.conftest import MakeRelay, MakeUser
from tests.relay.conversing import Conversation, Json, User, fine, until
from tests.upstream.client import TestUpstream

SLOW = {"text": "one two three four five six seven eight nine ten", "event_delay_ms": 100, "delta_characters": 5}
REFUSAL = {
    "status": 400,
    "body": {"type": "error", "error": {"type": "invalid_request_error", "message": "no given beginnings"}},
}


async def claude(mine: Conversation, *messages: tuple[str, str]) -> httpx.Response:
    """A turn through the Claude door in the conversation's session."""
    told = [{"role": role, "content": content} for role, content in messages]
    body = {"model": MODEL, "max_tokens": 100, "messages": told}
    return await mine.user.http.post("/v1/messages", json=body, headers={"x-session-id": mine.session_id})


async def broken_off(mine: Conversation, upstream: TestUpstream, answer: Json = SLOW, seconds: float = 0.8) -> str:
    """Asks, pauses in the middle of the answer, and gives what is stored of that."""
    upstream.script(answer)
    await mine.say("Count")
    await upstream.until(lambda state: state["running"] > 0)
    await asyncio.sleep(seconds)
    fine(await mine.call("pause"))
    assert (await mine.app())["execution_status"] == "paused"
    (question, partial) = await mine.stored()
    assert question == ("user", "Count")
    return partial[1]


# ── broken off and gone on with ─────────────────────────────────────────────────────────────────


async def test_a_pause_before_anything_new_has_come_keeps_what_there_was(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    partial = await broken_off(mine, upstream)
    for _ in range(2):
        upstream.script({"delay_ms": 20_000, "text": "never"})
        fine(await mine.call("run"))
        await upstream.until(lambda state: state["running"] > 0)
        fine(await mine.call("pause"))
        assert (await mine.app())["execution_status"] == "paused"
        assert await mine.stored() == [("user", "Count"), ("assistant", partial)]
        assert await mine.told() == [("user", "Count"), ("agent", partial)]
    upstream.script({"text": " rest"})
    fine(await mine.call("run"))
    await mine.until_status("finished")
    assert await mine.stored() == [("user", "Count"), ("assistant", partial.rstrip() + " rest")]


async def test_a_refused_continuation_keeps_what_there_was(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    partial = await broken_off(mine, upstream)
    upstream.script(REFUSAL, REFUSAL, {"text": " rest"})
    fine(await mine.call("run"))
    await mine.until_status("error")
    assert await mine.stored() == [("user", "Count"), ("assistant", partial)]
    fine(await mine.call("run"))
    await mine.until_status("finished")
    assert await mine.stored() == [("user", "Count"), ("assistant", partial.rstrip() + " rest")]


async def test_a_model_that_takes_no_given_beginning_is_asked_again(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    await broken_off(mine, upstream)
    upstream.script(REFUSAL, {"text": "All of it"})
    fine(await mine.call("run"))
    await mine.until_status("finished")
    assert await mine.stored() == [("user", "Count"), ("assistant", "All of it")]
    assert [message["role"] for message in upstream.requests()[-1]["json"]["messages"]] == ["user"]


@pytest.mark.parametrize(
    "blocks",
    [
        [
            {"type": "text", "text": "Let me see"},
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": "x" * 400}},
        ],
        [
            {"type": "thinking", "thinking": "hm " * 200, "signature": "signed"},
            {"type": "text", "text": "Hello"},
        ],
    ],
    ids=["tool_use", "thinking"],
)
async def test_what_is_no_text_is_asked_anew(caller: User, upstream: TestUpstream, blocks: list[Json]) -> None:
    mine = await caller.conversation()
    await broken_off(mine, upstream, {"blocks": blocks, "event_delay_ms": 60}, seconds=1.2)
    upstream.script({"text": "All done"})
    fine(await mine.call("run"))
    await mine.until_status("finished")
    assert await mine.stored() == [("user", "Count"), ("assistant", "All done")]


# ── other clients of the session ────────────────────────────────────────────────────────────────


async def test_messages_that_wait_keep_their_order(caller: User, upstream: TestUpstream) -> None:
    """And are stored once the session is free, though nobody asks for anything."""
    mine = await caller.conversation()
    upstream.script({"text": "slow answer", "delay_ms": 1500})
    other = asyncio.create_task(claude(mine, ("user", "Q1")))
    await upstream.until(lambda state: state["running"] > 0)
    await mine.say("first", run=False)
    await mine.say("second", run=False)
    assert (await other).status_code == 200
    await mine.say("third", run=False)

    async def all_stored() -> bool:
        return [said for _, said in await mine.stored()] == ["Q1", "slow answer", "first", "second", "third"]

    await until(all_stored)
    assert [said for _, said in await mine.told()] == ["Q1", "first", "second", "slow answer", "third"]


async def test_a_message_that_waits_is_delivered_unasked(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    upstream.script({"text": "slow answer", "delay_ms": 1000})
    other = asyncio.create_task(claude(mine, ("user", "Q1")))
    await upstream.until(lambda state: state["running"] > 0)
    await mine.say("first", run=False)
    await other

    async def is_stored() -> bool:
        return (await mine.stored())[-1] == ("user", "first")

    await until(is_stored)


async def test_a_pause_does_not_wait_for_other_clients(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    upstream.script({"text": "slow answer", "delay_ms": 6000}, {"text": "A"})
    other = asyncio.create_task(claude(mine, ("user", "Q1")))
    await upstream.until(lambda state: state["running"] > 0)
    await mine.say("Q2")
    await mine.until_status("running")
    began = time.monotonic()
    fine(await mine.call("pause"))
    assert time.monotonic() - began < 3
    assert (await mine.app())["execution_status"] == "paused"
    assert not other.done()
    await other
    fine(await mine.call("run"))
    await mine.until_status("finished")
    assert [said for _, said in await mine.stored()] == ["Q1", "slow answer", "Q2", "A"]


async def test_what_another_client_takes_back_is_not_shown(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    upstream.script({"text": "A1"}, {"text": "A2"}, {"text": "A2b"}, {"text": "A3"})
    await mine.answered("Q1")
    await mine.answered("Q2")
    edited = await claude(mine, ("user", "Q1"), ("assistant", "A1"), ("user", "Q2b"))
    assert edited.status_code == 200
    expected = [("user", "Q1"), ("agent", "A1"), ("user", "Q2b"), ("agent", "A2b")]
    assert await mine.told() == expected
    count = fine(await caller.http.get("/api/v1/events/count", params={"conversation_id__eq": mine.id}))
    assert count == len(await mine.events())
    async with mine.socket(resend_all="true") as socket:
        await socket.until(lambda frame: frame["kind"] == "MessageEvent" and "A2b" in json.dumps(frame))
        assert [seen for seen in socket.told if seen[0] != "status"] == expected
    await mine.answered("Q3")
    assert [said for _, said in await mine.stored()] == ["Q1", "A1", "Q2b", "A2b", "Q3", "A3"]


async def test_a_long_history_that_is_taken_back(caller: User) -> None:
    """By more than a page, more than once, and gone on with in between."""
    mine = await caller.conversation()
    whose = {"user_id": caller.user_id}
    path = f"/sessions/{mine.session_id}"

    async def add(first: int, last: int) -> None:
        told = [{"role": "user", "content": str(number)} for number in range(first, last)]
        fine(await caller.sessions.post(f"{path}/messages/batch", params=whose, json={"messages": told}))

    async def take_back(to_seq: int) -> None:
        fine(await caller.sessions.post(f"{path}/rewind", params=whose, json={"to_seq": to_seq}))

    async def told() -> list[int]:
        whole = fine(await caller.http.get(f"{mine.path}/trajectory"))["trajectory"]
        return [int(event["message"]) for event in whole if event.get("action") == "message"]

    await add(1, 451)
    assert await told() == list(range(1, 451))
    await take_back(100)
    await add(451, 801)
    assert await told() == [*range(1, 101), *range(451, 801)]
    await add(801, 803)
    await take_back(50)
    assert await told() == list(range(1, 51))
    await take_back(0)
    await add(803, 804)
    assert await told() == [803]


# ── pauses ──────────────────────────────────────────────────────────────────────────────────────


async def test_pauses_at_any_moment(caller: User, upstream: TestUpstream) -> None:
    """Also around the end of a run, and gone on with at once: every question is there once, and each run ends."""
    mine = await caller.conversation()
    upstream.script({"text": "abcdef", "event_delay_ms": 3, "repeat": -1})
    async with mine.socket() as socket:
        await socket.next()
        for number in range(20):
            await mine.say(f"Q{number}")
            await asyncio.sleep(0.008 * number)
            fine(await mine.call("pause"))
            assert (await mine.app())["execution_status"] in {"paused", "finished"}
            if number % 2:
                fine(await mine.call("run"))
                await mine.until_status("finished")
        await mine.answered("The end")
        await socket.until(lambda frame: frame["kind"] == "MessageEvent" and "The end" in json.dumps(frame))
        await socket.until_status("finished")
    statuses = [value for kind, value in socket.told if kind == "status"]
    # Each run is begun once, and ended once.
    assert statuses[::2] == ["running"] * (len(statuses) // 2)
    assert set(statuses[1::2]) <= {"paused", "finished"}
    asked = [said for role, said in await mine.stored() if role == "user"]
    assert asked == [*(f"Q{number}" for number in range(20)), "The end"]


async def test_what_is_said_after_a_pause_is_answered(caller: User, upstream: TestUpstream) -> None:
    """Also when the run has not come to rest yet."""
    mine = await caller.conversation()
    upstream.script({"text": "word " * 300, "event_delay_ms": 20}, {"text": "Second answer"})
    async with mine.socket() as socket:
        await socket.next()
        await mine.say("First")
        await upstream.until(lambda state: state["running"] > 0)
        await asyncio.sleep(0.5)
        pausing = asyncio.create_task(mine.call("pause"))
        await asyncio.sleep(0.02)  # the pause is there first, and takes longer than this
        began = time.monotonic()
        await mine.say("Second")
        fine(await pausing)
        assert time.monotonic() - began < 3
        await socket.until_status("finished")
    assert [value for kind, value in socket.told if kind == "status"] == ["running", "paused", "running", "finished"]
    assert (await mine.stored())[-2:] == [("user", "Second"), ("assistant", "Second answer")]


async def test_what_is_said_before_a_pause_is_not(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    upstream.script(SLOW)
    await mine.say("First")
    await upstream.until(lambda state: state["running"] > 0)
    await mine.say("Second")
    fine(await mine.call("pause"))
    assert (await mine.app())["execution_status"] == "paused"
    assert (await mine.stored())[-1] == ("user", "Second")
    assert len(upstream.requests("/v1/messages")) == 1


async def test_what_is_said_while_a_run_fails_is_answered(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    upstream.script(REFUSAL | {"delay_ms": 800}, {"text": "Answer"})
    async with mine.socket() as socket:
        await socket.next()
        await mine.say("First")
        await upstream.until(lambda state: state["running"] > 0)
        await mine.say("Second")
        await socket.until_status("finished")
    assert [frame["kind"] for frame in socket.frames].count("ConversationErrorEvent") == 1
    assert [said for _, said in await mine.stored()] == ["First", "Second", "Answer"]


async def test_silence_of_upstream(make_relay: MakeRelay, make_user: MakeUser, upstream: TestUpstream) -> None:
    """Is told while it lasts; a run that is stuck can be paused, and goes on by itself when upstream does."""
    relay = make_relay(RELAY_STUCK_SECONDS="1")
    user = await make_user(relay)
    mine = await user.conversation()
    upstream.script({"text": "late", "delay_ms": 4500}, {"text": "never", "hang_seconds": 30})
    async with mine.socket() as socket:
        await socket.next()
        await mine.say("Q1")
        await socket.until_status("stuck")
        info = fine(await user.http.get(mine.path))
        assert (info["status"], info["runtime_status"]) == ("RUNNING", "STATUS$ERROR")
        assert (await mine.call("run")).status_code == 409
        await socket.until_status("finished")
        assert fine(await user.http.get(mine.path))["runtime_status"] == "STATUS$READY"
        await mine.say("Q2")
        await socket.until_status("stuck")
        fine(await mine.call("pause"))
        await socket.until_status("paused")
    statuses = [value for kind, value in socket.told if kind == "status"]
    assert [each for each in statuses if each != "running"] == ["stuck", "finished", "stuck", "paused"]


async def test_a_pause_of_one_that_does_nothing(caller: User) -> None:
    mine = await caller.conversation()
    for _ in range(2):
        fine(await mine.call("pause"))
        assert (await mine.app())["execution_status"] == "paused"
    await mine.answered("Hi")
    fine(await mine.call("pause"))
    assert (await mine.app())["execution_status"] == "finished"


async def test_a_run_with_nothing_to_answer(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    fine(await mine.call("run"))
    await mine.until_status("finished")
    assert upstream.requests("/v1/messages") == []
    await mine.answered("Hi")
    fine(await mine.call("run"))
    await mine.until_status("finished")
    assert len(upstream.requests("/v1/messages")) == 1


# ── titles ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "title"),
    [
        ("我" * 100, "我" * 49 + "…"),
        ("x" * 100, "x" * 49 + "…"),
        ("Hi " + "我" * 100, "Hi " + "我" * 46 + "…"),
        ("我" * 50, "我" * 50),
        (" a \n b\t", "a b"),
        ("word " * 30, "word " * 9 + "word…"),
    ],
)
async def test_titles(caller: User, said: str, title: str) -> None:
    mine: Any = await caller.conversation(title="  ")
    assert (await mine.app())["title"] == f"Conversation {mine.id}"
    await mine.answered(said)
    assert (await mine.app())["title"] == title
