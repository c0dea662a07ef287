"""Contexts in the shapes of other protocols: the pairing rules of Chat Completions hold for any history."""

from typing import Any

from hypothesis import given, settings

from services.session_service.formats import to_format
from services.session_service.repairs import Piece, repair
from tests.session_service.calls import Json, User, said
from tests.session_service.test_repairs import histories, malformed, well_formed


def openai_problem(messages: list[Json]) -> str | None:
    """The first pairing rule of Chat Completions that is broken: tool messages follow their calls, all and only."""
    waiting: list[str] = []
    for place, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            if message["tool_call_id"] not in waiting:
                return f"{place}: tool message without its call"
            waiting.remove(message["tool_call_id"])
            if not isinstance(message["content"], str):
                return f"{place}: tool content {message['content']!r}"
            continue
        if waiting:
            return f"{place}: calls {waiting} were not answered"
        if role not in {"user", "assistant"}:
            return f"{place}: role {role}"
        waiting = [call["id"] for call in message.get("tool_calls", [])]
        if not message["content"] and not waiting:
            return f"{place}: no content"
        for call in message.get("tool_calls", []):
            if not isinstance(call["function"]["arguments"], str) or call["type"] != "function":
                return f"{place}: {call}"
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] not in {"text", "image_url"}:
                return f"{place}: part {part['type']}"
    return None


@settings(max_examples=150, deadline=None)
@given(histories(well_formed | malformed))
def test_any_history_in_the_openai_shape(pieces: list[Piece]) -> None:
    done = repair(pieces)
    shaped = to_format(done.messages, "openai")
    assert openai_problem(shaped) is None, shaped
    calls = [call["id"] for message in shaped for call in message.get("tool_calls", [])]
    answered = [message["tool_call_id"] for message in shaped if message["role"] == "tool"]
    assert [call for call in calls if call not in answered] == done.pending_tool_calls


@settings(max_examples=100, deadline=None)
@given(histories(well_formed | malformed))
def test_any_history_in_the_plain_shape(pieces: list[Piece]) -> None:
    done = repair(pieces)
    shaped = to_format(done.messages, "plain")
    assert [each["role"] for each in shaped] == [each["role"] for each in done.messages]
    assert all(set(each) == {"role", "content"} and isinstance(each["content"], str) for each in shaped)
    assert to_format(done.messages, "claude") == done.messages


HISTORY: list[tuple[str, Any]] = [
    ("user", "What is the weather?"),
    (
        "assistant",
        [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "c1", "name": "weather", "input": {"town": "京都", "days": 2}},
        ],
    ),
    (
        "user",
        [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sun"}]},
            {"type": "text", "text": "And this?"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
        ],
    ),
    ("assistant", "A picture."),
    ("user", "Thanks"),
]


async def test_the_three_formats_over_http(user: User) -> None:
    chat = await user.chat()
    for role, content in HISTORY:
        await chat.append(content, role)
    claude = await chat.context()
    assert [(each["role"], each["content"]) for each in claude["messages"]] == HISTORY
    openai = await chat.context(format="openai")
    assert openai["messages"] == [
        {"role": "user", "content": "What is the weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"town":"京都","days":2}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            ],
        },
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": "Thanks"},
    ]
    plain = await chat.context(format="plain")
    assert [each["content"] for each in plain["messages"]] == [
        "What is the weather?",
        "Let me look.",
        "And this?",
        "A picture.",
        "Thanks",
    ]
    assert claude["receipt"] == openai["receipt"] == plain["receipt"]
    turn = await chat.open(said("more"), context={"format": "openai"})
    assert turn.opened["context"]["messages"][:-1] == openai["messages"][:-1]
