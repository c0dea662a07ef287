"""X-Session-Conflict: fork. An array that departs from what is stored goes on in a session of its own."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.relay import history
from services.relay.arrays import Array
from services.relay.request import ClaudeRequest
from services.relay.session_ids import Choice
from services.relay.settings import RelaySettings
from shared import wire
from shared.discovery import Instances
from shared.session_client import SessionClient, SessionKey
from tests.processes import ServiceProcess
from tests.relay.calls import MODEL, Chat, Json, assistant, error_of, streamed_text, user
from tests.relay.test_history import begin, flat
from tests.session_service.calls import UUID7
from tests.upstream import rules
from tests.upstream.client import TestUpstream

FORK = {"x-session-conflict": "fork"}


async def session_of(chat: Chat) -> Json:
    answer = await chat.sessions.get(chat.path, params={"user_id": "dev"})
    assert answer.status_code == 200
    session: Json = answer.json()
    return session


async def state_of(chat: Chat) -> tuple[Json, list[Json], list[Json]]:
    """All there is to see of a session."""
    return await session_of(chat), await chat.stored(include_superseded=True), await chat.turns()


async def forked(chat: Chat, *array: Json, **fields: Any) -> Chat:
    """The fork that this array was answered in."""
    answer = await chat.ask(*array, headers=FORK, **fields)
    assert answer.status_code == 200, answer.text
    fork = Chat(chat.http, chat.sessions, answer.headers["x-session-id"])
    assert UUID7.fullmatch(fork.session_id)
    assert fork.session_id != chat.session_id
    assert [each["turn_id"] for each in await fork.turns()] == [answer.headers["x-turn-id"]]
    return fork


async def forks_of(chat: Chat) -> list[str]:
    """The ids of the sessions that were forked from this one."""
    listed = await chat.sessions.get("/sessions", params={"user_id": "dev", "page_size": 100})
    return [each["session_id"] for each in listed.json()["sessions"] if _parent_of(each) == chat.session_id]


def _parent_of(session: Json) -> str | None:
    return session["parent"] and str(session["parent"]["session_id"])


async def test_a_departure_goes_on_in_a_fork(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1", "a2", "a3")
    before = await state_of(chat)
    upstream.script({"text": "a2'"}, {"text": "a4"})
    edited = [*array[:2], user("u2'")]
    fork = await forked(chat, *edited)
    assert await fork.history() == [*flat(edited), ("assistant", "a2'")]
    assert [each["seq"] for each in await fork.stored(include_superseded=True)] == [1, 2, 3, 4]
    assert upstream.requests("/v1/messages")[0]["json"]["messages"] == edited
    assert await state_of(chat) == before
    session = await session_of(fork)
    assert session["parent"] == {"session_id": chat.session_id, "seq": 2}
    assert session["idle_timeout_seconds"] == before[0]["idle_timeout_seconds"] == 1800
    assert session["expires_at"] is not None
    # What was spent in the original is not spent again; the answer is.
    assert [each["tokens_used"] > 0 for each in await fork.stored()] == [False, False, False, True]
    # Each goes its own way.
    assert await chat.say(*array, "u4") == "a4"
    assert await fork.say("u3'")
    assert await chat.history() == [*flat(array), ("user", "u4"), ("assistant", "a4")]
    assert (await fork.history())[:5] == [*flat(edited), ("assistant", "a2'"), ("user", "u3'")]


async def test_a_departure_at_the_first_message(chat: Chat, upstream: TestUpstream) -> None:
    await begin(chat, upstream, "a1")
    before = await state_of(chat)
    upstream.script({"text": "b2"})
    edited = [user("v1"), assistant("b1"), user("v2")]
    fork = await forked(chat, *edited)
    assert await fork.history() == [*flat(edited), ("assistant", "b2")]
    assert (await session_of(fork))["parent"] == {"session_id": chat.session_id, "seq": 0}
    assert await state_of(chat) == before


async def test_a_stream(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    upstream.script({"text": "streamed"})
    body = chat.body(*array[:2], "other", stream=True)
    async with chat.http.stream("POST", "/v1/messages", json=body, headers=FORK) as answer:
        fork = Chat(chat.http, chat.sessions, answer.headers["x-session-id"])
        assert streamed_text(await answer.aread()) == "streamed"
    assert await fork.history() == [*flat(array[:2]), ("user", "other"), ("assistant", "streamed")]
    assert await chat.history() == flat(array)


async def test_what_is_no_departure_stays_in_the_session(chat: Chat, upstream: TestUpstream) -> None:
    upstream.script({"text": "a1"}, {"text": "a2"}, {"text": "better"}, {"text": " and more"}, {"text": "a3"})
    asked = [[user("u1")], [user("u1"), assistant("a1"), user("u2")]]
    asked += [asked[1]]  # the last answer once more
    asked += [[*asked[1], assistant("So")]]  # with a beginning of it given
    asked += [[*asked[1], assistant("So and more"), user("u3")]]
    for array in asked:
        answer = await chat.ask(*array, headers=FORK)
        assert (answer.status_code, answer.headers["x-session-id"]) == (200, chat.session_id)
    assert await chat.history() == [*flat(asked[-1]), ("assistant", "a3")]
    assert (await chat.ask("u4", headers=FORK)).headers["x-session-id"] == chat.session_id
    assert await forks_of(chat) == []


async def test_the_rest_of_the_array_goes_along(chat: Chat, upstream: TestUpstream) -> None:
    """Messages of several roles, a prefill, other forms of the same: what a rewind takes, a fork does."""
    array = await begin(chat, upstream, "a1", "a2")
    call = {"type": "tool_use", "id": "t1", "name": "clock", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "noon"}
    upstream.script({"text": " is noon"})
    edited = [
        user([{"type": "text", "text": "u1", "cache_control": {"type": "ephemeral"}}]),
        *(array[1], user("time?"), assistant([call]), user([result])),
    ]
    fork = await forked(chat, *edited, assistant("It"), tools=[{"name": "clock", "input_schema": {"type": "object"}}])
    assert upstream.requests("/v1/messages")[0]["json"]["messages"] == [*edited, assistant("It")]
    stored = await fork.stored()
    assert [each["content"] for each in stored[:3]] == ["u1", "a1", "time?"]
    assert [each["content_blocks"] for each in stored[3:5]] == [[call], [result]]
    assert stored[5]["content"] == "It is noon"
    # The answer of the fork is in its history: sent again, it is known.
    again = [*edited, assistant("It is noon"), user("thanks")]
    answer = await fork.ask(*again, tools=[{"name": "clock", "input_schema": {"type": "object"}}], headers=FORK)
    assert answer.headers["x-session-id"] == fork.session_id
    assert len(await fork.stored()) == 8


async def test_system_messages_do_not_count_as_a_departure(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1")
    kept = {"role": "system", "content": "Speak German"}
    await chat.sessions.post(f"{chat.path}/messages", params={"user_id": "dev"}, json=kept)
    answer = await chat.ask(*array, "u2", headers=FORK)
    assert answer.headers["x-session-id"] == chat.session_id


async def test_odd_values_of_the_header(chat: Chat, upstream: TestUpstream) -> None:
    for odd in ("what", "", "Fork", "fork, fork"):
        message = error_of(await chat.ask("u1", headers={"x-session-conflict": odd}), 400, "invalid_request_error")
        assert message == "X-Session-Conflict: must be rewind, fork or reject"
    assert upstream.requests() == []


async def test_an_array_that_cannot_be_stored_leaves_no_fork(chat: Chat, upstream: TestUpstream) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    answer = await chat.ask(*array[:2], " ", headers=FORK)
    assert "messages.2.content" in error_of(answer, 400, "invalid_request_error")
    assert await forks_of(chat) == []
    assert upstream.requests() == []


@pytest.mark.parametrize("status", ["ended", "completed"])
async def test_a_session_that_is_over_stays_over(chat: Chat, upstream: TestUpstream, status: str) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    await chat.sessions.put(chat.path, params={"user_id": "dev"}, json={"status": status})
    before = await state_of(chat)
    fork = await forked(chat, *array[:2], user("other"))
    assert (await fork.history())[:3] == [*flat(array[:2]), ("user", "other")]
    assert (await session_of(fork))["status"] == "active"
    assert await state_of(chat) == before


async def test_a_refused_turn_of_a_fork(chat: Chat, upstream: TestUpstream) -> None:
    """The answer names the fork, which holds what agreed."""
    array = await begin(chat, upstream, "a1", "a2")
    upstream.script({"status": 400})
    answer = await chat.ask(*array[:2], "other", headers=FORK)
    assert answer.status_code == 400
    fork = Chat(chat.http, chat.sessions, answer.headers["x-session-id"])
    assert await forks_of(chat) == [fork.session_id]
    assert await fork.history() == flat(array[:2])
    assert await chat.history() == flat(array)


async def test_ids_that_clients_send_of_their_own_accord(chat: Chat, upstream: TestUpstream) -> None:
    async def ask(*messages: Json, **more: str) -> Chat:
        body = {"model": MODEL, "max_tokens": 10, "messages": list(messages)}
        headers = {"x-claude-code-session-id": chat.session_id, **FORK, **more}
        answer = await chat.http.post("/v1/messages", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return Chat(chat.http, chat.sessions, answer.headers["x-session-id"])

    upstream.script({"text": "a1"}, {"text": "a2"}, {"text": "title"}, {"text": "a2'"}, {"text": "t1"}, {"text": "t2"})
    first, second = [user("u1")], [user("u1"), assistant("a1"), user("u2")]
    assert (await ask(*first)).session_id == (await ask(*second)).session_id == chat.session_id
    # A side conversation of the client is none of a fork's business.
    assert (await ask(user("Make a title"))).session_id.startswith(f"{chat.session_id}~")
    fork = await ask(*second[:2], user("u2'"))
    assert UUID7.fullmatch(fork.session_id)
    assert await fork.history() == flat([*second[:2], user("u2'"), assistant("a2'")])
    assert await chat.history() == flat([*second, assistant("a2")])
    agent = await ask(user("A task"), **{"x-claude-code-agent-id": "agent7"})
    other = await ask(user("Another"), **{"x-claude-code-agent-id": "agent7"})
    assert agent.session_id == f"{chat.session_id}~agent7"
    assert (await session_of(other))["parent"] == {"session_id": agent.session_id, "seq": 0}
    assert await other.history() == flat([user("Another"), assistant("t2")])


async def test_an_expired_session_is_forked_as_it_was(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    relay = make_relay(RELAY_SESSION_IDLE_SECONDS="2")
    chat: Chat = await chat_at(relay)
    array = await begin(chat, upstream, "a1", "a2")
    await asyncio.sleep(2.2)
    fork = await forked(chat, *array[:2], user("other"))
    assert (await session_of(fork))["idle_timeout_seconds"] == 2
    assert (await session_of(chat))["ended_reason"] == "expired"
    assert await chat.history() == flat(array)


# ── at once ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_turn_that_is_open_elsewhere_neither_stops_a_fork_nor_is_stopped(
    chat: Chat, chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    array = await begin(chat, upstream, "a1", "a2")
    elsewhere: Chat = await chat_at(make_relay(), session_id=chat.session_id)
    upstream.script({"text": "slow", "delay_ms": 3_000, "match": {"contains": "u3"}}, {"text": "quick"})
    running = asyncio.create_task(elsewhere.say(*array, "u3"))
    await upstream.until(lambda state: state["running"] == 1)
    fork = await forked(chat, *array[:2], user("other"))
    assert not running.done()
    assert await fork.history() == [*flat(array[:2]), ("user", "other"), ("assistant", "quick")]
    assert await running == "slow"
    assert await chat.history() == [*flat(array), ("user", "u3"), ("assistant", "slow")]


async def test_forks_beside_a_session_that_goes_on(
    chat: Chat, chat_at: Any, make_relay: Any, upstream: TestUpstream
) -> None:
    array = await begin(chat, upstream, "a1", "a2", "a3")
    other: Chat = await chat_at(make_relay(), session_id=chat.session_id)
    edits = [(each, [*array[: 2 * (place % 3)], *_new(place)]) for place in range(6) for each in (chat, other)]
    said = [f"new {place}" for place in range(6)]
    results = await asyncio.gather(
        *(forked(each, *edited) for each, edited in edits),
        *(each.say(text) for each, text in zip((chat, other) * 3, said, strict=True)),
    )
    for (_, edited), fork in zip(edits, results[: len(edits)], strict=True):
        assert isinstance(fork, Chat)
        assert (await fork.history())[:-1] == flat(edited)
    after = await chat.history()
    assert after[:6] == flat(array)
    assert sorted(content for role, content in after[6:] if role == "user") == said
    assert len({*await forks_of(chat)}) == len(edits)


def _new(place: int) -> list[Json]:
    """The end of an array that was edited; with an answer in it, so that it does not count as new messages."""
    return [user(f"q{place}"), assistant(f"r{place}"), user(f"edit {place}")]


@pytest_asyncio.fixture(loop_scope="session")
async def meddled(session_service: ServiceProcess) -> AsyncIterator["Meddled"]:
    client = Meddled(session_service.url)
    yield client
    await client.close()


class Meddled(SessionClient):
    """The store, where somebody rewinds the session just before it is forked."""

    def __init__(self, url: str) -> None:
        super().__init__(Instances([url]))
        self._url = url
        self.to_seq = 0

    async def fork_session(self, key: SessionKey, wanted: wire.Fork) -> wire.Session:
        async with httpx.AsyncClient(base_url=self._url, trust_env=False) as http:
            params = {"user_id": key.user_id}
            rewound = await http.post(f"{key.path}/rewind", params=params, json={"to_seq": self.to_seq})
            rewound.raise_for_status()
        return await super().fork_session(key, wanted)


@pytest.mark.parametrize("to_seq", [0, 1, 2, 3, 4, 5])
async def test_a_session_that_is_rewound_before_it_is_forked(
    meddled: Meddled, user_id: str, tmp_path: Path, to_seq: int
) -> None:
    """The fork is of what was lined up, wherever the session is by then."""
    key = SessionKey(user_id, "original")
    stored = [user("u1"), assistant("a1"), user("u2"), assistant("a2"), user("u3"), assistant("a3")]
    new = wire.OpenTurn(
        messages=[wire.NewMessage.model_validate(each) for each in stored], create_session=wire.CreateSessionInTurn()
    )
    opened = await meddled.open_turn(key, new)
    await meddled.complete_turn(
        key, opened.turn_id, wire.CompleteTurn(lease_token=opened.lease_token, status="completed")
    )
    meddled.to_seq = to_seq
    asked = [*stored[:4], user("other")]
    wishes = history.Wishes.of(FORK, RelaySettings(environment="test", data_dir=tmp_path))
    array = Array.of(ClaudeRequest({"messages": asked}, None))
    opening = history.Opening(key, Choice("original", "named"), array, wishes)
    forked_turn = await history.open_turn(meddled, opening, wait_seconds=1)
    assert forked_turn.key != key
    listed = await meddled.list_messages(forked_turn.key)
    assert [(each.role, each.content) for each in listed.messages] == flat(asked)
    assert forked_turn.turn.session.message_count == len(asked)
    assert (await meddled.get_session(key)).message_count == to_seq


# ── any mix ─────────────────────────────────────────────────────────────────────────────────────

_texts = st.sampled_from(["one", "two", "drei", "四"])
_steps = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["new", "edit", "prefill", "refused"]), st.integers(0, 8), _texts),
    min_size=1,
    max_size=8,
)


@given(steps=_steps)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_mix_of_edits(chat: Chat, upstream: TestUpstream, steps: list[tuple[int, str, int, str]]) -> None:
    """Every session holds the conversation as its client sees it, and upstream got the clients' own arrays."""
    upstream.reset()
    first = Chat(chat.http, chat.sessions, f"forks-{uuid.uuid4().hex}")
    seen: list[tuple[Chat, list[Json]]] = [(first, [])]
    for number, (place, kind, kept, text) in enumerate(steps):
        mine, array = seen[place % len(seen)]
        asked = _asked(array, kind, kept, text)
        is_fork = _departs(asked, array)
        upstream.script({"status": 400} if kind == "refused" else {"text": f"answer {number}"})
        prefill = [assistant("So")] if kind == "prefill" else []
        answer = await mine.ask(*asked, *prefill, headers=FORK)
        assert answer.status_code == (400 if kind == "refused" else 200), steps
        now = Chat(chat.http, chat.sessions, answer.headers["x-session-id"])
        assert (now.session_id != mine.session_id) is is_fork, steps
        assert upstream.requests("/v1/messages")[-1]["json"]["messages"] == [*asked, *prefill]
        after = [*asked, assistant(f"{'So' if prefill else ''}answer {number}")]
        if kind == "refused":
            after = asked[: _same(asked, array)]
        seen = [(now, after), *(each for each in seen if each[0].session_id != now.session_id)]
        for each, expected in seen:
            assert await each.history() == flat(expected), steps
            assert (await session_of(each))["message_count"] == len(expected)
    for entry in upstream.requests("/v1/messages"):
        assert rules.problem(entry["json"]) is None


def _asked(array: list[Json], kind: str, kept: int, text: str) -> list[Json]:
    """A whole array: what is stored and a new message, or as much of it as is kept when a message is edited."""
    kept = len(array) if kind == "new" else min(kept - kept % 2, len(array))
    # Without an answer in it, the array would count as new messages.
    return [*(array[:kept] or [user("q"), assistant("a")]), user(text)]


def _same(asked: list[Json], array: list[Json]) -> int:
    same = 0
    while same < min(len(asked), len(array)) and asked[same] == array[same]:
        same += 1
    return same


def _departs(asked: list[Json], array: list[Json]) -> bool:
    return _same(asked, array) < min(len(asked), len(array))
