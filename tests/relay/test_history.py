"""History: whatever mix of new messages and whole arrays a client sends, the store holds the conversation it sees."""

import asyncio
import json
import uuid
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.relay.calls import Chat, Json, assistant, error_of, user
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
    assert await chat.history() == flat([user("u1"), assistant("a1"), user("u2"), assistant("a2")])
    assert [entry["json"]["messages"][0] for entry in upstream.requests("/v1/messages")] == [
        *(user("u1"), user("Make a title"), user("u1"), user("Make a title"), user("A task")),
    ]
    aside = Chat(chat.http, chat.sessions, side)
    assert await aside.history() == flat([user("Make a title"), assistant("title"), user("another"), assistant("a3")])


# ── sessions that have ended ────────────────────────────────────────────────────────────────────


async def test_a_closed_session_begins_anew_with_a_whole_array(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1")
    await chat.http.post(f"/sessions/{chat.session_id}/close")
    upstream.script({"text": "a2"})
    await chat.say(*array, "u2")
    assert await chat.history() == [*flat(array), ("user", "u2"), ("assistant", "a2")]
    assert [each["seq"] for each in await chat.stored()] == [3, 4, 5, 6]


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
    queue = (await chat.http.get("/queue/health")).json()
    assert queue["in_flight"] == 1
    assert queue["queued"] >= 1
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

_texts = st.sampled_from(["one", "two ", "drei", "四"])
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("new"), _texts),
        st.tuples(st.just("all"), _texts),
        st.tuples(st.just("again"), st.integers(1, 6)),
        st.tuples(st.just("edit"), st.integers(0, 6), _texts),
        st.tuples(st.just("prefill"), _texts),
        st.tuples(st.just("refused"), _texts),
        st.tuples(st.just("fail"), _texts),
    ),
    min_size=1,
    max_size=7,
)


@given(steps=_steps)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_mix_of_requests(chat: Chat, upstream: TestUpstream, steps: list[tuple[Any, ...]]) -> None:
    """What is stored is the conversation as the client sees it, and upstream got valid requests only."""
    mine = Chat(chat.http, chat.sessions, f"mix-{uuid.uuid4().hex}")
    upstream.reset()
    seen: list[Json] = []
    for number, step in enumerate(steps):
        seen = await _take(mine, upstream, seen, step, f"answer {number}")
        assert await mine.history() == flat(seen), steps
    for entry in upstream.requests("/v1/messages"):
        assert rules.problem(entry["json"]) is None
    totals = (await chat.sessions.get(mine.path, params={"user_id": "dev"})).json()
    assert totals["message_count"] == len(seen)


async def _take(chat: Chat, upstream: TestUpstream, seen: list[Json], step: tuple[Any, ...], text: str) -> list[Json]:
    """Does the step, and gives the conversation as the client sees it then."""
    kind, *rest = step
    if kind == "new":
        upstream.script({"text": text})
        await chat.say(rest[0])
        return [*seen, user(rest[0]), assistant(text)]
    asked = [*seen, user(rest[-1])]
    if kind == "again":
        ends = [place for place, message in enumerate(seen) if message["role"] == "user"]
        asked = seen[: ends[-min(rest[0], len(ends))] + 1] if ends else [user("first")]
    elif kind == "edit":
        kept = rest[0] - rest[0] % 2
        asked = [*seen[:kept], user(rest[1])]
    if kind in {"again", "edit", "fail", "refused"} and not any(each["role"] == "assistant" for each in asked):
        asked = [user("q"), assistant("a"), *asked]  # else it would count as new
    if kind == "refused":
        upstream.script({"status": 400})
        answer = await chat.ask(*asked)
        assert answer.status_code == 400
        return _before_refusal(seen, asked)
    if kind == "fail":
        upstream.script({"status": 503})
        assert (await chat.ask(*asked)).status_code == 529
        return asked
    if kind == "prefill":
        upstream.script({"text": " more"})
        await chat.say(*asked, assistant(text))
        return [*asked, assistant(f"{text} more")]
    if kind == "all" and not seen:
        asked = [user("q"), assistant("a"), *asked]
    upstream.script({"text": text})
    await chat.say(*asked)
    return [*asked, assistant(text)]


def _before_refusal(seen: list[Json], asked: list[Json]) -> list[Json]:
    """A refused turn's own messages are taken back; what it rewound stays rewound."""
    same = 0
    while same < min(len(seen), len(asked)) and seen[same] == asked[same]:
        same += 1
    return asked[:same]
