"""The demo model: an answer made by rules from the context it was sent.

Its one invariant: the same request gives the same text, and the text never claims to come from a language
model.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from services.relay import transcript
from services.relay.upstream.demo_extract import extract
from services.relay.upstream.demo_names import asks_for_name, is_chinese, latest_name

_QUOTED_CHARACTERS = 60
_ATTACHMENT_TOKENS = 1_500
_MESSAGE_OVERHEAD_TOKENS = 4
_COUNTED_CHARACTERS = 100_000

# A Chinese character counts as one token, and so does a word with the blank before it, or a sign.
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_TOKEN = re.compile(rf"\s*(?:[{_CJK}]|(?:(?![{_CJK}])[^\W_]){{1,12}}|.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reply:
    """`pieces` is the text as tokens; `tool_use` a block instead of a text."""

    pieces: tuple[str, ...]
    tool_use: dict[str, Any] | None
    stop_reason: str
    stop_sequence: str | None
    output_tokens: int

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def reply(request: dict[str, Any]) -> Reply:
    """The answer to a valid request, within its `max_tokens` and `stop_sequences`."""
    if call := _forced_call(request):
        return Reply((), call, "tool_use", None, estimate_tokens(json.dumps(call["input"], ensure_ascii=False)))
    text = _continued(request, _answer(request))
    stop_sequence = None
    found = [(text.find(stop), stop) for stop in request.get("stop_sequences") or [] if stop and stop in text]
    if found:
        position, stop_sequence = min(found)
        text = text[:position]
    tokens = tuple(_TOKEN.findall(text))
    limit = request.get("max_tokens", len(tokens))
    if len(tokens) > limit:
        return Reply(tokens[:limit], None, "max_tokens", None, limit)
    return Reply(tokens, None, "stop_sequence" if stop_sequence else "end_turn", stop_sequence, max(1, len(tokens)))


def estimate_tokens(text: str) -> int:
    """Tokens of a text; of a very long one only the beginning is counted and the rest reckoned from it."""
    counted = sum(1 for _ in _TOKEN.finditer(text, 0, _COUNTED_CHARACTERS))
    return counted if len(text) <= _COUNTED_CHARACTERS else counted * len(text) // _COUNTED_CHARACTERS


def input_tokens(request: dict[str, Any]) -> int:
    """A plausible figure for the whole input: texts, tools, and a flat price for images and documents."""
    total = sum(_content_tokens(message["content"]) + _MESSAGE_OVERHEAD_TOKENS for message in request["messages"])
    total += _content_tokens(request.get("system") or "")
    if request.get("tools"):
        total += estimate_tokens(json.dumps(request["tools"], ensure_ascii=False))
    return total


def _content_tokens(content: Any) -> int:
    if isinstance(content, str):
        return estimate_tokens(content)
    if not isinstance(content, list):
        return 0
    total = 0
    for block in content:
        if not isinstance(block, dict):
            continue
        if block.get("type") in ("image", "document"):
            total += _ATTACHMENT_TOKENS
        elif block.get("type") == "tool_use":
            total += estimate_tokens(json.dumps(block.get("input"), ensure_ascii=False))
        else:
            total += _content_tokens(block.get("text") or block.get("content") or block.get("thinking"))
    return total


def _answer(request: dict[str, Any]) -> str:
    spoken = [message for message in request["messages"] if message["role"] == "user"]
    texts = [_text(message["content"]) for message in spoken]
    last = texts[-1] if texts else ""
    if request.get("system") == transcript.SYSTEM:
        return extract(last)
    name = latest_name(texts) or latest_name([_text(request.get("system") or "")], outright_only=True)
    chinese = is_chinese(last)
    parts = [_opening(last, name, spoken, chinese=chinese), _introduction(request["messages"], chinese=chinese)]
    return ("" if chinese else " ").join(part for part in parts if part)


def _opening(last: str, name: str | None, spoken: list[dict[str, Any]], *, chinese: bool) -> str:
    if asks_for_name(last):
        if name is None:
            return "我不知道你的名字，请告诉我。" if chinese else "I do not know your name. Please tell me."
        return f"你叫{_spaced(name)}。" if chinese else f"Your name is {name}."
    if latest_name([last]) is not None:
        return f"你好{_spaced(name or '')}！" if chinese else f"Hello {name}!"
    if spoken and (result := _tool_result(spoken[-1]["content"])) is not None:
        return f"工具返回了：「{_shortened(result)}」。" if chinese else f'The tool answered: "{_shortened(result)}".'
    if not last:
        return ""
    return f"你说的是：「{_shortened(last)}」。" if chinese else f'You said: "{_shortened(last)}".'


def _introduction(messages: list[dict[str, Any]], *, chinese: bool) -> str:
    count, images = len(messages), sum(_images(message["content"]) for message in messages)
    if chinese:
        seen = f"{count} 条消息" + (f"和 {images} 张图片" if images else "")
        return f"我是本机的演示模型（demo），按规则作答，不是真正的大模型。我在上下文里看到 {seen}。"
    seen = f"{count} message{'s' * (count != 1)}"
    if images:
        seen += f" and {images} image{'s' * (images != 1)}"
    return f"I am the demo model, a small local stand-in that answers by rules, not a real model. I can see {seen}."


def _continued(request: dict[str, Any], answer: str) -> str:
    """A prefill is gone on with: by the rest of the answer if it is its beginning, else by all of it."""
    last = request["messages"][-1]
    if last["role"] != "assistant":
        return answer
    prefill = _text(last["content"])
    if answer.startswith(prefill):
        return answer[len(prefill) :]
    return answer if not prefill or is_chinese(answer) else f" {answer}"


def _spaced(name: str) -> str:
    return name if is_chinese(name) else f" {name}"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _QUOTED_CHARACTERS else text[:_QUOTED_CHARACTERS] + "…"


def _blocks(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, list):
        yield from (block for block in content if isinstance(block, dict))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_strings(block.get("text") for block in _blocks(content) if block.get("type") == "text"))


def _strings(values: Iterable[Any]) -> Iterator[str]:
    return (value for value in values if isinstance(value, str))


def _images(content: Any) -> int:
    return sum(block.get("type") == "image" for block in _blocks(content))


def _tool_result(content: Any) -> str | None:
    results = [_text(block.get("content")) for block in _blocks(content) if block.get("type") == "tool_result"]
    return "\n".join(results) if results else None


def _forced_call(request: dict[str, Any]) -> dict[str, Any] | None:
    """A tool_use when the request leaves no choice, with arguments that fit the tool's schema roughly."""
    choice, tools = request.get("tool_choice"), request.get("tools")
    if not isinstance(choice, dict) or choice.get("type") not in ("any", "tool") or not isinstance(tools, list):
        return None
    named = [tool for tool in tools if isinstance(tool, dict) and choice.get("name") in (None, tool.get("name"))]
    if not named:
        return None
    users = [message["content"] for message in request["messages"] if message["role"] == "user"]
    arguments = _example(named[0].get("input_schema"), _text(users[-1]) if users else "")
    digest = hashlib.sha256(json.dumps(request["messages"], sort_keys=True).encode()).hexdigest()
    call = {"type": "tool_use", "id": f"toolu_demo{digest[:20]}", "name": named[0].get("name"), "input": arguments}
    return call if isinstance(arguments, dict) else call | {"input": {}}


def _example(schema: Any, text: str, depth: int = 0) -> Any:
    if not isinstance(schema, dict) or depth > 8:
        return {}
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        properties, required = schema.get("properties"), schema.get("required")
        properties = properties if isinstance(properties, dict) else {}
        wanted = _strings(required) if isinstance(required, list) and required else properties
        return {name: _example(properties.get(name), text, depth + 1) for name in wanted}
    return {"string": _shortened(text), "integer": 1, "number": 1.0, "boolean": True, "array": []}.get(str(kind))
