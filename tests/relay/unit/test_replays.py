"""Answers given again: from the store without the prefill, as a stream that is the same message."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import anthropic
import pytest
import pytest_asyncio
from hypothesis import example, given
from hypothesis import strategies as st

from services.relay.answers import Answer, completion
from services.relay.idempotency import Earlier
from services.relay.replays import earlier_answer, message_of_turn, rewind_for, stream_of
from services.relay.sse import format_event
from services.relay.upstream import encode_body
from shared import wire
from shared.discovery import Instances
from shared.errors import IdempotencyInProgress
from shared.session_client import SessionClient, SessionKey
from tests.processes import ServiceProcess
from tests.relay.unit.test_assembly import MESSAGE_START, STOP, assembled, blocks, delta, json_values, start
from tests.relay.unit.test_assembly import message as upstream_message
from tests.shared.servers import answer, serving

Json = dict[str, Any]


def text(content: str) -> Json:
    return {"type": "text", "text": content}


CALL: Json = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"n": 10**30, "é": [None, 0.1]}}
THOUGHT: Json = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
USAGE: Json = {"input_tokens": 3, "output_tokens": 5, "cache_read_input_tokens": 2, "service_tier": "standard"}


def message_with(*content: Json, **fields: Any) -> Json:
    ends = {"stop_reason": "end_turn", "stop_sequence": None, "usage": USAGE}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "test-model"}
    return {**head, "content": list(content), **ends, **fields}


# ── as a stream ─────────────────────────────────────────────────────────────────────────────────


def check_stream_of(message: Json) -> list[bytes]:
    """The events, each whole in its bytes; assembled they are the message."""
    written = encode_body(message)
    events = list(stream_of(written))
    assembly = assembled(*events)
    assert assembly.finished
    assert assembly.error is None
    assert assembly.message() == json.loads(written)
    assert all(event.endswith(b"\n\n") and event.count(b"\n\n") == 1 for event in events)
    return events


extra_fields = st.dictionaries(st.sampled_from(["container", "stop_details", "x"]), json_values)
citations: st.SearchStrategy[list[Any] | None] = st.none() | st.lists(json_values, max_size=2)
odd_blocks = st.one_of(
    st.builds(lambda c: {"type": "text", "text": "t", "citations": c}, citations),
    st.just({"type": "text", "text": None}),
    st.just({"type": "thinking", "thinking": "no signature"}),
    st.just({"type": "thinking", "thinking": "", "signature": ""}),
    st.just({"type": "tool_use", "id": "toolu_1", "name": "f"}),
    st.just({"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}, "caller": {"type": "direct"}}),
    st.just({"type": "mcp_tool_use", "id": "mcptoolu_1", "name": "f", "server_name": "s", "input": {"a": 1}}),
)


@given(
    st.lists(blocks | odd_blocks, max_size=5),
    extra_fields,
    st.sampled_from(["end_turn", "max_tokens", "stop_sequence", None]),
    st.sampled_from([None, "STOP"]),
    st.none() | st.just(USAGE) | st.dictionaries(st.sampled_from(list(USAGE)), json_values),
)
def test_the_stream_of_a_message_is_the_message(
    content: list[Json], fields: Json, stop_reason: str | None, stop_sequence: str | None, usage: Json | None
) -> None:
    check_stream_of(message_with(*content, stop_reason=stop_reason, stop_sequence=stop_sequence, usage=usage, **fields))


@given(st.lists(blocks, max_size=5))
def test_the_stream_of_an_upstreams_message(content: list[Json]) -> None:
    check_stream_of(upstream_message(content))


@pytest.mark.parametrize("gone", ["usage", "stop_reason", "stop_sequence", "id", "model"])
def test_what_a_message_lacks_is_not_made_up(gone: str) -> None:
    message = message_with(text("a"))
    del message[gone]
    check_stream_of(message)


@given(st.text(max_size=8).map(lambda tail: '{"a":"' + tail.replace('"', "")))
def test_a_tool_input_that_broke_off(came: str) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
    whole = assembled(MESSAGE_START, start(0, call), delta(0, "input_json_delta", partial_json=came), STOP).message()
    assert whole["content"][0]["incomplete"]
    events = check_stream_of(whole)
    assert b"incomplete" not in b"".join(events)


def test_the_events_are_claudes() -> None:
    citation = {"type": "char_location", "cited_text": "x"}
    cited = {**text("b"), "citations": [citation]}
    result = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
    call = {**CALL, "input": {"a": 1}}
    message = message_with(THOUGHT, text("a"), cited, call, result, stop_reason="tool_use")
    told = [json.loads(event.split(b"data: ", 1)[1]) for event in check_stream_of(message)]
    opened = {**message, "content": [], "stop_reason": None}

    def block(index: int, first: Json, *deltas: Json) -> list[Json]:
        return [
            {"type": "content_block_start", "index": index, "content_block": first},
            *({"type": "content_block_delta", "index": index, "delta": each} for each in deltas),
            {"type": "content_block_stop", "index": index},
        ]

    assert told == [
        {"type": "message_start", "message": opened},
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "hm"},
            {"type": "signature_delta", "signature": "c2ln"},
        ),
        *block(1, text(""), {"type": "text_delta", "text": "a"}),
        *block(
            2,
            {**text(""), "citations": []},
            {"type": "text_delta", "text": "b"},
            {"type": "citations_delta", "citation": citation},
        ),
        *block(3, {**call, "input": {}}, {"type": "input_json_delta", "partial_json": '{"a":1}'}),
        *block(4, result),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": USAGE},
        {"type": "message_stop"},
    ]
    names = [event.split(b"\n", 1)[0].decode() for event in stream_of(encode_body(message))]
    assert names == [f"event: {each['type']}" for each in told]


async def test_the_official_client_reads_it() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "no"}
    content = [THOUGHT, text("héllo"), {**CALL, "input": {"a": [1]}}]
    message = message_with(*content, stop_reason="refusal", stop_details=details)
    told = answer(200, b"".join(stream_of(encode_body(message))), "text/event-stream")
    async with (
        serving(told) as server,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="k") as client,
        client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "q"}]) as stream,
    ):
        read = await stream.get_final_message()
    assert read.model_dump(mode="json", exclude_unset=True, warnings=False) == message


# ── from the store ──────────────────────────────────────────────────────────────────────────────


def kept(message: Json, prefill: list[Json]) -> tuple[wire.Turn, wire.Message | None]:
    """The turn and the message as the store keeps them of an answer."""
    told = completion(Answer("completed", message), lease_token="", prefill=prefill, body={"messages": []})
    own: Json = dict.fromkeys(wire.Turn.model_fields) | {"turn_id": "0199-ab", "status": "completed"}
    fields = ("stop_reason", "model", "usage")
    turn = wire.Turn.model_construct(**own | {name: getattr(told, name) for name in fields})
    return turn, stored_message(told.messages[0].content) if told.messages else None


def stored_message(content: str | list[Json]) -> wire.Message:
    blocks = None if isinstance(content, str) else content
    told: Json = {"content": content if isinstance(content, str) else "", "content_blocks": blocks}
    own: Json = dict.fromkeys(wire.Message.model_fields)
    return wire.Message.model_construct(**own | told)


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
stored_blocks = st.one_of(
    st.builds(text, plain_text),
    st.just({**text("cited"), "citations": [{"type": "char_location"}]}),
    st.just(THOUGHT),
    st.just(CALL),
)


@given(st.lists(stored_blocks, max_size=4), st.lists(stored_blocks, max_size=3))
@example([text("b")], [text("a")])
@example([text("")], [text("a")])
@example([CALL], [text("a")])
@example([], [text("a")])
@example([], [])
@example([text("a"), text("a")], [text("a"), text("a")])
def test_an_answer_from_the_store_is_what_upstream_added(content: list[Json], prefill: list[Json]) -> None:
    turn, stored = kept(message_with(*content), prefill)
    message = json.loads(message_of_turn(turn, stored, prefill))
    if prefill and content and content[0] == text("") and prefill[-1].keys() == text("").keys():
        content = content[1:]  # joined to the prefill, nothing tells it from none
    assert message == {**message_with(*content), "id": "msg_0199ab"}
    assert list(message) == list(message_with())


def test_a_stored_text_is_a_block_of_text() -> None:
    turn, _ = kept(message_with(text("x")), [])
    assert json.loads(message_of_turn(turn, stored_message("x"), []))["content"] == [text("x")]


@pytest.mark.parametrize(
    "prefill",
    [[text("b")], [text("abc")], [CALL], [text("a"), CALL], [text("a"), text("b")], [{"type": "text", "text": None}]],
)
def test_a_prefill_that_is_not_there_is_not_taken_off(prefill: list[Json]) -> None:
    turn, stored = kept(message_with(text("ab")), [])
    assert json.loads(message_of_turn(turn, stored, prefill))["content"] == [text("ab")]


def test_a_prefill_is_found_in_the_form_in_which_it_is_stored() -> None:
    prefill = [text("a\0"), {**CALL, "input": {"n": 1}}, text("b\ud800c")]
    turn, stored = kept(message_with(text("d\0")), prefill)
    assert json.loads(message_of_turn(turn, stored, prefill))["content"] == [text("d\ufffd")]


# ── the turn of an earlier try ──────────────────────────────────────────────────────────────────


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def store(session_service: ServiceProcess) -> AsyncIterator[SessionClient]:
    client = SessionClient(Instances([session_service.url]), timeout_seconds=10)
    yield client
    await client.close()


class Conversation:
    """A session of a user of its own, and the turns in it."""

    def __init__(self, store: SessionClient, user_id: str) -> None:
        self.store = store
        self.user_id = user_id
        self.key = SessionKey(user_id, "s")

    async def open(self, *texts: str, **fields: Any) -> wire.TurnOpened:
        messages = [wire.NewMessage(role="user", content=each) for each in texts]
        request = wire.OpenTurn(messages=messages, create_session=wire.CreateSessionInTurn(), **fields)
        return await self.store.open_turn(self.key, request)

    async def end(self, opened: wire.TurnOpened, status: wire.Outcome, *content: Json, **fields: Any) -> None:
        message = message_with(*content) if content else None
        prefill: list[Json] = fields.get("prefill", [])
        told = completion(
            Answer(status, message), lease_token=opened.lease_token, prefill=prefill, body={"messages": []}
        )
        await self.store.complete_turn(self.key, opened.turn_id, told)

    async def ask(self, status: wire.Outcome, *content: Json, **fields: Any) -> Earlier:
        """A turn from its opening to its end."""
        opened = await self.open("q")
        await self.end(opened, status, *content, **fields)
        return self.earlier(opened)

    def earlier(self, opened: wire.TurnOpened) -> Earlier:
        return Earlier("s", opened.turn_id)

    async def answer(self, earlier: Earlier, prefill: list[Json] | None = None) -> Json | None:
        found = await earlier_answer(self.store, self.user_id, earlier, prefill=prefill or [])
        return None if found is None else json.loads(found)

    async def rewind(self, earlier: Earlier) -> int | None:
        return await rewind_for(self.store, self.user_id, earlier)

    async def again(self, earlier: Earlier) -> list[tuple[str, str]]:
        """What is visible once the earlier try's place is taken."""
        opened = await self.open("q", rewind_to_seq=await self.rewind(earlier))
        await self.end(opened, "completed", text("new"))
        return [(each.role, each.content) for each in (await self.store.list_messages(self.key)).messages]


