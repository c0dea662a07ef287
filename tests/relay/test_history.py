"""History: whatever mix of new messages and whole arrays a client sends, the store holds the conversation it sees."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from services.relay import history
from services.relay.arrays import Array
from services.relay.request import ClaudeRequest
from services.relay.session_ids import Choice
from services.relay.settings import RelaySettings
from shared import wire
from shared.discovery import Instances
from shared.session_client import SessionClient, SessionKey
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.relay.calls import Chat, Json, assistant, error_of, events_of, streamed_text, user
from tests.relay.conversing import until
from tests.upstream import rules
from tests.upstream.client import TestUpstream


async def begin(chat: Chat, upstream: TestUpstream, *answers: str) -> list[Json]:
    """A conversation of as many turns as there are answers: u1 a1 u2 a2 …; gives the client's array."""
    array: list[Json] = []
    for number, answer in enumerate(answers, 1):
        upstream.script({"text": answer})
        array.append(user(f"u{number}"))
        assert await chat.say(*array) == answer
        array.append(assistant(answer))
    upstream.reset()
    return array


def flat(array: list[Json]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in array]


async def test_only_what_is_new(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": "a1"}, {"text": "a2"})
    await chat.say("u1")
    await chat.say("u2")
    assert await chat.history() == [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    second = upstream.requests("/v1/messages")[1]["json"]["messages"]
    assert flat(second[:1] + second[2:]) == [("user", "u1"), ("user", "u2")]
    assert second[1] == assistant([{"type": "text", "text": "a1"}])


async def test_everything_again(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    assert await chat.history() == flat(array)
    assert [each["seq"] for each in await chat.stored()] == [1, 2, 3, 4]
    upstream.script({"text": "a3"})
    await chat.say(*array, "u3")
    assert upstream.requests("/v1/messages")[0]["json"]["messages"] == [*array, user("u3")]
    assert await chat.history() == [*flat(array), ("user", "u3"), ("assistant", "a3")]


async def test_the_two_ways_mixed(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1")
    upstream.script({"text": "a2"}, {"text": "a3"}, {"text": "a4"})
    await chat.say("u2")
    await chat.say(*array, "u2", assistant("a2"), "u3")
    await chat.say("u4")
    expected = [*flat(array), *flat([user("u2"), assistant("a2"), user("u3"), assistant("a3"), user("u4")])]
    assert await chat.history() == [*expected, ("assistant", "a4")]


async def test_the_last_answer_asked_for_again(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    upstream.script({"text": "better"})
    assert await chat.say(*array[:3]) == "better"
    assert await chat.history() == [*flat(array[:3]), ("assistant", "better")]
    assert [each["seq"] for each in await chat.stored()] == [1, 2, 3, 5]


async def test_a_message_edited(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    upstream.script({"text": "a2'"})
    edited = [*array[:2], user("u2'")]
    await chat.say(*edited)
    assert await chat.history() == [*flat(edited), ("assistant", "a2'")]
    assert len(await chat.stored(include_superseded=True)) == 6


async def test_the_first_message_edited(chat: Chat, upstream: TestUpstream) -> None:
    await begin(chat, upstream, "a1")
    upstream.script({"text": "b2"})
    edited = [user("v1"), assistant("b1"), user("v2")]
    await chat.say(*edited)
    assert await chat.history() == [*flat(edited), ("assistant", "b2")]


async def test_a_prefill_is_joined_with_what_follows(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1")
    upstream.script({"text": " 42."}, {"text": "Thanks to you"})
    assert await chat.say(*array, "u2", assistant("The answer is")) == " 42."
    assert await chat.history() == [*flat(array), ("user", "u2"), ("assistant", "The answer is 42.")]
    await chat.say(*array, "u2", assistant("The answer is 42."), "thanks")
    assert len(await chat.stored()) == 6


async def test_a_prefill_that_is_stored_already(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    upstream.script({"text": " and more", "blocks": [{"type": "text", "text": " and more"}]})
    await chat.say(*array)
    assert await chat.history() == [*flat(array[:3]), ("assistant", "a2 and more")]


async def test_a_prefill_before_a_tool_call(chat: Chat, upstream: TestUpstream) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "clock", "input": {}}
    upstream.script({"blocks": [call]})
    await chat.ask("time?", assistant([{"type": "text", "text": "Looking"}]))
    assert (await chat.stored())[1]["content_blocks"] == [{"type": "text", "text": "Looking"}, call]


async def test_forms_that_mean_the_same(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": "one two"}, {"text": "a2"})
    await chat.say("u1")
    blocks = [
        {"type": "text", "text": "one "},
        {"type": "text", "text": "two ", "cache_control": {"type": "ephemeral"}},
    ]
    await chat.say(user([{"type": "text", "text": "u1"}]), assistant(blocks), "u2")
    assert [each["seq"] for each in await chat.stored()] == [1, 2, 3, 4]


async def test_system_and_tools_are_the_clients(chat: Chat, upstream: TestUpstream) -> None:
    params = {"user_id": "dev"}
    await chat.say("u1")
    kept = {"role": "system", "content": "Speak German"}
    assert (await chat.sessions.post(f"{chat.path}/messages", params=params, json=kept)).status_code == 200
    upstream.reset()
    await chat.say("u2")
    await chat.say("u3", system="Be brief")
    await chat.say("u4", system=[{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}])
    sent = [entry["json"]["system"] for entry in upstream.requests("/v1/messages")]
    stored = {"type": "text", "text": "Speak German"}
    assert sent[0] == "Speak German"
    assert sent[1] == [{"type": "text", "text": "Be brief"}, stored]
    assert sent[2] == [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}, stored]
    assert {each["role"] for each in await chat.stored()} == {"user", "assistant", "system"}


async def test_no_more_cache_marks_than_upstream_takes(chat: Chat, upstream: TestUpstream) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    for number in range(5):
        system = [{"type": "text", "text": "Be brief", **mark}]
        answer = await chat.ask(user([{"type": "text", "text": f"u{number}", **mark}]), system=system)
        assert answer.status_code == 200
    last = upstream.requests("/v1/messages")[-1]["json"]
    marked = [
        block["text"]
        for message in last["messages"]
        for block in message["content"]
        if isinstance(block, dict) and "cache_control" in block
    ]
    assert marked == ["u2", "u3", "u4"]


async def test_system_messages_within_a_conversation(chat: Chat, upstream: TestUpstream) -> None:
    said = {"role": "system", "content": "From now on, rhyme"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ok"}], "usage": {"input_tokens": 1}}
    upstream.script({"body": answer, "repeat": 3})
    await chat.ask("u1")
    await chat.ask("u1", assistant("ok"), said, "u2")
    await chat.ask("u1", assistant("ok"), said, "u2", assistant("ok"), "u3")
    assert [each["role"] for each in await chat.stored()] == [
        *("user", "assistant", "system", "user", "assistant", "user", "assistant"),
    ]
    assert upstream.requests("/v1/messages")[2]["json"]["messages"][2] == said


async def test_a_conflict_may_be_refused(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    headers = {"x-session-conflict": "reject"}
    answer = await chat.ask(*array[:2], "another", headers=headers)
    assert "depart" in error_of(answer, 409, "invalid_request_error")
    assert answer.headers["x-should-retry"] == "false"
    assert await chat.history() == flat(array)
    assert (await chat.ask(*array, "u3", headers=headers)).status_code == 200
    assert (await chat.ask(*array, headers={"x-session-conflict": "what"})).status_code == 400


async def test_a_request_without_its_tool_call_is_upstreams_to_refuse(chat: Chat, upstream: TestUpstream) -> None:
    await chat.say("u1")
    orphan = user([{"type": "tool_result", "tool_use_id": "nope", "content": "x"}])
    answer = await chat.ask(orphan)
    assert answer.status_code == 400
    assert "unexpected `tool_use_id`" in answer.json()["error"]["message"]
    assert upstream.requests("/v1/messages")[1]["json"]["messages"][-1] == orphan
    assert len(await chat.stored()) == 2


# ── characters that cannot be stored ────────────────────────────────────────────────────────────

ODD = 'nul \0, surrogate \ud800, "quoted"'
ODD_STORED = 'nul \ufffd, surrogate \ufffd, "quoted"'


async def post_raw(chat: Chat, *messages: Json) -> httpx.Response:
    """Sends what httpx would not: JSON with the escapes of lone surrogates."""
    content = json.dumps(chat.body(*messages)).encode()
    return await chat.http.post("/v1/messages", content=content, headers={"content-type": "application/json"})


async def test_odd_characters_pass_on_and_are_replaced_in_the_store(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": f"echo {ODD}"})
    assert (await post_raw(chat, user("before"))).status_code == 200
    upstream.reset()
    upstream.script({"text": f"echo {ODD}"})
    answer = await post_raw(chat, user([{"type": "text", "text": ODD}]))
    assert answer.status_code == 200
    assert answer.json()["content"][0]["text"] == f"echo {ODD}"
    sent = upstream.requests("/v1/messages")[0]["json"]["messages"]
    assert sent[-1] == user([{"type": "text", "text": ODD}])
    stored = (await chat.stored())[-2:]
    assert [each["content"] for each in stored] == [ODD_STORED, f"echo {ODD_STORED}"]
    assert [each["metadata"] for each in stored] == [{"replaced_characters": True}] * 2
    # A client that sends it all again still lines up.
    first = (await chat.stored())[:2]
    again = [user("before"), assistant(first[1]["content_blocks"]), user(ODD), assistant(f"echo {ODD}"), user("u3")]
    assert (await post_raw(chat, *again)).status_code == 200
    assert [each["seq"] for each in await chat.stored()] == [1, 2, 3, 4, 5, 6]


# ── ids that clients send of their own accord ───────────────────────────────────────────────────


async def test_an_implied_session_is_never_put_before_an_array(chat: Chat, upstream: TestUpstream) -> None:
    headers = {"x-claude-code-session-id": chat.session_id}

    async def ask(*messages: Json, **more: str) -> httpx.Response:
        body = {"model": "test-model", "max_tokens": 10, "messages": list(messages)}
        return await chat.http.post("/v1/messages", json=body, headers=headers | more)

    upstream.script({"text": "a1"}, {"text": "title"}, {"text": "a2"}, {"text": "a3"}, {"text": "agent"})
    assert (await ask(user("u1"))).headers["x-session-id"] == chat.session_id
    side = (await ask(user("Make a title"))).headers["x-session-id"]
    assert side.startswith(f"{chat.session_id}~")
    assert len(side) == len(chat.session_id) + 13
    assert (await ask(user("u1"), assistant("a1"), user("u2"))).headers["x-session-id"] == chat.session_id
    again = await ask(user("Make a title"), assistant("title"), user("another"))
    assert again.headers["x-session-id"] == side
    agent = await ask(user("A task"), **{"x-claude-code-agent-id": "agent7"})
    assert agent.headers["x-session-id"] == f"{chat.session_id}~agent7"
    for odd in ("a/b", "x" * 300):  # no session's id could hold it, and its client did not mean it for us
        agent = await ask(user("A task"), **{"x-claude-code-agent-id": odd})
        assert agent.headers["x-session-id"] == f"{chat.session_id}~{hashlib.sha256(odd.encode()).hexdigest()}"
    assert await chat.history() == flat([user("u1"), assistant("a1"), user("u2"), assistant("a2")])
    assert [entry["json"]["messages"][0] for entry in upstream.requests("/v1/messages")] == [
        *(user("u1"), user("Make a title"), user("u1"), user("Make a title"), *[user("A task")] * 3),
    ]
    aside = Chat(chat.http, chat.sessions, side)
    assert await aside.history() == flat([user("Make a title"), assistant("title"), user("another"), assistant("a3")])


async def test_conversations_that_begin_at_once_under_one_implied_id(
    chat: Chat, chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    """None takes another one's place, waits for it, or is put into its session, at one relay or at two."""
    other: Chat = await chat_at(make_relay())
    for number in range(5):
        session_id = f"{chat.session_id}-{number}"
        texts = [f"main {number}", f"title {number}", f"topic {number}"]
        upstream.script(*({"text": f"of {text}", "delay_ms": 150, "match": {"contains": text}} for text in texts))
        bodies = [{"model": "test-model", "max_tokens": 10, "messages": [user(text)]} for text in texts]
        headers = {"x-claude-code-session-id": session_id}
        doors = [chat.http, chat.http, other.http]
        sent = [door.post("/v1/messages", json=body, headers=headers) for door, body in zip(doors, bodies, strict=True)]
        answers = await asyncio.gather(*sent)
        ids = [answer.headers["x-session-id"] for answer in answers]
        assert len(set(ids)) == 3
        assert session_id in ids
        for text, side in zip(texts, ids, strict=True):
            assert side.startswith(session_id)
            stored = await replace(chat, session_id=side).stored(include_superseded=True)
            assert [each["content"] for each in stored] == [text, f"of {text}"]


async def test_an_id_that_a_client_names_for_affinity_is_implied(chat: Chat, upstream: TestUpstream) -> None:
    """As opencode does: a title and the conversation at once, with one id in both headers."""
    headers = {"x-session-id": chat.session_id, "x-session-affinity": chat.session_id}
    bodies = [{"model": "test-model", "max_tokens": 10, "messages": [user(text)]} for text in ("Make a title", "main")]
    for body in bodies:
        assert (await chat.http.post("/v1/messages", json=body, headers=headers)).status_code == 200
    assert [entry["json"]["messages"] for entry in upstream.requests("/v1/messages")] == [
        [user("Make a title")], [user("main")]
    ]  # fmt: skip
    assert [text for _, text in await chat.history()][:1] == ["Make a title"]
    assert len(await chat.stored()) == 2
    body = bodies[1] | {"metadata": {"session_id": chat.session_id}}
    assert (await chat.http.post("/v1/messages", json=body, headers=headers)).status_code == 200
    assert len(await chat.stored()) == 4


async def test_a_side_conversation_does_not_wait_for_the_one_that_begins(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": "long", "hang_seconds": 30, "match": {"contains": "main"}})
    headers = {"x-claude-code-session-id": chat.session_id}
    body = {"model": "test-model", "max_tokens": 10, "messages": [user("main")]}
    main = asyncio.create_task(chat.http.post("/v1/messages", json=body, headers=headers))
    await upstream.until(lambda state: state["running"] == 1)
    async with asyncio.timeout(5):
        title = await chat.http.post("/v1/messages", json=body | {"messages": [user("title")]}, headers=headers)
    assert title.headers["x-session-id"].startswith(f"{chat.session_id}~")
    main.cancel()
    await upstream.until(lambda state: state["running"] == 0)


# ── sessions that have ended ────────────────────────────────────────────────────────────────────


async def test_a_closed_session_begins_anew_with_a_whole_array(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1")
    await chat.http.post(f"/sessions/{chat.session_id}/close")
    upstream.script({"text": "a2"})
    await chat.say(*array, "u2")
    assert await chat.history() == [*flat(array), ("user", "u2"), ("assistant", "a2")]
    assert [each["seq"] for each in await chat.stored()] == [3, 4, 5, 6]


async def test_an_implied_session_that_was_closed_begins_anew(chat: Chat, upstream: TestUpstream) -> None:
    headers = {"x-openwebui-chat-id": chat.session_id}
    body = {"model": "test-model", "max_tokens": 10}
    for text in ("one", "two"):
        answer = await chat.http.post("/v1/messages", json=body | {"messages": [user(text)]}, headers=headers)
        assert answer.headers["x-session-id"] == chat.session_id
        assert [text for _, text in await chat.history()][:1] == [text]
        await chat.http.post(f"/sessions/{chat.session_id}/close")
    assert upstream.requests("/v1/messages")[1]["json"]["messages"] == [user("two")]
    assert len(await chat.stored(include_superseded=True)) == 4


@pytest.mark.parametrize(("policy", "knows"), [("restart", False), ("resume", True)])
async def test_an_expired_session(chat: Chat, chat_at: Any, make_relay: Any, policy: str, knows: bool) -> None:
    mine: Chat = await chat_at(make_relay(RELAY_EXPIRED_SESSIONS=policy, RELAY_SESSION_IDLE_SECONDS="1"))
    await mine.say("My name is Ada", model="demo")
    array = [user("My name is Ada"), assistant((await mine.stored())[1]["content_blocks"])]
    await asyncio.sleep(1.2)
    assert ("Your name is Ada" in await mine.say("What is my name?", model="demo")) is knows
    await asyncio.sleep(1.2)
    await mine.say(*array, "What is my name?", model="demo")
    assert len(await mine.stored()) == 4


async def test_a_completed_session_takes_nothing(chat: Chat) -> None:
    await chat.say("u1")
    params = {"user_id": "dev"}
    await chat.sessions.put(chat.path, params=params, json={"status": "completed"})
    assert (await chat.ask("u2")).status_code == 409
    assert len(await chat.stored()) == 2


# ── order ───────────────────────────────────────────────────────────────────────────────────────


async def test_requests_for_one_session_are_served_in_order(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"repeat": -1, "delay_ms": 40})
    first = asyncio.create_task(chat.say("u0"))
    await upstream.until(lambda state: state["requests"] == 1)
    others = []
    for number in range(1, 8):
        others.append(asyncio.create_task(chat.say(f"u{number}")))
        await asyncio.sleep(0.005)

    async def one_is_served_and_others_wait() -> bool:
        queue = (await chat.http.get("/queue/health")).json()
        assert queue["in_flight"] in {0, 1}  # none between two turns
        return bool(queue["in_flight"] and queue["queued"])

    await until(one_is_served_and_others_wait)
    await asyncio.gather(first, *others)
    stored = await chat.stored()
    assert [each["content"] for each in stored if each["role"] == "user"] == [f"u{number}" for number in range(8)]
    assert [each["role"] for each in stored] == ["user", "assistant"] * 8


async def test_two_relays_take_turns_on_one_session(chat: Chat, chat_at: Any, make_relay: Any) -> None:
    one = Chat(chat.http, chat.sessions)
    other: Chat = await chat_at(make_relay(), session_id=one.session_id)
    whole = [user("x"), assistant("y")]
    await asyncio.gather(*(each.say(*whole, f"{place}") for place in range(6) for each in (one, other)))
    stored = await one.stored()
    assert [each["role"] for each in stored] == ["user", "assistant"] * 2
    turns = await one.turns()
    assert [each["status"] for each in turns] == ["completed"] * 12


async def test_a_busy_session_may_be_refused_at_once(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"delay_ms": 500})
    first = asyncio.create_task(chat.say("u1"))
    await upstream.until(lambda state: state["running"] == 1)
    answer = await chat.ask("u2", headers={"x-session-busy": "reject"})
    error_of(answer, 409, "invalid_request_error")
    assert int(answer.headers["retry-after"]) >= 1
    await first
    assert len(await chat.stored()) == 2


# ── any mix ─────────────────────────────────────────────────────────────────────────────────────

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
MARK = {"cache_control": {"type": "ephemeral"}}
NO_RESULT = "No result of this tool call was recorded."
SYSTEM = [{"type": "text", "text": "Be brief", **MARK}]
ANSWERS = ("text", "thinking", "tools", "all")


@dataclass(frozen=True)
class Step:
    """One request: what the client makes of the conversation it sees, what it says then, and how that ends.

    `edits` are those of a client that sends everything again; None: it sends only what is new.
    """

    edits: list[tuple[str, int]] | None
    says: list[str]
    prefill: str | None
    answer: str
    ending: str
    is_disguised: bool


_edits = st.lists(st.tuples(st.sampled_from(["cut end", "cut start", "drop", "reword"]), st.integers(0, 5)), max_size=2)
_steps = st.lists(
    st.builds(
        Step,
        edits=st.none() | st.just([]) | _edits,
        says=st.just(["text"])
        | st.lists(st.sampled_from(["text", "other text", "image", "results", "no results"]), max_size=2),
        prefill=st.none() | st.none() | st.sampled_from(["It is", "四"]),
        answer=st.sampled_from(ANSWERS),
        ending=st.sampled_from(["plain", "plain", "plain", "stream", "cut", "fails", "refused", "no conflict"]),
        is_disguised=st.booleans(),
    ),
    min_size=4,
    max_size=10,
)


@given(steps=_steps)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_mix_of_requests(
    chat: Chat, upstream: TestUpstream, rest: Callable[[], None], steps: list[Step]
) -> None:
    """What is stored is the conversation as the client sees it, messages that stay are the same rows, and upstream
    got a valid request that holds just this conversation: in the client's own form, where the client sent it."""
    mine = Mirror(Chat(chat.http, chat.sessions, f"mix-{uuid.uuid4().hex}"), upstream, rest)
    for step in steps:
        note(str(step))
        await mine.take(step)
    totals = (await chat.sessions.get(mine.chat.path, params={"user_id": "dev"})).json()
    assert totals["message_count"] == len(mine.seen)


_side_steps = st.lists(
    st.tuples(st.sampled_from(["u1", "title", "task"]), _edits, st.booleans()), min_size=2, max_size=8
)


@given(steps=_side_steps)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_mix_under_an_implied_id(
    chat: Chat, upstream: TestUpstream, steps: list[tuple[str, list[tuple[str, int]], bool]]
) -> None:
    """Nothing is ever put before an array; it is stored as it is, in the session of those that begin like it."""
    upstream.reset()
    session_id = f"implied-{uuid.uuid4().hex}"
    seen: dict[str, list[Json]] = {}
    told: dict[str, str] = {}
    for number, (first, edits, is_answered) in enumerate(steps):
        rest = edited(seen.get(first, [user(first)])[1:], edits) if is_answered else []
        array = [user(first), *rest, *([user(f"more {number}")] if rest else [])]
        upstream.script({"text": f"answer {number}"})
        body = {"model": "test-model", "max_tokens": 10, "messages": array}
        answer = await chat.http.post("/v1/messages", json=body, headers={"x-claude-code-session-id": session_id})
        assert upstream.requests("/v1/messages")[-1]["json"] == body
        seen[first] = [*array, assistant(f"answer {number}")]
        assert told.setdefault(first, answer.headers["x-session-id"]) == answer.headers["x-session-id"]
        for name, side in told.items():
            stored = await Chat(chat.http, chat.sessions, side).stored()
            assert told_by(stored) == told_by(seen[name])
    main, *sides = told.values()
    assert main == session_id
    assert all(side.startswith(f"{session_id}~") for side in sides)
    assert len({*told.values()}) == len(told)


class Mirror:
    """A client and the conversation as it sees it; `take` does a step and compares."""

    def __init__(self, chat: Chat, upstream: TestUpstream, rest: Callable[[], None]) -> None:
        self.chat = chat
        self.seen: list[Json] = []
        self._upstream = upstream
        self._rest = rest
        self._rows: list[Json] = []
        self._made = 0

    async def take(self, step: Step) -> None:
        array = self._array(step)
        end = last_of_user(array) + 1
        is_whole = any(each["role"] == "assistant" for each in array)
        # Where there is no assistant message the array is new; else it is the whole conversation.
        asked = array[:end] if is_whole else self.seen + array
        agreed = same_beginning(self.seen, asked)
        prefill = [block for each in array[end:] for block in blocks(each)]
        sent = array
        if is_whole and step.is_disguised:
            sent = [disguised(each, is_marked=each is array[agreed - 1]) for each in array[:agreed]] + array[agreed:]
        is_valid = not is_whole or rules.problem(self.chat.body(*sent) | {"metadata": {}}) is None
        self._upstream.reset()
        if step.ending == "no conflict" and agreed < min(len(asked), len(self.seen)):
            answer = await self.chat.ask(*sent, system=SYSTEM, headers={"x-session-conflict": "reject"})
            assert answer.status_code == 409
            assert self._upstream.requests() == []
            agreed = len(self.seen)
        else:
            said = await self._ask(step, sent, is_valid=is_valid)
            # A refused turn's own messages are taken back; what it rewound stays rewound.
            self.seen = asked[:agreed] if said is None else asked
            self.seen = [*self.seen, assistant(joined(prefill, said))] if said else self.seen
            self._compare_upstream(sent, asked, is_whole=is_whole, is_valid=is_valid)
        rows = await self.chat.stored()
        assert told_by(rows) == told_by(self.seen)
        ids = [(each["seq"], each["message_id"]) for each in rows[:agreed]]
        assert ids == [(each["seq"], each["message_id"]) for each in self._rows[:agreed]]
        self._rows = rows

    def _array(self, step: Step) -> list[Json]:
        """The messages that the client sends, as it has them; one of the user is among them."""
        kept = [] if step.edits is None else edited(self.seen, step.edits)
        before = kept if any(each["role"] == "assistant" for each in kept) else self.seen
        if before is not kept:  # as new messages these would answer calls a second time
            kept = [each for each in kept if all(block["type"] != "tool_result" for block in blocks(each))]
        new: list[Json] = []
        for kind in step.says:
            if content := self._content(kind, before if not new else []):
                new.append(user(content))
        array = [*kept, *new]
        if all(each["role"] != "user" for each in array):
            array.append(user("Hello"))
        return array if step.prefill is None else [*array, assistant(step.prefill)]

    def _content(self, kind: str, before: list[Json]) -> Any:
        calls = [block["id"] for block in blocks(before[-1]) if block["type"] == "tool_use"] if before else []
        results = [{"type": "tool_result", "tool_use_id": each, "content": f"of {each}"} for each in calls]
        if kind == "results":
            return results
        if kind == "image":
            return [*results, text(f"And this? {len(before)}"), {**IMAGE, **MARK}]
        said = f"{'another' if kind == 'other text' else 'question'} {len(before)}"
        return [*results, text(said)] if results and kind != "no results" else said

    async def _ask(self, step: Step, sent: list[Json], *, is_valid: bool) -> list[Json] | None:
        """The blocks of the answer as the client sees it, none when it sees none; None when it was refused."""
        self._made += 1
        answer = made_answer(step.answer, self._made)
        if step.ending == "refused" or not is_valid:
            if step.ending == "refused":
                self._upstream.script({"status": 400})
            assert (await self.chat.ask(*sent, system=SYSTEM)).status_code == 400
            return None
        if step.ending == "fails":
            self._upstream.script({"status": 503})
            assert (await self.chat.ask(*sent, system=SYSTEM)).status_code == 529
            self._rest()
            return []
        if step.ending == "cut":
            self._upstream.script({"text": f"{self._made} " + "word " * 20, "cut_after_events": 6})
            return [text(streamed_text(await self.chat.stream_whole(*sent, system=SYSTEM)))]
        self._upstream.script({"blocks": answer})
        if step.ending == "stream":
            assert events_of(await self.chat.stream_whole(*sent, system=SYSTEM))[-1][0] == "message_stop"
        else:
            headers = {"x-session-conflict": "reject"} if step.ending == "no conflict" else None
            told = await self.chat.ask(*sent, system=SYSTEM, headers=headers)
            assert told.status_code == 200, told.text
            assert told.json()["content"] == answer
        return answer

    def _compare_upstream(self, sent: list[Json], asked: list[Json], *, is_whole: bool, is_valid: bool) -> None:
        (request,) = (entry["json"] for entry in self._upstream.requests("/v1/messages"))
        assert is_valid is (rules.problem(request) is None)
        assert request["system"] == SYSTEM
        if is_whole:
            assert request["messages"] == sent
        else:
            assert spoken(request["messages"]) == spoken(asked)
            assert request["messages"][-1]["role"] == "user"
            assert json.dumps(request).count('"cache_control"') <= 4


def text(value: str, **more: Any) -> Json:
    return {"type": "text", "text": value, **more}


def blocks(message: Json) -> list[Json]:
    """A message's blocks, one that is stored or one that is sent."""
    content = message.get("content_blocks") or message["content"]
    return [text(content)] if isinstance(content, str) else list(content)


def told_by(messages: list[Json]) -> list[tuple[str, list[Json]]]:
    return [(each["role"], blocks(each)) for each in messages]


def last_of_user(array: list[Json]) -> int:
    return max(place for place, each in enumerate(array) if each["role"] == "user")


def same_beginning(one: list[Json], other: list[Json]) -> int:
    """How many messages of the two are the same from the first on."""
    same = 0
    while same < min(len(one), len(other)) and spoken([one[same]]) == spoken([other[same]]):
        same += 1
    return same


def spoken(messages: list[Json]) -> list[tuple[str, list[Json]]]:
    """What is said, without cache marks and without what stands for no result.

    Adjacent messages of one role are one, in which results come first.
    """
    told: list[tuple[str, list[Json]]] = []
    for each in messages:
        said = [{name: value for name, value in block.items() if name != "cache_control"} for block in blocks(each)]
        said = [block for block in said if block.get("content") != NO_RESULT or not block["is_error"]]
        if told and told[-1][0] == each["role"]:
            told[-1][1].extend(said)
        else:
            told.append((each["role"], said))
    return [(role, sorted(said, key=lambda block: block["type"] != "tool_result")) for role, said in told]


def edited(seen: list[Json], edits: list[tuple[str, int]]) -> list[Json]:
    kept = list(seen)
    for kind, place in edits:
        if kind == "cut end":
            kept = kept[: max(0, len(kept) - place)]
        elif kind == "cut start":
            kept = kept[place:]
        elif kept:
            one = kept.pop(place % len(kept))
            if kind == "reword":
                kept.insert(place % (len(kept) + 1), {"role": one["role"], "content": [*map(reworded, blocks(one))]})
    return kept


def reworded(block: Json) -> Json:
    others: dict[str, Json] = {
        "text": {"text": "other"},
        "tool_use": {"input": {"n": 2}},
        "tool_result": {"content": "other"},
    }
    return {**block, **others.get(block["type"], {})}


def disguised(message: Json, *, is_marked: bool) -> Json:
    """The same message in another form: texts in pieces, marks, blanks and nulls, no thinking, 1.0 for 1."""
    forms: list[Json] = []
    for block in blocks(message):
        if block["type"] == "text":
            half = len(block["text"].rstrip()) // 2
            forms += [text(block["text"][:half])] if half else []
            forms.append(text(block["text"][half:], citations=None))
        elif block["type"] == "tool_use":
            forms.append(block | {"input": {name: float(n) for name, n in reversed(block["input"].items())}})
        elif block["type"] == "tool_result":
            forms.append(block | {"content": [text(block["content"])], "is_error": False})
        elif block["type"] != "thinking":
            forms.append(block)
    if forms[-1]["type"] == "text":
        forms[-1]["text"] += " \n"
    if is_marked:
        forms[-1] = {**forms[-1], **MARK}
    return message | {"content": forms}


def joined(prefill: list[Json], answer: list[Json]) -> list[Json]:
    if prefill and prefill[-1]["type"] == answer[0]["type"] == "text":
        return [*prefill[:-1], text(prefill[-1]["text"] + answer[0]["text"]), *answer[1:]]
    return [*prefill, *answer]


def made_answer(kind: str, number: int) -> list[Json]:
    """An answer that no other answer of the conversation is like."""
    thought = f"Thinking of {number}"
    thinking = {"type": "thinking", "thinking": thought, "signature": rules.signature(thought)}
    calls = [
        {"type": "tool_use", "id": f"call_{number}{letter}", "name": "f", "input": {"n": 1, "m": number}}
        for letter in "ab"
    ]
    return {
        "text": [text(f"answer {number}")],
        "thinking": [thinking, text(f"answer {number}", **MARK)],
        "tools": calls,
        "all": [thinking, text(f"answer {number}"), calls[0]],
    }[kind]


async def test_who_waits_at_an_instance_that_stops_waits_on_at_another(
    database_url: str, session_service: ServiceProcess, user_id: str, scratch: Path, tmp_path: Path
) -> None:
    """The store sends its waiters away when it stops; that is nothing that a client should hear of."""
    key = SessionKey(user_id, "busy")
    said = wire.NewMessage(role="user", content="first")
    with start_session_service(database_url, scratch, free_port(), DRAIN_SECONDS="0") as leaving:
        instances = Instances([leaving.url])
        client = SessionClient(instances)
        held = await client.open_turn(key, wire.OpenTurn(messages=[said], create_session=wire.CreateSessionInTurn()))
        array = Array.of(ClaudeRequest({"messages": [user("second")]}, None))
        wishes = history.Wishes.of({}, RelaySettings(environment="test", data_dir=tmp_path))
        opening = history.Opening(key, Choice("busy", "named"), array, wishes)
        waiting = asyncio.create_task(history.open_turn(client, opening, wait_seconds=20))
        await asyncio.sleep(0.5)
        instances.replace([session_service.url])
        assert await asyncio.to_thread(leaving.stop) == 0
        await asyncio.sleep(0.3)
        assert not waiting.done()
    done = wire.CompleteTurn(lease_token=held.lease_token, status="completed")
    await client.complete_turn(key, held.turn_id, done)
    opened = await asyncio.wait_for(waiting, 10)
    assert [message.content for message in opened.turn.messages] == ["second"]
    await client.close()
