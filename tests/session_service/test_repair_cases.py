"""The repairs of the contract one by one, with what the receipt says of them."""

from typing import Any

from services.session_service.repairs import NO_RESULT, Piece, Repaired, repair
from tests.session_service import claude_rules


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def call(call_id: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {}}


def result(call_id: str, content: Any = "r") -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content}


def thought(sign: str | None = "s") -> dict[str, Any]:
    return {"type": "thinking", "thinking": "t"} | ({"signature": sign} if sign else {})


def repaired(*history: tuple[str, Any]) -> Repaired:
    done = repair(Piece(seq, role, content) for seq, (role, content) in enumerate(history, start=1))
    assert claude_rules.problem(done.messages, done.pending_tool_calls) is None, done.messages
    return done


def kinds(done: Repaired) -> list[tuple[str, int]]:
    return [(note.kind, note.seq) for note in done.repairs]


def left(done: Repaired) -> list[tuple[int, str]]:
    return [(each.from_seq, each.reason) for each in done.left_out]


def contents(done: Repaired) -> list[Any]:
    return [message["content"] for message in done.messages]


def test_nothing() -> None:
    done = repaired()
    assert (done.messages, done.included, done.pending_tool_calls) == ([], [], [])


def test_plain_texts_stay_plain() -> None:
    done = repaired(("user", "a"), ("assistant", "b"), ("user", " c "))
    assert contents(done) == ["a", "b", " c "]
    assert (kinds(done), left(done)) == ([], [])


def test_adjacent_messages_of_one_role_are_merged() -> None:
    done = repaired(("user", "a"), ("user", [text("b")]), ("assistant", "c"), ("assistant", "d"), ("user", "e"))
    assert contents(done) == [[text("a"), text("b")], [text("c"), text("d")], "e"]
    assert kinds(done) == [("merged", 2), ("merged", 4)]


def test_the_first_message_is_the_users() -> None:
    done = repaired(("assistant", "a"), ("assistant", [call("c1")]), ("user", [result("c1"), text("b")]))
    assert contents(done) == [[text("b")]]
    assert [seq for seq, _ in left(done)] == [1, 2]
    assert kinds(done) == [("orphan_tool_result", 3)]


def test_only_an_assistant_gives_nothing() -> None:
    done = repaired(("assistant", "a"))
    assert (done.messages, [seq for seq, _ in left(done)]) == ([], [1])


def test_calls_and_results_are_matched_by_id_even_when_not_adjacent() -> None:
    history = [
        ("user", "q"),
        ("assistant", [call("c1")]),
        ("user", "wait"),
        ("assistant", "ok"),
        ("user", [result("c1")]),
    ]
    done = repaired(*history)
    assert contents(done) == ["q", [call("c1")], [result("c1"), text("wait")], "ok"]
    assert kinds(done) == [("moved_tool_result", 5)]
    done = repaired(*history, ("user", "well?"))
    assert contents(done)[3:] == ["ok", [text("well?")]]


def test_results_come_first_in_their_message() -> None:
    done = repaired(
        ("user", "q"),
        ("assistant", [call("c1"), call("c2")]),
        ("user", [text("x"), result("c2"), text("y"), result("c1")]),
    )
    blocks = contents(done)[2]
    assert {blocks[0]["tool_use_id"], blocks[1]["tool_use_id"]} == {"c1", "c2"}
    assert blocks[2:] == [text("x"), text("y")]


def test_a_result_without_its_call_is_left_out() -> None:
    done = repaired(("user", "q"), ("assistant", "a"), ("user", [result("c9")]), ("user", [result("c8"), text("x")]))
    assert contents(done) == ["q", "a", [text("x")]]
    assert left(done) == [(3, "nothing_left")]
    assert kinds(done) == [("orphan_tool_result", 3), ("orphan_tool_result", 4)]


def test_a_result_before_its_call_is_none() -> None:
    done = repaired(("user", [result("c1"), text("x")]), ("assistant", [call("c1")]), ("user", "y"))
    assert contents(done)[2][0]["is_error"] is True
    assert kinds(done) == [("orphan_tool_result", 1), ("missing_tool_result", 2)]


