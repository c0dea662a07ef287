"""The messages that the test upstream gives, plain and as events.

Its one invariant: the events of a message, assembled, are that message.
"""

import json
import uuid
from collections.abc import Iterator
from typing import Any

from tests.upstream import rules
from tests.upstream.script import Insert, Step, exact_bytes

DEFAULT_STEP = Step()
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_TOOL_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use")


def error_body(status: int, message: str, request_id: str = "req_test") -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def count_tokens(request: dict[str, Any]) -> int:
    """A figure that grows with the request and is the same for the same request."""
    seen = {name: request.get(name) for name in ("system", "messages", "tools")}
    return len(json.dumps(seen, ensure_ascii=False)) // 4 + 1


def message(request: dict[str, Any], step: Step) -> dict[str, Any]:
    """The plain answer: what the step says, else made from the request alone."""
    content = step.blocks if step.blocks is not None else _content(request, step)
    calls = any(block.get("type") == "tool_use" for block in content)
    answer = {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": step.model or request.get("model") or "test-model",
        "content": content,
        "stop_reason": step.stop_reason or ("tool_use" if calls else "end_turn"),
        "stop_sequence": step.stop_sequence,
        "usage": {
            "input_tokens": count_tokens(request),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len(json.dumps(content)) // 4 + 1,
            "service_tier": "standard",
        }
        | (step.usage or {}),
    }
    if step.usage is None:
        del answer["usage"]
    return answer | step.message


def _content(request: dict[str, Any], step: Step) -> list[dict[str, Any]]:
    if step.huge_answer_bytes is not None:
        return [{"type": "text", "text": "x" * step.huge_answer_bytes}]
    if step.text is not None:
        return [{"type": "text", "text": step.text}]
    if call := _forced_tool(request):
        return [call]
    text = f"You said: {last_user_text(request)}. I see {len(request.get('messages', []))} messages."
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if (request.get("thinking") or {}).get("type") in {"enabled", "adaptive"}:
        thought = "The user wants an echo."
        blocks.insert(0, {"type": "thinking", "thinking": thought, "signature": rules.signature(thought)})
    return blocks


def _forced_tool(request: dict[str, Any]) -> dict[str, Any] | None:
    choice, tools = request.get("tool_choice") or {}, request.get("tools") or []
    if not tools or choice.get("type") not in {"any", "tool"}:
        return None
    name = choice.get("name", tools[0].get("name"))
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {"asked": True}}


def last_user_text(request: dict[str, Any]) -> str:
    for one in reversed(request.get("messages", [])):
        if one.get("role") == "user":
            content = one["content"]
            if isinstance(content, str):
                return content
            return " ".join(str(_text(block)) for block in content)
    return ""


def _text(block: dict[str, Any]) -> Any:
    return block.get("text") or block.get("content") or f"[{block.get('type')}]"


def events(answer: dict[str, Any], step: Step) -> Iterator[bytes]:
    """The stream of a message, event by event, with the step's inserts, faults and line ends."""
    if step.raw_events is not None:
        yield from map(exact_bytes, step.raw_events)
        return
    inserts = [*step.insert, *_faults(step)]
    for count, event in enumerate(_plain_events(answer, step)):
        for insert in inserts:
            if insert.after_events == count:
                yield _inserted(insert, step.newline)
        if step.error_event is not None and count >= step.fault_at:
            yield format_event("error", step.error_event, step.newline)
            return
        yield event


def _faults(step: Step) -> Iterator[Insert]:
    if step.malformed_event:
        broken = '{"type":"content_block_delta","index":0,"delta":{"type":"text_del'
        yield Insert(after_events=step.fault_at, raw=f"event: content_block_delta\ndata: {broken}\n\n")
    if step.huge_event_bytes is not None:
        delta = {"type": "text_delta", "text": "x" * step.huge_event_bytes}
        data = {"type": "content_block_delta", "index": 0, "delta": delta}
        yield Insert(after_events=step.fault_at, event="content_block_delta", data=data)


def _inserted(insert: Insert, newline: str) -> bytes:
    if insert.raw is not None:
        return exact_bytes(insert.raw)
    return format_event(insert.event, insert.data, newline)


def format_event(name: str, data: Any, newline: str = "\n") -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    try:
        payload = text.encode()
    except UnicodeEncodeError:
        payload = json.dumps(data, separators=(",", ":")).encode()
    return f"event: {name}{newline}data: ".encode() + payload + (newline * 2).encode()


def _plain_events(answer: dict[str, Any], step: Step) -> Iterator[bytes]:
    def event(kind: str, **fields: Any) -> bytes:
        return format_event(kind, {"type": kind, **fields}, step.newline)

    usage = answer.get("usage")
    start = answer | {"content": [], "stop_reason": None, "stop_sequence": None}
    if isinstance(usage, dict) and usage.get("output_tokens"):
        start["usage"] = usage | {"output_tokens": 1}
    yield event("message_start", message=start)
    for index, block in enumerate(answer["content"]):
        first, deltas = _streamed(block, step.delta_characters)
        yield event("content_block_start", index=index, content_block=first)
        if index == 0:
            yield event("ping")
        for delta in deltas:
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    end = {"stop_reason": answer["stop_reason"], "stop_sequence": answer["stop_sequence"]}
    yield event("message_delta", delta=end, **({} if usage is None else {"usage": usage}))
    yield event("message_stop")


def _streamed(block: dict[str, Any], size: int) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """A block's start, and the deltas that make it whole; a kind without deltas starts whole."""
    kind = block.get("type")
    if kind == "text":
        start = {key: value for key, value in block.items() if key != "citations"}
        return start | {"text": ""}, _text_deltas(block, size)
    if kind == "thinking":
        return block | {"thinking": "", "signature": ""}, _thinking_deltas(block, size)
    if kind in _TOOL_CALLS:
        return block | {"input": {}}, _input_deltas(block, size)
    return block, iter(())


def _pieces(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def _text_deltas(block: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    for piece in _pieces(block["text"], max(size, len(block["text"]) // 4096)):
        yield {"type": "text_delta", "text": piece}
    for citation in block.get("citations") or []:
        yield {"type": "citations_delta", "citation": citation}


def _thinking_deltas(block: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    for piece in _pieces(block["thinking"], size):
        yield {"type": "thinking_delta", "thinking": piece}
    yield {"type": "signature_delta", "signature": block["signature"]}


def _input_deltas(block: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    yield {"type": "input_json_delta", "partial_json": ""}
    if block["input"]:
        for piece in _pieces(json.dumps(block["input"]), size):
            yield {"type": "input_json_delta", "partial_json": piece}
