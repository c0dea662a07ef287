"""Contexts over HTTP: what goes in, what the receipt says of it, and that the same state gives the same bytes."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.session_service import tokens
from services.session_service.repairs import Piece
from shared.canonical import canonical_blocks
from tests.session_service import claude_rules
from tests.session_service.calls import Chat, Json, User, fine, said
from tests.session_service.test_repairs import histories, well_formed

RECEIPT = ["included", "left_out", "repairs", "pending_tool_calls", "tokens", "window_start_seq", "sha256"]


def checked(context: Json, max_tokens: int = 100_000, max_messages: int | None = None) -> Json:
    """The receipt of a context that breaks no rule and no budget, and says the truth about itself."""
    assert list(context) == ["system", "messages", "receipt"]
    messages, receipt = context["messages"], context["receipt"]
    assert list(receipt) == RECEIPT
    wrong = claude_rules.problem(messages, receipt["pending_tool_calls"], context["system"])
    assert wrong is None, f"{wrong}: {messages}"
    counted = receipt["tokens"]
    assert list(counted) == ["system", "messages", "total", "source"]
    assert counted["total"] == counted["system"] + counted["messages"] <= max_tokens
    if counted["source"] == "estimate":
        shown = sum(tokens.estimate(each["content"]) for each in messages)
        assert shown <= counted["messages"] + len(messages)
        assert tokens.estimate_text(context["system"]) <= counted["system"] + 2 * context["system"].count("\n\n") + 1
    seqs = [seq for start, end in receipt["included"] for seq in range(start, end + 1)]
    assert seqs == sorted(set(seqs))
    assert max_messages is None or len(seqs) <= max_messages
    gone = [(each["from_seq"], each["to_seq"]) for each in receipt["left_out"]]
    assert gone == sorted(gone)
    single = [start for start, end in gone if start == end]
    assert not set(seqs) & set(single)
    form = [[each["role"], canonical_blocks(each["content"])] for each in messages]
    canonical = json.dumps(form, sort_keys=True, separators=(",", ":")).encode()
    assert receipt["sha256"] == hashlib.sha256(canonical).hexdigest()
    found: Json = receipt
    return found


async def test_the_context_of_an_empty_session(user: User) -> None:
    context = await (await user.chat()).context()
    receipt = checked(context)
    assert (context["system"], context["messages"]) == ("", [])
    assert receipt | {"sha256": ""} == {
        "included": [],
        "left_out": [],
        "repairs": [],
        "pending_tool_calls": [],
        "tokens": {"system": 0, "messages": 0, "total": 0, "source": "estimate"},
        "window_start_seq": 1,
        "sha256": "",
    }


async def test_a_plain_conversation(user: User) -> None:
    chat = await user.chat()
    for number in range(1, 6):
        await chat.append(f"m{number}", "user" if number % 2 else "assistant")
    context = await chat.context()
    receipt = checked(context)
    assert [each["content"] for each in context["messages"]] == [f"m{number}" for number in range(1, 6)]
    assert (receipt["included"], receipt["left_out"], receipt["repairs"]) == ([[1, 5]], [], [])
    assert (receipt["window_start_seq"], receipt["tokens"]["source"]) == (1, "estimate")


async def test_the_same_state_gives_the_same_bytes(user: User) -> None:
    chat = await user.chat()
    await chat.append("Be brief.", "system")
    await chat.append([{"type": "text", "text": "b", "zz": 1, "a": {"y": 1.0, "x": 12345678901234567890}}])
    await chat.append("c", "assistant")
    await chat.remember("d")
    fine(await chat.put(session_summary="s"))
    params = {"memories": "true"}
    one, two = [await chat.call("GET", "/context", params=params) for _ in range(2)]
    assert one.content == two.content
    turn = await chat.open(said("e"), context={"memories": True})
    assert await chat.context(**params) == turn.opened["context"]
    again = await chat.call("GET", "/context", params=params)
    await turn.complete()
    assert (await chat.call("GET", "/context", params=params)).content == again.content


async def test_system_messages_summary_and_memories_go_into_system(user: User) -> None:
    chat = await user.chat()
    await chat.append("You are a pirate.", "system")
    await chat.append("Hi")
    await chat.append("You are polite.", "system")
    await chat.append("Arr", "assistant")
    await chat.remember("Likes rum")
    await chat.remember("Hates parrots", "entity")
    fine(await chat.put(session_summary="They greeted."))
    plain = await chat.context()
    receipt = checked(plain)
    system = plain["system"]
    assert system.index("You are a pirate.") < system.index("You are polite.")
    assert "They greeted." in system
    assert "rum" not in system
    assert [each["content"] for each in plain["messages"]] == ["Hi", "Arr"]
    assert receipt["included"] == [[1, 4]]
    full = await chat.context(memories="true")
    assert "Likes rum" in full["system"]
    assert "Hates parrots" in full["system"]
    assert full["system"].startswith(system)
    assert checked(full)["tokens"]["system"] > receipt["tokens"]["system"]
    assert full["messages"] == plain["messages"]


async def test_blank_system_messages_leave_no_trace(user: User) -> None:
    chat = await user.chat()
    await chat.append([{"type": "text", "text": " "}], "system")
    await chat.append("Hi")
    context = await chat.context()
    checked(context)
    assert context["system"].strip() == ""
    assert len(context["messages"]) == 1


@pytest.mark.parametrize("max_messages", [1, 2, 3, 4, 5, 6, 7, 8, 20])
async def test_max_messages_counts_stored_messages(user: User, max_messages: int) -> None:
    chat = await user.chat()
    await chat.append("Be brief.", "system")
    for number in range(1, 7):
        await chat.append(f"m{number}", "user" if number % 2 else "assistant")
    context = await chat.context(max_messages=max_messages)
    checked(context, max_messages=max_messages)
    if max_messages > 2:  # one is the system message's, and an assistant's alone is no request
        assert context["messages"][-1]["content"] == "m6"
    turn = await chat.open(said("m7"), context={"max_messages": max_messages})
    checked(turn.opened["context"], max_messages=max_messages)
    assert turn.opened["context"]["messages"][-1]["content"] == "m7"


async def test_what_is_left_out_is_told(user: User) -> None:
    chat = await user.chat()
    for number in range(1, 9):
        await chat.append(f"m{number}", "user" if number % 2 else "assistant")
    context = await chat.context(max_messages=4)
    receipt = checked(context, max_messages=4)
    assert receipt["included"] == [[5, 8]]
    assert receipt["left_out"] == [{"from_seq": 1, "to_seq": 4, "reason": "before_window"}]
    assert [each["content"] for each in context["messages"]] == ["m5", "m6", "m7", "m8"]


async def test_reported_usage_counts_instead_of_an_estimate(user: User) -> None:
    chat = await user.chat()
    turn = await chat.open(said("question"))
    assert turn.receipt["tokens"]["source"] == "estimate"
    await turn.complete(said("answer", "assistant"), usage={"input_tokens": 9, "output_tokens": 5000})
    receipt = checked(await chat.context())
    assert receipt["tokens"]["source"] == "mixed"
    assert 5000 < receipt["tokens"]["total"] < 5100
    small = checked(await chat.context(max_tokens=6000), 6000)
    assert small["included"] == [[1, 2]]


async def test_pending_calls_and_repairs_are_in_the_receipt(user: User) -> None:
    chat = await user.chat()
    await chat.append("q")
    await chat.append([{"type": "tool_use", "id": "c1", "name": "f", "input": {}}], "assistant")
    receipt = checked(await chat.context())
    assert (receipt["pending_tool_calls"], receipt["repairs"]) == (["c1"], [])
    turn = await chat.open(said("never mind"))
    receipt = checked(turn.opened["context"])
    assert receipt["pending_tool_calls"] == []
    assert receipt["repairs"] == [{"kind": "missing_tool_result", "seq": 2}]
    assert turn.opened["context"]["messages"][2]["content"][0]["is_error"] is True


async def test_roles_of_tools_speak_for_their_side(user: User) -> None:
    chat = await user.chat()
    for role in ("user", "tool_call", "tool_result", "assistant", "tool"):
        await chat.append(f"by {role}", role)
    context = await chat.context()
    checked(context)
    assert [each["role"] for each in context["messages"]] == ["user", "assistant", "user", "assistant", "user"]


budgets = st.integers(30, 3000)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(pieces=histories(well_formed), max_tokens=budgets, max_messages=st.none() | st.integers(1, 10), data=st.data())
async def test_any_history_over_http(
    user: User, pieces: list[Piece], max_tokens: int, max_messages: int | None, data: st.DataObject
) -> None:
    chat = await user.chat()
    budget: dict[str, Any] = {"max_tokens": max_tokens, **({"max_messages": max_messages} if max_messages else {})}
    for piece in pieces:
        await chat.append(piece.content, piece.role)
    if pieces and data.draw(st.sampled_from([True, False])):
        fine(await chat.put(session_summary="summary " * 20))
    before = await chat.get()
    for _ in range(2):
        got = await chat.call("GET", "/context", params=budget)
        if got.status_code != 422:
            checked(fine(got), max_tokens, max_messages)
    assert await chat.get() == before
    opened = await chat.turn(said("and now?"), context=budget)
    context = fine(opened)["context"]
    receipt = checked(context, max_tokens, max_messages)
    last = context["messages"][-1]
    assert last["role"] == "user"
    assert "and now?" in (last["content"] if isinstance(last["content"], str) else last["content"][-1]["text"])
    assert receipt["pending_tool_calls"] == []
    assert receipt["included"][-1][1] == len(pieces) + 1


async def test_a_chat_of_another_user_never_shows(user: User) -> None:
    other = user.other()
    for each, text in ((user, "mine"), (other, "theirs")):
        await each.create(session_id="s")
        await Chat(each, "s").append(text)
        await Chat(each, "s").remember(f"memory {text}")
    context = await Chat(user, "s").context(memories="true")
    assert "theirs" not in str(context)


ODD_BLOCKS: list[Json] = [
    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": {}}, {"type": ["text"]}, {"type": None}, 5, "x"]},
    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": 5}, {"type": "text"}]},
    {"type": "web_search_tool_result", "tool_use_id": {"a": []}, "content": 5},
    {"type": "code_execution_tool_result"},
    {"type": "thinking", "thinking": [], "signature": {}},
    {"type": "redacted_thinking", "data": []},
    {"type": "document", "source": {"type": {}, "content": [{"type": []}]}},
    {"type": "server_tool_use", "id": [], "name": {}, "input": 5},
    {"type": "", "content": [[{"type": {}}]]},
]


async def test_blocks_of_any_shape_break_nothing(user: User) -> None:
    """What upstream would say to them is another matter: they are kept, and the session goes on."""
    for odd in ODD_BLOCKS:
        for role in ("user", "assistant"):
            chat = await user.chat()
            await chat.append("q")
            await chat.append([{"type": "tool_use", "id": "c1", "name": "f", "input": {}}], "assistant")
            assert (await chat.append([odd], role))["content_blocks"] == [odd]
            turn = await chat.open(said("and now?"), context={"format": "openai"})
            await turn.complete(said("this", "assistant"))
            for form in ("claude", "openai", "plain"):
                context = fine(await chat.call("GET", "/context", params={"format": form}))
                assert context["messages"][-1] == {"role": "assistant", "content": "this"}, (odd, form)