@pytest.fixture
def talk(store: SessionClient, user_id: str) -> Conversation:
    return Conversation(store, user_id)


async def test_a_completed_turn_is_the_answer(talk: Conversation) -> None:
    await talk.ask("completed", text("first"))
    content = [THOUGHT, text("a"), {**CALL, "input": {"n": 10**30, "é": [None, 0.1]}}]
    earlier = await talk.ask("completed", *content)
    expected = {**message_with(*content), "id": f"msg_{earlier.turn_id.replace('-', '')}"}
    assert await talk.answer(earlier) == expected
    with pytest.raises(IdempotencyInProgress):
        await talk.rewind(earlier)
    # It stays the answer whatever becomes of the conversation.
    await talk.ask("completed", text("later"))
    await talk.end(await talk.open("edited", rewind_to_seq=0), "completed", text("z"))
    assert await talk.answer(earlier) == expected
    await talk.store.end_session(talk.key)
    assert await talk.answer(earlier) == expected


async def test_a_completed_turn_with_a_prefill(talk: Conversation) -> None:
    prefill = [text("{")]
    earlier = await talk.ask("completed", text("}"), prefill=prefill)
    assert (await talk.store.list_messages(talk.key)).messages[-1].content == "{}"
    found = await talk.answer(earlier, prefill)
    assert found is not None
    assert found["content"] == [text("}")]


