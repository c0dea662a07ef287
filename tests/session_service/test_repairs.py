"""Any history at all becomes a request that Claude accepts, and loses no more than it must."""

import copy
from typing import Any

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from services.session_service.repairs import Block, Piece, Repaired, repair
from tests.session_service import claude_rules
from tests.upstream.rules import signature

ids = st.sampled_from(["c1", "c2", "c3", "c4"])
words = st.sampled_from(["a", "hello", "你好", " padded ", "e\u0301", "\n"])
blank = st.sampled_from(["", " ", "\n\t", "\u3000"])
cached = st.sampled_from([{}, {}, {"cache_control": {"type": "ephemeral"}}, {"cache_control": None}])


def block(kind: str, **fields: Any) -> st.SearchStrategy[Block]:
    drawn = {name: each if isinstance(each, st.SearchStrategy) else st.just(each) for name, each in fields.items()}
    return st.builds(lambda more, found: {"type": kind, **found, **more}, cached, st.fixed_dictionaries(drawn))


CUT_OFF = {"type": "text", "text": "x", "incomplete": True}
png = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
texts = block("text", text=words)
images = block("image", source=png)
calls = block("tool_use", id=ids, name="f", input=st.just({"x": 1}))
results = block(
    "tool_result",
    tool_use_id=ids,
    content=words | st.lists(st.builds(lambda t: {"type": "text", "text": t}, words.filter(str.strip)), max_size=2),
)
thoughts = words.map(lambda text: {"type": "thinking", "thinking": text, "signature": signature(text)})
hidden = st.just({"type": "redacted_thinking", "data": "d"})
unsigned = st.sampled_from(
    [{"type": "thinking", "thinking": "t"}, {"type": "thinking", "thinking": "t", "signature": ""}]
)
cut_off = st.builds(lambda found: {**found, "incomplete": True}, texts | calls | unsigned)

well_formed = texts | calls | results | thoughts | hidden | images | unsigned | cut_off | block("text", text=blank)
# Of these nothing is left, so that it does not matter what upstream would say to them.
odd_parts = st.sampled_from(
    [{"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 5}, {"type": "text", "text": ["x"]}]
)
malformed = st.one_of(
    block("tool_use", id=ids),
    block("tool_use", id=ids, name="f", input=st.sampled_from([None, "x", []])),
    block("tool_use", id=ids, name=st.none(), input=st.just({})),
    block("tool_result", tool_use_id=ids),
    block("tool_result", tool_use_id=ids, content=st.just([{"type": "text", "text": ""}])),
    block("tool_result", tool_use_id=ids, content=st.just([CUT_OFF])),
    block("thinking", thinking="t", signature=signature("t")),
    block("redacted_thinking"),
    block("thinking", signature="s"),
    block("image"),
    block("document"),
    block("document", source="x"),
    block("server_tool_use", id=ids, name="web_search", input=st.just({})),
    block("web_search_tool_result", tool_use_id=ids, content=st.just([])),
    block("web_search_tool_result", tool_use_id=st.sampled_from([None, 5, [], {}, ""])),
    block("mcp_tool_use", id=ids, name="f", input=st.just({}), server_name="s"),
    block("mcp_tool_result", tool_use_id=ids, content=st.just([])),
    block("thinking", thinking="t", signature=st.sampled_from([True, {}, [], 5])),
    block("tool_result", tool_use_id=ids, content=st.lists(odd_parts, min_size=1, max_size=2)),
)


def histories(blocks: st.SearchStrategy[Block]) -> st.SearchStrategy[list[Piece]]:
    content = words.filter(str.strip) | st.lists(blocks, min_size=1, max_size=5)
    pieces = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), content), max_size=9)
    return pieces.map(lambda found: [Piece(seq, role, each) for seq, (role, each) in enumerate(found, start=1)])


def valid(pieces: list[Piece]) -> Repaired:
    """What `repair` makes of it, found valid; the same again, and the input untouched."""
    before = copy.deepcopy(pieces)
    done = repair(pieces)
    wrong = claude_rules.problem(done.messages, done.pending_tool_calls)
    assert wrong is None, f"{wrong}\n{done.messages}"
    again = repair(copy.deepcopy(before))
    assert again.messages == done.messages
    assert (again.repairs, again.left_out) == (done.repairs, done.left_out)
    assert [piece.content for piece in pieces] == [piece.content for piece in before]
    for name in {note.kind for note in done.repairs}:
        event(name)
    return done


def of_kind(content: Any, kind: str) -> list[Block]:
    return [each for each in content if each.get("type") == kind] if isinstance(content, list) else []


@settings(max_examples=200, deadline=None)
@given(histories(well_formed))
@example([Piece(1, "user", "q"), Piece(2, "assistant", [{"type": "tool_use", "id": "c1", "name": "f", "input": {}}])])
def test_any_history_of_well_formed_blocks_becomes_valid(pieces: list[Piece]) -> None:
    valid(pieces)


@settings(max_examples=200, deadline=None)
@given(histories(well_formed | malformed))
@example(
    [
        Piece(1, "user", "q"),
        Piece(2, "assistant", [{"type": "tool_use", "id": "c1", "name": "f", "input": {}}]),
        Piece(3, "user", [{"type": "tool_result", "tool_use_id": "c1", "content": [CUT_OFF]}]),
    ]
)
@example(
    [
        Piece(1, "user", "q"),
        Piece(
            2,
            "assistant",
            [
                {"type": "web_search_tool_result", "tool_use_id": "c1", "content": []},
                {"type": "server_tool_use", "id": "c1", "name": "web_search", "input": {}},
            ],
        ),
        Piece(3, "user", "x"),
    ]
)
def test_any_history_of_malformed_blocks_becomes_valid(pieces: list[Piece]) -> None:
    valid(pieces)


