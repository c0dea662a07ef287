"""What goes upstream: the client's own request, or the stored context with the client's request around it.

Its one invariant: whatever the client sent goes on unchanged in value; of a rebuilt context only cache marks of
earlier messages are ever dropped, oldest first, because upstream takes four.
"""

from typing import Any, Final

from services.relay.assembly import storable
from services.relay.history import Opened, blocks_of
from services.relay.request import ClaudeRequest

_MAX_CACHE_MARKS: Final = 4

Message = dict[str, Any]


def upstream_body(request: ClaudeRequest, opened: Opened | None) -> dict[str, Any]:
    """The body for upstream; the client's own where nothing stored belongs before it."""
    if opened is None or opened.is_whole or _stands_alone(opened):
        return request.body
    messages = _with_new(opened, request.messages)
    body = {**request.body, "messages": messages}
    if stored := opened.turn.context.system:
        body["system"] = _joined_system(request.body.get("system"), stored)
    _limit_cache_marks(body)
    return body


def _stands_alone(opened: Opened) -> bool:
    """Whether the context holds nothing but this turn's own messages."""
    first_new = opened.turn.messages[0].seq
    included = opened.turn.context.receipt.included
    return not opened.turn.session.session_summary and all(start >= first_new for start, _ in included)


def _with_new(opened: Opened, new: list[Message]) -> list[Message]:
    """The context, ending with the new messages as the client sent them."""
    messages: list[Message] = list(opened.turn.context.messages)
    included = opened.turn.context.receipt.included
    last_new = next((each.seq for each in reversed(opened.turn.messages) if each.role != "system"), 0)
    if not any(start <= last_new <= end for start, end in included):
        # The store leaves out what no upstream would take; whether it does is for upstream to say.
        return messages + new
    if any(each.replaced for each in opened.array.messages):
        _put_back(messages, new)
    return messages


def _put_back(messages: list[Message], new: list[Message]) -> None:
    """In place of what was stored for the new messages, what the client sent, where the context ends with it."""
    sent = [block for message in new if message["role"] != "system" for block in blocks_of(message["content"])]
    last = blocks_of(messages[-1]["content"])
    stored, _ = storable(sent)
    if last[-len(sent) :] == stored:
        messages[-1] = {"role": messages[-1]["role"], "content": last[: -len(sent)] + sent}


def _joined_system(own: Any, stored: str) -> Any:
    """The client's system prompt first and untouched, so that its part of the prompt cache goes on hitting."""
    block = {"type": "text", "text": stored}
    if own is None or own == "":
        return stored
    if isinstance(own, str):
        return [{"type": "text", "text": own}, block]
    return [*own, block] if isinstance(own, list) else own


def _limit_cache_marks(body: dict[str, Any]) -> None:
    """Drops the oldest cache marks of messages where they and the client's other ones are more than four."""
    left = _MAX_CACHE_MARKS - ("cache_control" in body) - sum(map(_marks, (body.get("system"), body.get("tools"))))
    for place in range(len(body["messages"]) - 1, -1, -1):
        content = body["messages"][place]["content"]
        marks = _marks(content)
        if marks > left:
            body["messages"][place] = {**body["messages"][place], "content": _with_last_marks(content, max(left, 0))}
        left -= marks


def _with_last_marks(blocks: list[Any], count: int) -> list[Any]:
    kept = []
    for block in reversed(blocks):
        if isinstance(block, dict) and block.get("cache_control") is not None:
            count -= 1
            if count < 0:
                block = {name: value for name, value in block.items() if name != "cache_control"}
        kept.append(block)
    return kept[::-1]


def _marks(blocks: Any) -> int:
    if not isinstance(blocks, list):
        return 0
    return sum(isinstance(block, dict) and block.get("cache_control") is not None for block in blocks)