async def test_a_completed_turn_without_a_message(talk: Conversation) -> None:
    opened = await talk.open("q")
    told = completion(Answer("completed", message_with()), lease_token=opened.lease_token, prefill=[], body={})
    await talk.store.complete_turn(talk.key, opened.turn_id, told)
    found = await talk.answer(talk.earlier(opened))
    assert found is not None
    assert found["content"] == []


@pytest.mark.parametrize(
    ("status", "content"),
    [("failed", []), ("refused", []), ("interrupted", []), ("interrupted", [text("par")])],
)
async def test_an_unanswered_turn_makes_room(talk: Conversation, status: wire.Outcome, content: list[Json]) -> None:
    await talk.ask("completed", text("before"))
    earlier = await talk.ask(status, *content)
    assert await talk.answer(earlier) is None
    assert await talk.rewind(earlier) == (None if status == "refused" else 2)
    assert await talk.again(earlier) == [("user", "q"), ("assistant", "before"), ("user", "q"), ("assistant", "new")]


async def test_a_turn_with_several_messages_makes_room(talk: Conversation) -> None:
    opened = await talk.open("a", "b", "c")
    await talk.end(opened, "interrupted", text("par"))
    assert await talk.rewind(talk.earlier(opened)) == 0
    assert await talk.again(talk.earlier(opened)) == [("user", "q"), ("assistant", "new")]