@settings(max_examples=200, deadline=None)
@given(histories(well_formed))
def test_every_message_is_accounted_for(pieces: list[Piece]) -> None:
    done = valid(pieces)
    included = [piece.seq for piece in done.included]
    left_out = [each.from_seq for each in done.left_out]
    assert all(each.from_seq == each.to_seq for each in done.left_out)
    assert sorted(included + left_out) == [piece.seq for piece in pieces]
    assert included == sorted(included)
    assert {note.seq for note in done.repairs} <= {piece.seq for piece in pieces}
    assert len(done.added) == sum(note.kind == "missing_tool_result" for note in done.repairs)


@settings(max_examples=150, deadline=None)
@given(histories(well_formed))
def test_no_text_and_no_call_is_lost_that_could_be_kept(pieces: list[Piece]) -> None:
    before = copy.deepcopy(pieces)
    done = valid(pieces)
    kept = {piece.seq for piece in done.included}
    expected: list[str] = []
    seen: set[str] = set()
    wanted_calls: list[str] = []
    for piece in before:
        if piece.seq not in kept:
            continue
        blocks = [{"type": "text", "text": piece.content}] if isinstance(piece.content, str) else piece.content
        whole = [each for each in blocks if not each.get("incomplete")]
        expected += [each["text"] for each in of_kind(whole, "text") if each["text"].strip()]
        for call in of_kind(whole, "tool_use"):
            if piece.role == "assistant" and call["id"] not in seen:
                seen.add(call["id"])
                wanted_calls.append(call["id"])
    found: list[str] = []
    found_calls: list[str] = []
    for message in done.messages:
        content = message["content"]
        found += [content] if isinstance(content, str) else [each["text"] for each in of_kind(content, "text")]
        found_calls += [each["id"] for each in of_kind(content, "tool_use")]
    if done.messages and done.messages[-1]["role"] == "assistant" and found:
        expected[-1], found[-1] = expected[-1].rstrip(), found[-1].rstrip()
    assert found == expected
    assert found_calls == wanted_calls


@settings(max_examples=150, deadline=None)
@given(histories(calls | results | texts))
def test_a_result_that_was_recorded_is_used(pieces: list[Piece]) -> None:
    before = copy.deepcopy(pieces)
    done = valid(pieces)
    kept = {piece.seq for piece in done.included}
    called: set[str] = set()
    recorded: dict[str, Any] = {}
    for piece in before:
        for each in piece.content if isinstance(piece.content, list) and piece.seq in kept else []:
            if each["type"] == "tool_use" and piece.role == "assistant":
                called.add(each["id"])
            if each["type"] == "tool_result" and piece.role == "user" and each["tool_use_id"] in called:
                recorded.setdefault(each["tool_use_id"], each["content"])
    given_back = {
        each["tool_use_id"]: each for message in done.messages for each in of_kind(message["content"], "tool_result")
    }
    for call_id, result in given_back.items():
        if call_id in recorded:
            assert result["content"] == recorded[call_id]
            assert not result.get("is_error")
        else:
            assert result["is_error"] is True
    assert set(recorded) <= set(given_back)


@st.composite
def valid_histories(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Conversations as they should be, ending with the user's."""
    number = 0
    history: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(1, 6))):
        user = draw(
            words.filter(str.strip)
            | st.lists(texts.filter(lambda each: each["text"].strip()) | images, min_size=1, max_size=3)
        )
        if history and history[-1][0] == "user":
            history.pop()
        history.append(("user", user))
        answer: list[Block] = [
            *draw(st.lists(thoughts | hidden, max_size=1)),
            {"type": "text", "text": draw(words.filter(str.strip))},
        ]
        asked = []
        for _ in range(draw(st.integers(0, 3))):
            number += 1
            asked.append(f"call{number}")
            answer.append({"type": "tool_use", "id": asked[-1], "name": "f", "input": {"n": number}})
        history.append(("assistant", answer))
        if asked:
            answers: list[Block] = [
                {"type": "tool_result", "tool_use_id": each, "content": "r"} for each in draw(st.permutations(asked))
            ]
            history += [
                ("user", [*answers, *draw(st.lists(texts.filter(lambda each: each["text"].strip()), max_size=1))])
            ]
            history += [("assistant", "done")]
    return [*history, ("user", "and now?")]


@settings(max_examples=100, deadline=None)
@given(valid_histories())
def test_a_valid_history_is_left_as_it_is(history: list[tuple[str, Any]]) -> None:
    marks = sum(
        bool(each.get("cache_control")) for _, content in history if isinstance(content, list) for each in content
    )
    done = valid([Piece(seq, role, copy.deepcopy(content)) for seq, (role, content) in enumerate(history, start=1)])
    if marks <= claude_rules.MAX_CACHE_BREAKPOINTS:
        assert done.repairs == []

        def ordered(content: Any) -> Any:
            """Results in the order of their calls is as good an order."""
            if isinstance(content, list):
                return sorted(content, key=lambda each: each.get("tool_use_id", "~"))
            return content

        assert [(each["role"], ordered(each["content"])) for each in done.messages] == [
            (role, ordered(content)) for role, content in history
        ]
    assert (done.left_out, done.pending_tool_calls) == ([], [])
