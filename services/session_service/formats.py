"""A context in the shapes of other protocols; what goes in is a valid Claude request.

Its one invariant: in the openai shape the tool messages of an assistant message follow it at once.
"""

from typing import Any

from services.session_service.drafts import text_of
from shared.json import dump_text


def to_format(messages: list[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    """The messages as `claude` (unchanged), `openai` (Chat Completions) or `plain` (role and text)."""
    if form == "openai":
        return [shaped for message in messages for shaped in _openai(message)]
    if form == "plain":
        return [{"role": message["role"], "content": _text(message["content"])} for message in messages]
    return messages


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else text_of(content)


def _openai(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    if isinstance(content, str):
        return [{"role": message["role"], "content": content}]
    if message["role"] == "assistant":
        return [_openai_assistant(content)]
    results = [block for block in content if block["type"] == "tool_result"]
    parts = [_openai_part(block) for block in content if block["type"] != "tool_result"]
    shaped = [
        {"role": "tool", "tool_call_id": block["tool_use_id"], "content": _result_text(block.get("content"))}
        for block in results
    ]
    if parts:
        only_text = all(part["type"] == "text" for part in parts)
        joined = "".join(part["text"] for part in parts) if only_text else parts
        shaped.append({"role": "user", "content": joined})
    return shaped


def _openai_assistant(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": dump_text(block["input"])},
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    text = text_of(blocks)
    if calls:
        return {"role": "assistant", "content": text or None, "tool_calls": calls}
    return {"role": "assistant", "content": text or _named(blocks[-1])}


def _openai_part(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    source = block.get("source")
    if block["type"] == "image" and isinstance(source, dict):
        url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
        return {"type": "image_url", "image_url": {"url": url}}
    if block["type"] == "document" and isinstance(source, dict) and source.get("type") == "text":
        return {"type": "text", "text": str(source.get("data") or "")}
    return {"type": "text", "text": _named(block)}


def _named(block: dict[str, Any]) -> str:
    """Of a block that Chat Completions does not know, that it was there: this keeps its message's place."""
    return f"[{block['type']}]"


def _result_text(content: Any) -> str:
    if isinstance(content, list):
        return text_of([block for block in content if isinstance(block, dict) and block.get("type") == "text"])
    return content if isinstance(content, str) else dump_text(content) if content is not None else ""
