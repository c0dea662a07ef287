"""What goes upstream: the client's own request, or the stored context with the client's request around it.

Its one invariant: whatever the client sent goes on unchanged in value; of a rebuilt context only cache marks of
earlier messages are ever dropped, oldest first, because upstream takes four.
"""

from typing import Any

from services.relay.arrays import blocks_of
from services.relay.assembly import storable
from services.relay.history import Opened
from services.relay.request import ClaudeRequest
from shared import cache_marks

Message = dict[str, Any]


def upstream_body(request: ClaudeRequest, opened: Opened | None) -> dict[str, Any]:
    """The body for upstream; the client's own where nothing stored belongs before it."""
    if opened is None or opened.is_whole or _stands_alone(opened):
        return request.body
    if request.continuation is not None:
        messages = list(opened.turn.context.messages)
        if opened.prefill:
            messages.append({"role": "assistant", "content": opened.prefill})
    else:
        messages = _with_new(opened, request.messages)
    body = {**request.body, "messages": messages}
    if stored := opened.turn.context.system:
        body["system"] = _joined_system(request.body.get("system"), stored)
    _limit_cache_marks(body)
    return body


def _stands_alone(opened: Opened) -> bool:
    """Whether the context holds nothing but this turn's own messages."""
    if not opened.turn.messages:
        return False
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
    spoken = [message for message in new if message["role"] != "system"]
    sent = [block for message in spoken for block in blocks_of(message["content"])]
    *before, last = messages
    earlier = _earlier(blocks_of(last["content"]), storable(sent)[0], is_one=len(spoken) == 1)
    if earlier is None:
        return messages
    if len(spoken) == 1 and not earlier:
        return [*before, spoken[0]]
    return [*before, {"role": last["role"], "content": earlier + sent}]


def _earlier(last: list[Any], sent: list[Any], *, is_one: bool) -> list[Any] | None:
    """What the context's last message holds before what was sent: a question that went without answer, and results
    that the store has put in for calls that have none. None where the store's form of it is to stay.

    The store puts results first, as upstream wants them. What it leaves out of a message, because no upstream would
    take it, is for upstream to say.
    """
    if last[-len(sent) :] == sent:
        return last[: -len(sent)]
    rest = [block for block in last if block not in sent]
    is_cut = any(block not in last for block in sent)
    return rest if is_one and is_cut and all(block.get("type") == "tool_result" for block in rest) else None


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
    others = ("cache_control" in body) + sum(map(cache_marks.count, (body.get("system"), body.get("tools"))))
    left = max(0, cache_marks.MOST - others)
    for place in range(len(body["messages"]) - 1, -1, -1):
        content = body["messages"][place]["content"]
        marks = cache_marks.count(content)
        if marks > left:
            body["messages"][place] = {**body["messages"][place], "content": cache_marks.with_last(content, left)}
        left -= min(marks, left)
