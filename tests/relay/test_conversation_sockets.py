"""Sockets of conversations: what they are sent at any place, what they send, and what is left of them."""

import asyncio
import json
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.relay.conversing import Conversation, Socket, User, fine, text, until
from tests.upstream.client import TestUpstream

SLOW = {"text": "word " * 40, "event_delay_ms": 100}


async def close_code(socket: Socket) -> int:
    """The code with which the socket is closed, after whatever it is sent before."""
    while True:
        try:
            await socket.next()
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else 0


@pytest.mark.parametrize("sent", ["a%2Fb", "a/b", "%00", "%0a", "..%2F", "a" * 1000, "%E4%BD%A0"])
async def test_ids_that_no_conversation_has(caller: User, sent: str) -> None:
    async with Conversation(caller, sent, "any").socket() as socket:
        assert await close_code(socket) == 4004


@pytest.mark.parametrize(
    ("query", "all_of_it"),
    [
        ({}, False),
        ({"resend_all": "false"}, False),
        ({"resend_all": ""}, False),
        ({"resend_all": "0"}, False),
        ({"resend_all": "true"}, True),
        ({"resend_all": "True"}, True),
        ({"resend_all": "1"}, True),
        ({"last_event_id": "not one of its"}, True),
        ({"last_event_id": "\0"}, True),
    ],
)
async def test_the_history_when_asked(caller: User, upstream: TestUpstream, query: Any, all_of_it: bool) -> None:
    mine = await caller.conversation()
    upstream.script({"text": "A1"}, {"text": "A2"})
    await mine.answered("Q1")
    async with mine.socket(**query) as socket:
        first = await socket.next()
        assert (first["key"], first["value"]["execution_status"]) == ("full_state", "finished")
        await socket.say("Q2")
        await socket.until(lambda frame: "A2" in json.dumps(frame))
        await socket.until_status("finished")
    before = [("status", "idle"), ("user", "Q1"), ("status", "running"), ("agent", "A1"), ("status", "finished")]
    after = [("user", "Q2"), ("status", "running"), ("agent", "A2"), ("status", "finished")]
    assert socket.told == (before + after if all_of_it else after)


@pytest.mark.parametrize(
    "sent",
    [
        *("x", "[]", "{}", "1", '"', "", b"\xff", "null", '{"role":"user","content":[]}', '{"role":"user"}'),
        '{"role":"assistant","content":[{"type":"text","text":"x"}]}',
        '{"role":"user","content":[{"type":"text","text":"a\\u0000"}]}',
        '{"role":"user","content":[{"type":"video","text":"a"}]}',
        "[" * 100_000,
    ],
)
async def test_frames_that_are_no_messages(caller: User, sent: str | bytes) -> None:
    """They are told so, nothing is stored, and the socket goes on."""
    mine = await caller.conversation()
    async with mine.socket() as socket:
        await socket.next()
        await socket.connection.send(sent)
        frame = await socket.next()
        assert frame["kind"] == "ConversationErrorEvent"
        assert isinstance(frame["code"], str)
        assert isinstance(frame["detail"], str)
        await socket.connection.send(json.dumps({"role": "user", "content": text("Hi")}).encode())
        await socket.until_status("finished")
    assert [said for role, said in await mine.stored() if role == "user"] == ["Hi"]


async def test_a_frame_over_the_limit_closes_the_socket(caller: User) -> None:
    mine = await caller.conversation()
    async with mine.socket() as socket:
        await socket.next()
        await socket.connection.send("x" * (16 * 2**20 + 1))
        assert await close_code(socket) == 1009


async def test_nothing_is_left_of_sockets(caller: User) -> None:
    mine = await caller.conversation()

    async def connections() -> int:
        return int(fine(await caller.http.get(mine.path))["num_connections"])

    async def none() -> bool:
        return await connections() == 0

    for _ in range(3):
        async with mine.socket() as one, mine.socket() as other:
            await one.next()
            await other.next()
            assert await connections() == 2
        await until(none)


async def test_a_deleted_conversation_closes_its_sockets(caller: User, upstream: TestUpstream) -> None:
    """In the middle of a run too, which upstream is let go of."""
    mine = await caller.conversation()
    upstream.script(SLOW)
    await mine.say("Count")
    await upstream.until(lambda state: state["running"] > 0)
    async with mine.socket() as socket:
        await socket.next()
        assert fine(await caller.http.delete(mine.path)) is True
        assert await close_code(socket) == 4004
    await upstream.until(lambda state: state["running"] == 0)


async def test_a_missing_conversation_says_so(caller: User) -> None:
    mine = await caller.conversation()
    await mine.answered("Hi")
    fine(await caller.http.post(f"/sessions/{mine.session_id}/close"))
    async with mine.socket(resend_all="true") as socket:
        first = await socket.next()
        assert (first["value"]["sandbox_status"], first["value"]["execution_status"]) == ("MISSING", None)
        await socket.until_status("finished")
        await socket.say("More")
        frame = await socket.until(lambda frame: frame["kind"] == "ConversationErrorEvent")
        assert frame["code"] == "conversation_archived"


async def test_a_reader_that_does_not_read_holds_nobody_up(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    upstream.script({"text": "x" * 2**20, "delta_characters": 2**17, "repeat": -1})
    async with mine.socket() as slow, mine.socket() as quick:
        await quick.next()
        slow.connection.transport.pause_reading()
        for number in range(8):
            await mine.answered(f"Q{number}")
        async with asyncio.timeout(10):
            for _ in range(8):
                await quick.until_status("finished")
        slow.connection.transport.resume_reading()
        for _ in range(8):
            await slow.until_status("finished")
        assert slow.told == quick.told
