"""The relay's smaller parts by themselves: pipe, lines, session ids, completions, what goes upstream."""

import asyncio
import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.relay import answers, prompt, request, session_ids
from services.relay.answers import Answer
from services.relay.arrays import Array
from services.relay.errors import InvalidRequest
from services.relay.history import Opened
from services.relay.lines import Lines
from services.relay.live import Live
from services.relay.pipe import Pipe
from services.relay.session_ids import Choice
from shared import values, wire
from shared.database import Database
from shared.errors import DatabaseUnavailable, TurnInProgress
from shared.json import dumps
from shared.session_client import SessionKey

KEY = SessionKey("user", "session")


def claude(**fields: Any) -> request.ClaudeRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return request.read(json.dumps(body).encode(), default_max_tokens=10)


# ── pipe ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_pipe_gives_what_was_put_and_then_ends() -> None:
    pipe = Pipe(limit_bytes=10)
    await pipe.put(b"one")
    await pipe.put(b"two")
    assert await pipe.get(1) == b"onetwo"
    assert await pipe.get(0.01) is None
    pipe.put_now(b"end")
    pipe.close()
    assert await pipe.get(1) == b"end"
    assert await pipe.get(1) == b""


async def test_silence_counts_from_the_last_piece() -> None:
    """And a wait that follows another one is as long, however soon the first one's timer is due."""
    pipe = Pipe()
    loop = asyncio.get_running_loop()
    for _ in range(6):  # together longer than the silence
        loop.call_later(0.1, pipe.put_now, b"x")
        assert await pipe.get(0.3) == b"x"
    for _ in range(2):
        began_at = loop.time()
        assert await pipe.get(0.3) is None
        assert 0.29 <= loop.time() - began_at < 0.6
    waiting = asyncio.create_task(pipe.get(60))
    await asyncio.sleep(0)
    pipe.close()
    assert await asyncio.wait_for(waiting, 1) == b""


async def test_a_full_pipe_makes_its_writer_wait() -> None:
    pipe = Pipe(limit_bytes=10)
    await pipe.put(b"x" * 25)
    waiting = asyncio.create_task(pipe.put(b"y"))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert await pipe.get(1) == b"x" * 25
    await asyncio.wait_for(waiting, 1)
    assert await pipe.get(1) == b"y"


async def test_a_pipe_that_nobody_reads_holds_nobody() -> None:
    pipe = Pipe(limit_bytes=10)
    await pipe.put(b"x" * 25)
    waiting = asyncio.create_task(pipe.put(b"y"))
    await asyncio.sleep(0)
    pipe.drop()
    await asyncio.wait_for(waiting, 1)
    await asyncio.wait_for(pipe.put(b"z" * 100), 1)
    assert await pipe.get(1) == b""


async def test_a_pipe_that_was_cut_ends_with_one_piece() -> None:
    pipe = Pipe(limit_bytes=10)
    await pipe.put(b"x" * 25)
    pipe.cut(b"error")
    await pipe.put(b"more")
    assert await pipe.get(1) == b"error"
    assert await pipe.get(1) == b""


# ── live ────────────────────────────────────────────────────────────────────────────────────────


async def test_who_watches_is_woken_when_the_database_cannot_be_looked_at() -> None:
    """Each finds out by looking by itself; it would wait on for a change that nobody can tell."""
    live = Live(Database("postgresql://127.0.0.1:1/nowhere", schema="dev"))  # never opened
    await live.look()  # nobody watches, so that nothing is asked
    with live.watching("one") as first, live.watching("two") as second:
        with pytest.raises(DatabaseUnavailable):
            await live.look()
        assert (first.is_set(), second.is_set()) == (True, True)


# ── lines ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_line_is_served_in_order() -> None:
    lines = Lines()
    served: list[int] = []
    inside = 0

    async def come(number: int) -> None:
        nonlocal inside
        async with lines.place(KEY, wait_seconds=5):
            inside += 1
            assert inside == 1
            served.append(number)
            await asyncio.sleep(0.001)
            inside -= 1

    tasks = [asyncio.create_task(come(number)) for number in range(50)]
    await asyncio.sleep(0)
    assert lines.waiting == 49
    for task in tasks[10:20]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert served == [*range(10), *range(20, 50)]
    assert lines.waiting == 0


async def test_a_line_is_left_when_the_time_is_up() -> None:
    lines = Lines()
    async with lines.place(KEY, wait_seconds=0):
        for wait_seconds in (0, 0.02):
            with pytest.raises(TurnInProgress):
                async with lines.place(KEY, wait_seconds=wait_seconds):
                    raise AssertionError("not reached")
        async with lines.place(SessionKey("other", "session"), wait_seconds=0):
            pass
    async with lines.place(KEY, wait_seconds=0):
        pass


