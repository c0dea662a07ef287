"""The assembly: a streamed message is the plain one, and a broken stream is told from a whole one."""

import copy
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.relay.assembly import STORABLE_DEPTH, Assembly, MalformedEvent, storable
from services.relay.sse import Event, Splitter, format_event
from services.relay.upstream import AnswerTooLarge
from tests.upstream import answers
from tests.upstream.script import Step

text = st.text(st.characters(exclude_categories=()), max_size=40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
inputs = st.dictionaries(text, json_values, max_size=4)
blocks = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, text),
    st.builds(
        lambda t, c: {"type": "text", "text": t, "citations": c},
        text,
        st.lists(st.fixed_dictionaries({"type": st.just("char_location"), "cited_text": text}), min_size=1, max_size=3),
    ),
    st.builds(lambda t, s: {"type": "thinking", "thinking": t, "signature": s}, text, text),
    st.builds(lambda d: {"type": "redacted_thinking", "data": d}, text),
    st.builds(lambda i: {"type": "tool_use", "id": "toolu_1", "name": "f", "input": i}, inputs),
    st.builds(lambda i: {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": i}, inputs),
    st.builds(lambda v: {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": v}, json_values),
    st.builds(lambda v: {"type": "a_block_of_the_future", "value": v}, json_values),
)


def assembled(*events: bytes) -> Assembly:
    assembly, splitter = Assembly(), Splitter()
    for raw in events:
        for event in splitter.feed(raw):
            assembly.add(event)
    return assembly


def message(content: list[dict[str, Any]], **step: Any) -> dict[str, Any]:
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return answers.message(request, Step(blocks=content, **step))


def stream(content: list[dict[str, Any]], **step: Any) -> list[bytes]:
    return list(answers.events(message(content, **step), Step(blocks=content, **step)))


def start(index: int, block: dict[str, Any]) -> bytes:
    return format_event("content_block_start", {"index": index, "content_block": block})


def delta(index: int, kind: Any, **fields: Any) -> bytes:
    return format_event("content_block_delta", {"index": index, "delta": {"type": kind, **fields}})


MESSAGE_START = format_event("message_start", {"message": {"id": "msg_1", "model": "m", "role": "assistant"}})
STOP = format_event("message_stop", {"type": "message_stop"})


@given(st.lists(blocks, max_size=5), st.integers(1, 9), st.sampled_from(["\n", "\r\n"]))
def test_streamed_equals_plain(content: list[dict[str, Any]], size: int, newline: Literal["\n", "\r\n"]) -> None:
    step = Step(blocks=content, delta_characters=size, newline=newline)
    plain = message(content)
    before = copy.deepcopy(plain)
    assembly = assembled(*answers.events(plain, step))
    assert assembly.finished
    assert assembly.error is None
    # JSON itself makes a pair of surrogates one character
    assert assembly.message() == json.loads(json.dumps(plain))
    assert plain == before


@given(st.lists(blocks, max_size=3), st.integers(0, 40))
def test_a_cut_stream_is_never_finished_and_marks_what_is_not_whole(content: list[dict[str, Any]], kept: int) -> None:
    events = stream(content)
    kept = min(kept, len(events) - 1)
    assembly = assembled(*events[:kept])
    assert not assembly.finished
    partial = assembly.partial()
    assert assembly.committed == any(b"content_block_start" in e or b"message_delta" in e for e in events[:kept])
    if kept == 0:
        assert partial == {}
        return
    started = sum(e.startswith(b"event: content_block_start") for e in events[:kept])
    stopped = sum(e.startswith(b"event: content_block_stop") for e in events[:kept])
    assert len(partial["content"]) == started
    whole = json.loads(json.dumps(content))
    assert partial["content"][:stopped] == whole[:stopped]
    assert [block.get("incomplete", False) for block in partial["content"][stopped:]] == [True] * (started - stopped)


def test_unfinished_blocks() -> None:
    assembly = assembled(
        MESSAGE_START,
        start(0, {"type": "thinking", "thinking": "", "signature": ""}),
        delta(0, "thinking_delta", thinking="hm"),
        start(1, {"type": "tool_use", "id": "t", "name": "f", "input": {}}),
        delta(1, "input_json_delta", partial_json='{"a": [1, '),
        start(2, {"type": "tool_use", "id": "u", "name": "g", "input": {}}),
    )
    assert assembly.partial()["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "", "incomplete": True},
        {"type": "tool_use", "id": "t", "name": "f", "input": {}, "partial_json": '{"a": [1, ', "incomplete": True},
        {"type": "tool_use", "id": "u", "name": "g", "input": {}, "incomplete": True},
    ]
    with pytest.raises(ValueError, match="not finished"):
        assembly.message()


def test_a_tool_call_that_max_tokens_cut_is_incomplete_in_a_finished_message() -> None:
    assembly = assembled(
        MESSAGE_START,
        start(0, {"type": "tool_use", "id": "t", "name": "f", "input": {}}),
        delta(0, "input_json_delta", partial_json='{"a": "b'),
        format_event("content_block_stop", {"index": 0}),
        format_event("message_delta", {"delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 3}}),
        STOP,
    )
    (block,) = assembly.message()["content"]
    assert (block["input"], block["partial_json"], block["incomplete"]) == ({}, '{"a": "b', True)


def test_usage_merges_and_nulls_change_nothing() -> None:
    usage = {"input_tokens": 9, "cache_read_input_tokens": 4, "output_tokens": 1}
    assembly = assembled(
        format_event("message_start", {"message": {"id": "m", "usage": usage, "stop_reason": None}}),
        format_event("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}}),
        format_event(
            "message_delta",
            {"delta": {"stop_reason": None, "content": "no"}, "usage": {"input_tokens": None, "output_tokens": 7}},
        ),
        STOP,
    )
    got = assembly.message()
    assert got["usage"] == {"input_tokens": 9, "cache_read_input_tokens": 4, "output_tokens": 7}
    assert (got["stop_reason"], got["content"]) == ("end_turn", [])
    assert assembly.committed


@pytest.mark.parametrize("usage", [None, "many", [1]])
def test_missing_or_absurd_usage_is_no_error(usage: Any) -> None:
    event = format_event("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": usage})
    assert assembled(MESSAGE_START, event, STOP).message()["stop_reason"] == "end_turn"


def test_unknown_things_pass() -> None:
    assembly = assembled(
        b": comment\n\n",
        b"event: of_the_future\ndata: not json\n\n",
        b"data: [DONE]\n\n",
        format_event("ping", {"type": "ping"}),
        MESSAGE_START,
        start(0, {"type": "text", "text": ""}),
        delta(0, "delta_of_the_future", value=1),
        delta(0, ["no", "name"], value=1),
        b'data: {"type": ["no", "name"]}\n\n',
        delta(0, "text_delta", text="ok"),
        STOP,
        b"event: content_block_delta\ndata: after the end\n\n",
    )
    assert assembly.message()["content"] == [{"type": "text", "text": "ok"}]


def test_events_without_names_go_by_their_type() -> None:
    named = stream([{"type": "text", "text": "hello"}])
    unnamed = [event[event.index(b"data:") :] for event in named]
    assert assembled(*unnamed).message()["content"] == [{"type": "text", "text": "hello"}]


def test_error_event() -> None:
    body = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    assembly = assembled(MESSAGE_START, format_event("error", body))
    assert (assembly.error, assembly.finished, assembly.committed) == (body, False, False)


@pytest.mark.parametrize(
    "event",
    [
        b'event: content_block_delta\ndata: {"type":"content_block_del\n\n',
        b"event: content_block_delta\ndata: []\n\n",
        b"event: content_block_stop\ndata: \xff\n\n",
        b"event: message_delta\ndata: NaN\n\n",
        b'event: ping\ndata: {"type": \n\n',
        b"event: content_block_start\ndata: " + b"[" * 200_000 + b"\n\n",
        MESSAGE_START,
        start(0, {"type": "text", "text": ""}),
        format_event("content_block_start", {"content_block": {"type": "text"}}),
        format_event("content_block_start", {"index": True, "content_block": {"type": "text"}}),
        format_event("content_block_start", {"index": -1, "content_block": {"type": "text"}}),
        format_event("content_block_start", {"index": 1, "content_block": "text"}),
        delta(7, "text_delta", text="x"),
        delta(0, "text_delta", text=None),
        format_event("content_block_delta", {"index": 0}),
        format_event("content_block_stop", {"index": 7}),
    ],
)
def test_malformed_known_events(event: bytes) -> None:
    with pytest.raises(MalformedEvent):
        assembled(MESSAGE_START, start(0, {"type": "text", "text": ""}), event)


@pytest.mark.parametrize("event", [start(0, {"type": "text"}), STOP, format_event("message_delta", {"delta": {}})])
def test_nothing_comes_before_message_start(event: bytes) -> None:
    with pytest.raises(MalformedEvent):
        assembled(event)


def test_answer_limit_counts_all_events() -> None:
    assembly = Assembly(limit_bytes=100)
    ping = Event(b"event: ping\n" + b"x" * 38, "ping", b"{}")
    assembly.add(ping)
    assembly.add(ping)
    with pytest.raises(AnswerTooLarge):
        assembly.add(ping)


def test_a_surrogate_pair_split_between_deltas_becomes_its_character() -> None:
    first, second = "\\ud83d", "\\ude00"
    raw = 'event: content_block_delta\ndata: {{"index":0,"delta":{{"type":"text_delta","text":"{}"}}}}\n\n'
    events = [raw.format(half).encode() for half in (first, second, first)]
    assembly = assembled(MESSAGE_START, start(0, {"type": "text", "text": ""}), *events)
    assert assembly.partial()["content"][0]["text"] == "\U0001f600\ud83d"


# ── storable ────────────────────────────────────────────────────────────────────────────────────


@given(json_values)
def test_storable_replaces_only_what_cannot_be_stored(value: Any) -> None:
    kept, changed = storable(value)
    written = json.dumps(kept, ensure_ascii=False)
    written.encode()
    assert "\\u0000" not in json.dumps(kept).replace("\\\\", "")
    assert changed == (kept is not value)
    if not changed:
        assert kept is value
    assert storable(kept) == (kept, False)


def test_storable_reaches_everywhere() -> None:
    value = {"a\0": ["ok", {"b": "x\ud800y\0"}], "n": [1, None, True, 2**80]}
    assert storable(value) == ({"a\ufffd": ["ok", {"b": "x\ufffdy\ufffd"}], "n": [1, None, True, 2**80]}, True)
    assert storable("\ud83d\ude00") == ("\U0001f600", True)
    assert storable([float("inf"), 1.5]) == ([None, 1.5], True)


def test_storable_bounds_depth() -> None:
    value: Any = "leaf"
    for _ in range(900):
        value = [value]
    kept, changed = storable(value)
    assert changed
    depth = 0
    while isinstance(kept, list):
        kept, depth = kept[0], depth + 1
    assert depth == STORABLE_DEPTH + 1
    assert isinstance(kept, str)