def test_a_call_never_answered_gets_an_error_when_something_follows() -> None:
    done = repaired(("user", "q"), ("assistant", [call("c1"), call("c2")]), ("user", [result("c2")]), ("user", "next"))
    error = {"type": "tool_result", "tool_use_id": "c1", "is_error": True, "content": NO_RESULT}
    assert contents(done)[2] == [error, result("c2"), text("next")]
    assert ("missing_tool_result", 2) in kinds(done)
    assert (len(done.added), done.pending_tool_calls) == (1, [])


def test_a_call_at_the_very_end_is_pending() -> None:
    done = repaired(("user", "q"), ("assistant", [text("let me see"), call("c1"), call("c2")]))
    assert contents(done)[1] == [text("let me see"), call("c1"), call("c2")]
    assert (done.pending_tool_calls, len(done.added), kinds(done)) == (["c1", "c2"], 0, [])


def test_what_is_twice_counts_once() -> None:
    done = repaired(
        ("user", "q"),
        ("assistant", [call("c1")]),
        ("user", [result("c1", "first"), result("c1", "second")]),
        ("assistant", [text("again"), call("c1")]),
        ("user", [result("c1", "third"), text("x")]),
    )
    assert contents(done)[2:] == [[result("c1", "first")], [text("again")], [text("x")]]
    assert [kind for kind, _ in kinds(done)] == ["duplicate_tool_result", "duplicate_tool_use", "duplicate_tool_result"]


def test_incomplete_blocks_are_left_out() -> None:
    half = {**call("c1"), "input": {}, "incomplete": True}
    done = repaired(("user", "q"), ("assistant", [text("whole"), text("ha", incomplete=True), half]), ("user", "go on"))
    assert contents(done)[1] == [text("whole")]
    assert kinds(done) == [("incomplete_block", 2)] * 2
    done = repaired(("user", "q"), ("assistant", [text("ha", incomplete=True)]), ("user", "go on"))
    assert contents(done) == [[text("q"), text("go on")]]
    assert left(done) == [(2, "nothing_left")]
    done = repaired(("user", "q"), ("assistant", [text("whole", incomplete=False)]), ("user", "go on"))
    assert contents(done)[1] == [text("whole")]


def test_unsigned_thinking_is_left_out_and_signed_kept() -> None:
    done = repaired(("user", "q"), ("assistant", [thought(None), thought(""), thought(), text("a")]), ("user", "x"))
    assert contents(done)[1] == [thought(), text("a")]
    assert kinds(done) == [("unsigned_thinking", 2)] * 2


def test_a_message_that_would_end_with_thinking_is_left_out() -> None:
    for tail in (
        [thought()],
        [text("a"), thought()],
        [thought(), text("cut", incomplete=True)],
        [{"type": "redacted_thinking", "data": "d"}],
    ):
        done = repaired(("user", "q"), ("assistant", tail), ("user", "x"))
        assert contents(done) == [[text("q"), text("x")]]
        assert [seq for seq, _ in left(done)] == [2]


def test_thinking_before_a_call_that_was_there_already() -> None:
    done = repaired(
        ("user", "q"),
        ("assistant", [call("c1")]),
        ("user", [result("c1")]),
        ("assistant", [thought(), call("c1")]),
        ("user", "x"),
    )
    assert contents(done)[2:] == [[result("c1"), text("x")]]


def test_a_last_message_of_the_assistant_has_no_blanks_at_its_end() -> None:
    assert contents(repaired(("user", "q"), ("assistant", "a \n"))) == ["q", [text("a")]]


def test_at_most_four_cache_breakpoints_and_the_latest_ones() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    history = [("user" if place % 2 == 0 else "assistant", [text(str(place), **mark)]) for place in range(7)]
    done = repaired(*history)
    marked = [place for place, content in enumerate(contents(done)) if "cache_control" in content[0]]
    assert marked == [3, 4, 5, 6]


def test_server_tools_stay_whole() -> None:
    use = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}
    done = repaired(("user", "q"), ("assistant", [use, found, text("a")]), ("user", "x"))
    assert contents(done)[1] == [use, found, text("a")]
    repaired(("user", "q"), ("assistant", [use, {**found, "incomplete": True}]), ("user", "x"))
    repaired(("user", "q"), ("assistant", [use, text("cut")]), ("user", "x"))
    repaired(("user", "q"), ("assistant", [found, text("b")]), ("user", "x"))
    repaired(("user", "q"), ("assistant", [found, use, text("b")]), ("user", "x"))