# ── session ids ─────────────────────────────────────────────────────────────────────────────────

_ids = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=255)


@given(session_id=_ids.filter(lambda text: text == text.strip() and text not in values.RESERVED_SESSION_IDS))
def test_a_session_id_survives_its_header(session_id: str) -> None:
    header = session_ids.encoded(session_id)
    assert header.isascii()
    assert session_ids.decoded(header) == session_id
    if session_id != session_ids.NO_SESSION:
        assert session_ids.choose(claude(), {"x-session-id": header}) == Choice(session_id, "named")


def test_a_bare_utf8_header_is_read_too() -> None:
    assert session_ids.decoded("会话".encode().decode("latin-1")) == "会话"


def test_bytes_that_are_no_text_name_no_session() -> None:
    for header in ("%FF", "%E4%BD", "\xff"):
        with pytest.raises(InvalidRequest, match="X-Session-Id"):
            session_ids.choose(claude(), {"x-session-id": header})


_UUID = "0197c5e4-9d6f-4d0e-8a52-3f1b6c1d2e3f"


@pytest.mark.parametrize(
    ("headers", "user_id", "expected"),
    [
        ({}, f"user_5f_account__session_{_UUID}", _UUID),
        ({}, f"session_{_UUID}", _UUID),
        ({}, f"team/session_{_UUID}", _UUID),
        ({}, f'{{"device_id": "d", "account_uuid": "", "session_id": "{_UUID}"}}', _UUID),
        ({}, f' {{"session_id": "{_UUID}"}}', _UUID),
        ({"session-id": "s-1"}, f"session_{_UUID}", "s-1"),
        ({"x-claude-code-session-id": "c", "session-id": "s", "x-openwebui-chat-id": "o"}, None, "c"),
        ({"session-id": "a/b", "x-openwebui-chat-id": "o"}, None, "o"),
        ({"x-session-id": "ses_1", "x-session-affinity": "ses_1", "session-id": "s"}, None, "ses_1"),
        ({"x-session-affinity": "ses_1", "session-id": "s"}, None, "s"),
        ({"x-openwebui-chat-id": "%E4%BC%9A"}, None, "会"),
        ({"x-openwebui-chat-id": "会".encode().decode("latin-1")}, None, "会"),
    ],
)
def test_ids_that_clients_send_by_themselves(headers: dict[str, str], user_id: str | None, expected: str) -> None:
    assert session_ids.choose(claude(metadata={"user_id": user_id}), headers) == Choice(expected, "implied")
    named = session_ids.choose(claude(metadata={"user_id": user_id}), headers | {"x-session-id": "mine"})
    assert named == Choice("mine", "named")
    assert session_ids.choose(claude(metadata={"session_id": "m"}), headers | {"x-session-id": "none"}) is None


@pytest.mark.parametrize(
    ("headers", "user_id"),
    [
        ({}, None),
        ({}, f"obsession_{_UUID}"),
        ({}, f"session_{_UUID}_more"),
        ({"x-openwebui-chat-id": "%FF"}, None),
        ({"session-id": "a/b"}, None),
        ({"x-claude-code-session-id": "stats"}, "user_session_nothing"),
        ({}, '{"session_id": 7}'),
        ({}, '{"session_id": "a/b"}'),
        ({}, "[1]"),
        ({}, '{"broken'),
        ({}, "somebody"),
    ],
)
def test_what_is_no_id_makes_a_new_session(headers: dict[str, str], user_id: str | None) -> None:
    chosen = session_ids.choose(claude(metadata={"user_id": user_id}), headers)
    assert chosen is not None
    assert chosen.kind == "fresh"
    assert uuid.UUID(chosen.session_id).version == 7


# ── requests ────────────────────────────────────────────────────────────────────────────────────

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=12,
)


@given(extra=_json, ensure_ascii=st.booleans())
def test_a_request_is_read_as_it_was_sent(extra: Any, ensure_ascii: bool) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}], "extra": extra}
    content = json.dumps(body, ensure_ascii=ensure_ascii).encode()
    assert request.read(content, default_max_tokens=10).body == body


@given(content=st.binary(max_size=60))
def test_bytes_of_any_kind_are_refused_or_read(content: bytes) -> None:
    with pytest.raises(InvalidRequest):
        request.read(content, default_max_tokens=10)


# ── completions ─────────────────────────────────────────────────────────────────────────────────