async def test_a_turn_without_messages_of_its_own(talk: Conversation) -> None:
    asked = await talk.ask("failed")
    opened = await talk.open(context=None)
    assert opened.messages == []
    await talk.end(opened, "interrupted", text("par"))
    assert await talk.answer(talk.earlier(opened)) is None
    assert await talk.rewind(talk.earlier(opened)) == 1
    assert await talk.rewind(asked) is None  # the partial answer after it is another turn's
    other = await talk.open(rewind_to_seq=1)
    await talk.end(other, "failed")
    assert await talk.rewind(talk.earlier(other)) is None


async def append(talk: Conversation) -> None:
    await talk.store.open_turn(
        talk.key, wire.OpenTurn(messages=[wire.NewMessage(role="user", content="other")], lease_seconds=5)
    )


async def complete(talk: Conversation) -> None:
    await talk.ask("completed", text("another's"))


@pytest.mark.parametrize("write", [append, complete])
@pytest.mark.parametrize("content", [[], [text("par")]])
async def test_what_was_written_since_stays(
    talk: Conversation, write: Callable[[Conversation], Any], content: list[Json]
) -> None:
    earlier = await talk.ask("interrupted", *content)
    assert await talk.rewind(earlier) == 0
    await write(talk)
    assert await talk.answer(earlier) is None
    assert await talk.rewind(earlier) is None


async def test_what_was_taken_back_meanwhile_is_no_hindrance(talk: Conversation) -> None:
    earlier = await talk.ask("failed")
    await talk.end(await talk.open("other"), "refused")
    assert await talk.rewind(earlier) == 0
    assert await talk.again(earlier) == [("user", "q"), ("assistant", "new")]


async def test_a_session_that_began_anew(talk: Conversation) -> None:
    earlier = await talk.ask("failed")
    await talk.store.end_session(talk.key)
    await talk.store.create_session(wire.CreateSession(user_id=talk.user_id, session_id="s", if_exists="restart"))
    await talk.ask("completed", text("of the new one"))
    assert await talk.answer(earlier) is None
    assert await talk.rewind(earlier) is None


async def test_a_turn_that_nobody_knows(talk: Conversation) -> None:
    unknown = Earlier("s", "0199e0c0-0000-7000-8000-000000000000")
    for _ in range(2):  # without a session, then with one
        assert await talk.answer(unknown) is None
        assert await talk.rewind(unknown) is None
        earlier = await talk.ask("completed", text("a"))
    other = Conversation(talk.store, "somebody-else")
    assert await other.answer(earlier) is None


async def test_an_open_turn_is_waited_for_until_its_lease_is_over(talk: Conversation) -> None:
    opened = await talk.open("q", lease_seconds=5)
    for look in (talk.answer, talk.rewind):
        with pytest.raises(IdempotencyInProgress) as raised:
            await look(talk.earlier(opened))
        assert 1 <= int(raised.value.headers()["retry-after"]) <= 5
    left_seconds = (opened.lease_expires_at - datetime.now(UTC)).total_seconds()
    await asyncio.sleep(left_seconds + 0.2)
    assert await talk.answer(talk.earlier(opened)) is None
    assert await talk.rewind(talk.earlier(opened)) == 0
    assert await talk.again(talk.earlier(opened)) == [("user", "q"), ("assistant", "new")]
    assert (await talk.store.get_turn(talk.key, opened.turn_id)).status == "expired"
    assert await talk.answer(talk.earlier(opened)) is None
    assert await talk.rewind(talk.earlier(opened)) is None


def test_an_event_is_one_line_of_data() -> None:
    assert next(stream_of(encode_body(message_with()))) == format_event(
        "message_start", {"type": "message_start", "message": message_with(stop_reason=None)}
    )
