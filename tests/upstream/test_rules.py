"""The rules: what the API takes is taken, and every refusal names the place."""

from typing import Any

import pytest

from tests.upstream.rules import problem, signature

CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "done"}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": signature("hm")}
SEARCH = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}
TEXT = {"type": "text", "text": "ok"}


def body(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"model": "m", "max_tokens": 1, "messages": messages, **more}


GOOD = [
    body(("user", "hi")),
    body(("user", "hi"), ("user", "there")),
    body(("user", "hi"), ("assistant", "begun")),
    body(("user", "hi"), ("assistant", "")),
    body(("user", "hi"), ("assistant", [THOUGHT, CALL]), ("user", [RESULT, TEXT])),
    body(
        ("user", "hi"), ("assistant", [CALL, CALL | {"id": "t2"}]), ("user", [RESULT | {"tool_use_id": "t2"}, RESULT])
    ),
    body(("user", "hi"), ("assistant", [SEARCH, FOUND, TEXT]), ("user", "ok")),
    body(("user", "hi"), ("assistant", [SEARCH])),
    body(("user", [{"type": "image", "source": {}, "cache_control": {"type": "ephemeral"}}]), system=[TEXT]),
    body(("user", [{"type": "block_of_the_future", "x": 1}]), metadata={"user_id": "u"}, field_of_the_future=1),
]

BAD = {
    "messages: at least one message": body(),
    "max_tokens: Field required": body(("user", "hi")) | {"max_tokens": None},
    "max_tokens: Input should be a valid integer": body(("user", "hi"), max_tokens=True),
    "max_tokens: must be": body(("user", "hi"), max_tokens=0),
    "model: Field required": body(("user", "hi")) | {"model": None},
    'first message must use the "user" role': body(("assistant", "hi")),
    'Unexpected role "system"': body(("user", "hi"), ("system", "hi")),
    "messages.0.content: Field required": body(("user", None)),
    "messages.0.id: Extra inputs": body() | {"messages": [{"role": "user", "content": "x", "id": 1}]},
    "messages.0: all messages must have non-empty content": body(("user", "")),
    "messages.1: all messages must have": body(("user", "x"), ("assistant", []), ("user", "x")),
    "text content blocks must be non-empty": body(("user", [{"type": "text", "text": ""}])),
    "must contain non-whitespace": body(("user", " \n")),
    "messages.0.content.0.text.incomplete: Extra": body(("user", [TEXT | {"incomplete": True}])),
    "tool_use.partial_json: Extra": body(("user", "x"), ("assistant", [CALL | {"partial_json": "{"}])),
    "messages.0.content.0: unexpected `tool_use_id`": body(("user", [RESULT])),
    "`tool_use` ids were found without `tool_result`": body(("user", "x"), ("assistant", [CALL]), ("user", "y")),
    "messages.1: `tool_use` ids were found": body(("user", "x"), ("assistant", [CALL])),
    "immediately after: t1": body(("user", "x"), ("assistant", [CALL]), ("user", [TEXT, RESULT])),
    "each tool_use must have a single": body(("user", "x"), ("assistant", [CALL]), ("user", [RESULT, RESULT])),
    "ids must be unique": body(("user", "x"), ("assistant", [CALL, CALL]), ("user", [RESULT])),
    "blocks are not allowed in user": body(("user", [CALL])),
    "Invalid `signature`": body(("user", "x"), ("assistant", [THOUGHT | {"thinking": "ha"}, TEXT])),
    "in `thinking` block": body(("user", "x"), ("assistant", [THOUGHT | {"signature": ""}, TEXT])),
    "cannot be `thinking`": body(("user", "x"), ("assistant", [TEXT, THOUGHT])),
    "trailing whitespace": body(("user", "x"), ("assistant", "begun ")),
    "a corresponding `server_tool_use` block before": body(("user", "x"), ("assistant", [FOUND, SEARCH])),
    "found without a corresponding result": body(("user", "x"), ("assistant", [SEARCH, TEXT]), ("user", "y")),
    "metadata.session_id: Extra inputs": body(("user", "x"), metadata={"session_id": "s"}),
    "Input should be a valid dictionary": [],
}


@pytest.mark.parametrize("request_body", GOOD)
def test_valid_requests(request_body: Any) -> None:
    assert problem(request_body) is None


@pytest.mark.parametrize(("words", "request_body"), BAD.items())
def test_invalid_requests(words: str, request_body: Any) -> None:
    assert words in str(problem(request_body))


def test_counting_needs_no_max_tokens() -> None:
    request_body = body(("user", "hi")) | {"max_tokens": None}
    assert problem(request_body, counting=True) is None