_block = st.dictionaries(st.sampled_from(["type", "text", "id", "input", "incomplete", "name"]), _json, max_size=4)
_kinds = st.sampled_from(["text", "tool_use", "thinking", "server_tool_use", "new_kind"])
_blocks = st.lists(st.one_of(_json, _block, st.builds(lambda kind, b: b | {"type": kind}, _kinds, _block)), max_size=4)
_usage = st.dictionaries(st.sampled_from(["input_tokens", "output_tokens", "x"]), _json, max_size=3)


@given(
    content=_blocks,
    usage=_usage | _json,
    stop_reason=_json,
    status=st.sampled_from(["completed", "interrupted"]),
    prefill=st.booleans(),
)
def test_whatever_upstream_says_has_a_completion(
    content: Any, usage: Any, stop_reason: Any, status: Any, prefill: bool
) -> None:
    message = {"content": content, "usage": usage, "stop_reason": stop_reason, "model": "m\0" * 300}
    given_text = [{"type": "text", "text": "It is"}] if prefill else []
    body = claude().body
    made = answers.completion(Answer(status, message), lease_token="t", prefill=given_text, body=body)
    assert made.usage is not None
    assert made.usage["input_tokens"] >= 0
    sent = dumps(made.model_dump(exclude_none=True))
    assert wire.CompleteTurn.model_validate_json(sent).lease_token == "t"


@pytest.mark.parametrize("status", ["completed", "interrupted"])
@pytest.mark.parametrize("sizes", [[20, 20], [40], [1, 40]], ids=["all together", "one text", "one of two texts"])
def test_an_answer_that_no_message_holds_is_cut(status: Any, sizes: list[int]) -> None:
    blocks = [{"type": "text", "text": "x" * (size * 2**20)} for size in sizes]
    made = answers.completion(Answer(status, {"content": blocks}), lease_token="t", prefill=[], body=claude().body)
    (message,) = made.messages
    assert message.metadata == {"usage_estimated": True, "truncated": True}
    kept = message.content
    assert isinstance(kept, list)
    assert {(block["type"], block["text"].strip("x"), block.get("incomplete")) for block in kept} == {
        ("text", "", None)
    }
    assert sum(len(block["text"]) for block in kept) >= 2**20


# ── what goes upstream ──────────────────────────────────────────────────────────────────────────


def part(model: Any, **fields: Any) -> Any:
    """A wire model with only the fields that matter here."""
    return model.model_construct(**fields)


def opened(new: list[dict[str, Any]], stored: list[dict[str, Any]], *, included: list[tuple[int, int]]) -> Opened:
    """An opened turn whose context is `stored`; its own messages have the seqs 11, 12 …"""
    array = Array.of(request.ClaudeRequest({"messages": new}, None))
    receipt = part(wire.Receipt, included=included)
    context = part(wire.Context, system="", messages=stored, receipt=receipt)
    messages = [part(wire.Message, seq=11 + place, role=each.role) for place, each in enumerate(array.messages)]
    session = part(wire.Session, session_summary="")
    turn = part(wire.TurnOpened, turn_id="t", context=context, messages=messages, session=session)
    return Opened(KEY, turn, array, is_whole=False)


def test_a_turn_that_stands_alone_goes_up_as_it_came() -> None:
    asked = claude(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    merged = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert prompt.upstream_body(asked, opened(asked.messages, merged, included=[(11, 12)])) is asked.body


def test_what_was_replaced_for_the_store_goes_up_as_it_came() -> None:
    asked = claude(messages=[{"role": "user", "content": "a\0"}, {"role": "user", "content": "b"}])
    own = [{"type": "text", "text": "a\ufffd"}, {"type": "text", "text": "b"}]
    earlier = {"type": "text", "text": "earlier"}
    body = prompt.upstream_body(
        asked, opened(asked.messages, [{"role": "user", "content": [earlier, *own]}], included=[(9, 12)])
    )
    expected = [earlier, {"type": "text", "text": "a\0"}, {"type": "text", "text": "b"}]
    assert body["messages"] == [{"role": "user", "content": expected}]


def test_old_cache_marks_make_room() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    asked = claude(
        messages=[{"role": "user", "content": [{"type": "text", "text": "new", **mark}]}],
        tools=[{"name": "t", **mark}],
        cache_control={"type": "ephemeral"},
    )
    stored: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": f"{n}", **mark} for n in range(2)]},
        {"role": "assistant", "content": "plain"},
        asked.messages[0],
    ]
    body = prompt.upstream_body(asked, opened(asked.messages, stored, included=[(1, 11)]))
    assert body["messages"][0]["content"] == [{"type": "text", "text": "0"}, {"type": "text", "text": "1", **mark}]
    assert body["messages"][2] == asked.messages[0]
