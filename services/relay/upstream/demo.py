"""The demo account's adapter: the Claude protocol around the demo model, without any network.

Its one invariant: to whoever reads the answer it is a Claude answer, status, headers, body and events.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from services.relay import sse
from services.relay.upstream import COUNT_TOKENS_PATH, UpstreamAnswer, UpstreamRequest, encode_body
from services.relay.upstream.demo_model import Reply, input_tokens, reply

_CHINESE_TOKENS_PER_DELTA = 2
_CACHE_USAGE = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}


class DemoUpstream:
    """The local stand-in; `delay_seconds` is the pause before each delta of a stream."""

    def __init__(self, *, delay_seconds: float = 0.0) -> None:
        self._delay_seconds = delay_seconds

    async def open(self, request: UpstreamRequest) -> UpstreamAnswer:
        """Answers at once; an invalid request gets status 400 and Claude's error body. Never raises."""
        problem = _problem(request)
        if problem is not None:
            error = {"type": "invalid_request_error", "message": problem}
            return _Answer(400, "application/json", _once({"type": "error", "error": error}))
        if request.path == COUNT_TOKENS_PATH:
            return _Answer(200, "application/json", _once({"input_tokens": input_tokens(request.body)}))
        message, model_reply = _message(request.body), reply(request.body)
        if request.stream:
            chunks = self._paced(_events(message, model_reply))
            return _Answer(200, "text/event-stream; charset=utf-8", chunks)
        return _Answer(200, "application/json", _once(_whole(message, model_reply)))

    async def models(self) -> list[dict[str, Any]]:
        """It has one, whatever name it is asked by."""
        return []

    async def _paced(self, events: Iterator[tuple[str, dict[str, Any]]]) -> AsyncIterator[bytes]:
        for name, data in events:
            if name == "content_block_delta":
                await asyncio.sleep(self._delay_seconds)
            yield sse.format_event(name, {"type": name, **data})


class _Answer(UpstreamAnswer):
    __slots__ = ("_chunks",)

    def __init__(self, status: int, content_type: str, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(status, {"content-type": content_type, "request-id": f"req_demo_{uuid.uuid4().hex}"})
        self._chunks = chunks

    async def chunk(self) -> bytes:
        return await anext(self._chunks, b"")

    async def aclose(self) -> None:
        return


async def _once(value: Any) -> AsyncIterator[bytes]:
    yield encode_body(value)


def _message(body: dict[str, Any]) -> dict[str, Any]:
    """The message as it starts."""
    return {
        "id": f"msg_demo_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body.get("model") or "demo",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": input_tokens(body), **_CACHE_USAGE, "output_tokens": 1},
    }


def _whole(message: dict[str, Any], model_reply: Reply) -> dict[str, Any]:
    content = [{"type": "text", "text": model_reply.text}] if model_reply.pieces else []
    return message | {
        "content": [model_reply.tool_use] if model_reply.tool_use else content,
        "stop_reason": model_reply.stop_reason,
        "stop_sequence": model_reply.stop_sequence,
        "usage": message["usage"] | {"output_tokens": model_reply.output_tokens},
    }


def _events(message: dict[str, Any], model_reply: Reply) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "message_start", {"message": message}
    call = model_reply.tool_use
    if call or model_reply.pieces:
        start = call | {"input": {}} if call else {"type": "text", "text": ""}
        yield "content_block_start", {"index": 0, "content_block": start}
        yield "ping", {}
        for delta in _input_deltas(call) if call else _text_deltas(model_reply.pieces):
            yield "content_block_delta", {"index": 0, "delta": delta}
        yield "content_block_stop", {"index": 0}
    stop = {"stop_reason": model_reply.stop_reason, "stop_sequence": model_reply.stop_sequence}
    yield "message_delta", {"delta": stop, "usage": message["usage"] | {"output_tokens": model_reply.output_tokens}}
    yield "message_stop", {}


def _text_deltas(pieces: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Word by word; of Chinese, a few characters at a time."""
    waiting = ""
    for piece in pieces:
        waiting += piece
        if piece[-1].isascii() or len(waiting) >= _CHINESE_TOKENS_PER_DELTA:
            yield {"type": "text_delta", "text": waiting}
            waiting = ""
    if waiting:
        yield {"type": "text_delta", "text": waiting}


def _input_deltas(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    text = json.dumps(call["input"])
    yield {"type": "input_json_delta", "partial_json": ""}
    for start in range(0, len(text), 16):
        yield {"type": "input_json_delta", "partial_json": text[start : start + 16]}


def _problem(request: UpstreamRequest) -> str | None:
    """What Claude would refuse and the demo model could not work with; other fields are not looked at."""
    messages = request.body.get("messages")
    if not isinstance(messages, list):
        return "messages: Field required"
    if not messages:
        return "messages: at least one message is required"
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in {"user", "assistant"}:
            return f'messages: Unexpected role "{role}". Allowed roles are "user" or "assistant".'
        if not isinstance(message.get("content"), str | list):
            return f"messages.{index}.content: Field required"
    if messages[0]["role"] != "user":
        return 'messages: first message must use the "user" role'
    return None if request.path == COUNT_TOKENS_PATH else _limit_problem(request.body)


def _limit_problem(body: dict[str, Any]) -> str | None:
    limit = body.get("max_tokens")
    if limit is None:
        return "max_tokens: Field required"
    if not isinstance(limit, int) or isinstance(limit, bool):
        return "max_tokens: Input should be a valid integer"
    if limit < 1:
        return "max_tokens: must be greater than or equal to 1"
    stops = body.get("stop_sequences") or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        return "stop_sequences: Input should be a valid list of strings"
    return None
