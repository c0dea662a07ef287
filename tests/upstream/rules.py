"""What the Claude Messages API refuses: one pure function over a request body.

Its one invariant: `problem(body)` is None only for a body that the real API would take. Where the API is
known to be lenient in one model and strict in another, this is the strict one. The wording follows the
API's own messages, so that a log reads alike.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

SIGNATURE_PREFIX = "test-upstream:"

_ROLES = {"user", "assistant"}
_BLOCK_FIELDS = {
    "text": {"text", "citations"},
    "image": {"source"},
    "document": {"source", "title", "context", "citations"},
    "tool_use": {"id", "name", "input", "caller"},
    "tool_result": {"tool_use_id", "content", "is_error"},
    "thinking": {"thinking", "signature"},
    "redacted_thinking": {"data"},
}
_REQUIRED_FIELDS: dict[str, dict[str, type]] = {
    "text": {"text": str},
    "image": {"source": dict},
    "document": {"source": dict},
    "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str},
    "thinking": {"thinking": str, "signature": str},
    "redacted_thinking": {"data": str},
}
_UNCACHEABLE = {"thinking", "redacted_thinking"}
_USER_ONLY = {"tool_result", "image", "document"}
_ASSISTANT_ONLY = {"tool_use", "server_tool_use", "thinking", "redacted_thinking"}
_METADATA_FIELDS = {"user_id"}


def signature(thinking: str) -> str:
    """The signature that the test upstream gives a thinking block, and accepts for that text only."""
    return SIGNATURE_PREFIX + hashlib.sha256(thinking.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def problem(body: Any, *, counting: bool = False) -> str | None:
    """The first thing that is wrong with a request, or None; `counting` for count_tokens."""
    return next(_problems(body, counting), None)


def _problems(body: Any, counting: bool) -> Iterator[str]:
    if not isinstance(body, dict):
        yield "Input should be a valid dictionary"
        return
    yield from _top_level(body, counting)
    messages = body.get("messages")
    if not isinstance(messages, list):
        yield "messages: Field required" if messages is None else "messages: Input should be a valid list"
        return
    if not messages:
        yield "messages: at least one message is required"
        return
    for index, message in enumerate(messages):
        yield from _shape(index, message)
    if messages[0]["role"] != "user":
        yield 'messages: first message must use the "user" role'
    for index, message in enumerate(messages):
        yield from _content(f"messages.{index}", message, last=index == len(messages) - 1)
    yield from _pairs([_blocks(message) for message in messages])
    yield from _ending(messages[-1])


def _top_level(body: dict[str, Any], counting: bool) -> Iterator[str]:
    if not isinstance(body.get("model"), str) or not body["model"]:
        yield "model: Field required"
    if not counting:
        limit = body.get("max_tokens")
        if limit is None:
            yield "max_tokens: Field required"
        elif not isinstance(limit, int) or isinstance(limit, bool):
            yield "max_tokens: Input should be a valid integer"
        elif limit < 1:
            yield "max_tokens: must be greater than or equal to 1"
    metadata = body.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        yield "metadata: Input should be a valid dictionary"
    for name in metadata if isinstance(metadata, dict) else ():
        if name not in _METADATA_FIELDS:
            yield f"metadata.{name}: Extra inputs are not permitted"
    system = body.get("system")
    if isinstance(system, list):
        for index, block in enumerate(system):
            yield from _block(f"system.{index}", block)
    elif system is not None and not isinstance(system, str):
        yield "system: Input should be a valid string"


def _shape(index: int, message: Any) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"messages.{index}: Input should be a valid dictionary"
        return
    role = message.get("role")
    if role is None:
        yield f"messages.{index}.role: Field required"
    elif role not in _ROLES:
        yield f'messages: Unexpected role "{role}". Allowed roles are "user" or "assistant".'
    if not isinstance(message.get("content"), str | list):
        yield f"messages.{index}.content: Field required"
    for name in message:
        if name not in {"role", "content"}:
            yield f"messages.{index}.{name}: Extra inputs are not permitted"


def _content(where: str, message: dict[str, Any], *, last: bool) -> Iterator[str]:
    if not message["content"] and not (last and message["role"] == "assistant"):
        yield f"{where}: all messages must have non-empty content except for the optional final assistant message"
    if isinstance(message["content"], str) and message["content"] and not message["content"].strip():
        yield "messages: text content blocks must contain non-whitespace text"
    forbidden = _USER_ONLY if message["role"] == "assistant" else _ASSISTANT_ONLY
    for index, block in enumerate(_blocks(message)):
        yield from _block(f"{where}.content.{index}", block)
        if block["type"] in forbidden:
            yield f"{where}: `{block['type']}` blocks are not allowed in {message['role']} messages"
    if message["role"] == "assistant" and _blocks(message) and _blocks(message)[-1]["type"] in _UNCACHEABLE:
        yield f"{where}: The final block in an assistant message cannot be `thinking`."
    yield from _server_tools(where, _blocks(message), last=last)


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []


def _block(where: str, block: Any) -> Iterator[str]:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        yield f"{where}: Input should be a valid dictionary with a type"
        return
    kind = block["type"]
    if kind not in _BLOCK_FIELDS:
        if "incomplete" in block:  # no block of any kind has it; it is the relay's own mark
            yield f"{where}.{kind}.incomplete: Extra inputs are not permitted"
        return
    for name, needed in _REQUIRED_FIELDS[kind].items():
        if not isinstance(block.get(name), needed):
            yield f"{where}.{kind}.{name}: Field required"
            return
    for name in block.keys() - _BLOCK_FIELDS[kind] - {"type"}:
        if name != "cache_control" or kind in _UNCACHEABLE:
            yield f"{where}.{kind}.{name}: Extra inputs are not permitted"
    if kind == "text":
        yield from _text(block)
    elif kind == "thinking":
        yield from _thinking(where, block)
    elif kind == "tool_result" and isinstance(block.get("content"), list):
        for index, inner in enumerate(block["content"]):
            yield from _block(f"{where}.tool_result.content.{index}", inner)


def _text(block: dict[str, Any]) -> Iterator[str]:
    if not block["text"]:
        yield "messages: text content blocks must be non-empty"
    elif not block["text"].strip():
        yield "messages: text content blocks must contain non-whitespace text"


def _thinking(where: str, block: dict[str, Any]) -> Iterator[str]:
    """Signatures of real models pass unchecked; empty ones, and our own on another text, do not."""
    given = block["signature"]
    if not given or (given.startswith(SIGNATURE_PREFIX) and given != signature(block["thinking"])):
        yield f"{where}: Invalid `signature` in `thinking` block"


def _pairs(contents: list[list[dict[str, Any]]]) -> Iterator[str]:
    """Every tool_use has its tool_result at the head of the next message, and every result its call."""
    seen: set[str] = set()
    for index, blocks in enumerate(contents):
        before = _ids(contents[index - 1], "tool_use", "id") if index else []
        for position, block in enumerate(blocks):
            if block["type"] == "tool_result" and block["tool_use_id"] not in before:
                yield (
                    f"messages.{index}.content.{position}: unexpected `tool_use_id` found in `tool_result` blocks: "
                    f"{block['tool_use_id']}. Each `tool_result` block must have a corresponding `tool_use` block "
                    "in the previous message."
                )
            if block["type"] == "tool_use":
                if block["id"] in seen:
                    yield f"messages.{index}.content.{position}: `tool_use` ids must be unique"
                seen.add(block["id"])
        yield from _answers(index, _ids(blocks, "tool_use", "id"), contents[index + 1 : index + 2])


def _answers(index: int, calls: list[str], following: list[list[dict[str, Any]]]) -> Iterator[str]:
    head: list[dict[str, Any]] = []
    for block in following[0] if following else []:
        if block["type"] != "tool_result":
            break
        head.append(block)
    results = _ids(head, "tool_result", "tool_use_id")
    if missing := [call for call in calls if call not in results]:
        yield (
            f"messages.{index}: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block "
            "in the next message."
        )
    for call in calls:
        if results.count(call) > 1:
            yield (
                f"messages.{index + 1}: each tool_use must have a single result. "
                f"Found multiple `tool_result` blocks with id: {call}"
            )


def _ids(blocks: list[dict[str, Any]], kind: str, field: str) -> list[str]:
    return [block[field] for block in blocks if block["type"] == kind]


def _server_tools(where: str, blocks: list[dict[str, Any]], *, last: bool) -> Iterator[str]:
    """Server tools' calls and results stand in one message, in order; only a paused last turn may lack one."""
    open_calls: list[Any] = []
    for position, block in enumerate(blocks):
        if block["type"] == "server_tool_use":
            open_calls.append(block.get("id"))
        elif block["type"].endswith("_tool_result") and not block["type"].startswith("mcp_"):
            if block.get("tool_use_id") not in open_calls:
                yield (
                    f"{where}.content.{position}: unexpected `tool_use_id` found in `{block['type']}` blocks: "
                    f"{block.get('tool_use_id')}. Each `{block['type']}` block must have a corresponding "
                    "`server_tool_use` block before it."
                )
            else:
                open_calls.remove(block.get("tool_use_id"))
    if open_calls and not last:
        yield f"{where}: server tool use with id `{open_calls[0]}` was found without a corresponding result block"


def _ending(message: dict[str, Any]) -> Iterator[str]:
    if message["role"] != "assistant":
        return
    blocks = _blocks(message)
    text = message["content"] if isinstance(message["content"], str) else blocks[-1].get("text") if blocks else ""
    if isinstance(text, str) and text != text.rstrip():
        yield "messages: final assistant content cannot end with trailing whitespace"
