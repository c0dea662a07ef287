"""Assembles the Claude message beside the stream, event by event.

Its one invariant: once `finished`, `message()` is what a plain answer would have held; before that,
`partial()` is the part of it that has come, and says of every block whether it is whole.
"""

import json
import math
from contextlib import suppress
from typing import Any, ClassVar, NoReturn, TypeVar

import orjson
from pydantic_core import from_json

from services.relay.sse import Event
from services.relay.upstream import ANSWER_LIMIT_BYTES, AnswerTooLarge, UpstreamProtocolError

STORABLE_DEPTH = 100  # the store reads JSON to a depth of 200, and what we give it stands inside more

_APPENDING_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
_REPLACING_DELTAS = frozenset({"signature_delta", "compaction_delta"})
_NOT_CHANGED_BY_DELTA = frozenset({"type", "id", "role", "content", "usage"})

_T = TypeVar("_T")


class MalformedEvent(UpstreamProtocolError):
    """A known event whose JSON does not parse, or that says what the protocol does not allow there."""

    kind = "malformed"


class _Block:
    """One content block: as it started, and what came since.

    Texts grow in one buffer each: kept as they come, a few characters a piece, they would take five times the room.
    """

    __slots__ = ("citations", "open", "start", "texts")

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start
        self.texts: dict[str, bytearray] = {}
        self.citations: list[Any] = []
        self.open = True

    def add(self, delta: dict[str, Any]) -> None:
        kind = delta.get("type")
        if field := _APPENDING_DELTAS.get(str(kind)):
            self.texts.setdefault(field, bytearray()).extend(_halves(_expect(delta.get(field), str, str(kind))))
        elif kind == "citations_delta":
            self.citations.append(delta.get("citation"))
        elif str(kind) in _REPLACING_DELTAS:
            self.start.update((key, value) for key, value in delta.items() if key != "type")

    def value(self) -> dict[str, Any]:
        """The block so far; `incomplete` when its end has not come, or its tool input is not whole."""
        block = dict(self.start)
        for field, text in self.texts.items():
            if field == "partial_json":
                block.update(_tool_input(_whole(text)))
            else:
                block[field] = _whole(_halves(block.get(field) or "") + text)
        if self.citations:
            block["citations"] = [*(block.get("citations") or []), *self.citations]
        if self.open:
            block["incomplete"] = True
        return block


class Assembly:
    """Feed it every event; ask `committed`, `finished` and `error` at any time.

    `committed`: the first content_block_start or message_delta has come. `finished`: message_stop has
    come; what follows it is ignored. `error`: the body of the error event, once one has come.
    """

    def __init__(self, limit_bytes: int = ANSWER_LIMIT_BYTES) -> None:
        self.committed = False
        self.finished = False
        self.error: dict[str, Any] | None = None
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._message: dict[str, Any] | None = None
        self._blocks: dict[int, _Block] = {}

    def add(self, event: Event) -> None:
        """Takes one event in. Comments and events of unknown names only count in size.

        Raises MalformedEvent, and AnswerTooLarge when all events together exceed the limit.
        """
        self._size_bytes += len(event.raw)
        if self._size_bytes > self._limit_bytes:
            raise AnswerTooLarge(f"the answer is longer than {self._limit_bytes} bytes")
        if self.finished or not event.data:
            return
        if event.name in self._HANDLERS:
            self._HANDLERS[event.name](self, _parsed(event.name, event.data))
        elif not event.name:
            self._add_unnamed(event.data)

    def message(self) -> dict[str, Any]:
        """The whole message; only once `finished`."""
        if not self.finished:
            raise ValueError("the message is not finished")
        return self.partial()

    def partial(self) -> dict[str, Any]:
        """The message so far, its unfinished blocks marked `"incomplete": true`; {} before it started.

        A tool call whose JSON is not whole has `input` {} and the text that came in `partial_json`.
        """
        if self._message is None:
            return {}
        return self._message | {"content": [self._blocks[index].value() for index in sorted(self._blocks)]}

    def _add_unnamed(self, data: bytes) -> None:
        """Some upstreams send data lines only: there the JSON's `type` is the name, if it is JSON at all."""
        with suppress(ValueError, RecursionError):
            value = _exact_json(data)
            if isinstance(value, dict) and (handle := self._HANDLERS.get(str(value.get("type")))):
                handle(self, value)

    def _start_message(self, data: dict[str, Any]) -> None:
        if self._message is not None:
            raise MalformedEvent("a second message_start")
        self._message = dict(_expect(data.get("message"), dict, "message_start"))

    def _start_block(self, data: dict[str, Any]) -> None:
        message, index = self._started("content_block_start"), _index(data)
        if index in self._blocks:
            raise MalformedEvent("content_block_start of a block that has started")
        start = dict(_expect(data.get("content_block"), dict, "content_block_start"))
        self._blocks[index] = _Block(start)
        self.committed = True
        if start.get("type") == "fallback" and isinstance(start.get("to"), dict):
            message["model"] = start["to"].get("model", message.get("model"))

    def _add_delta(self, data: dict[str, Any]) -> None:
        self._open_block(data).add(_expect(data.get("delta"), dict, "content_block_delta"))

    def _stop_block(self, data: dict[str, Any]) -> None:
        self._open_block(data).open = False

    def _change_message(self, data: dict[str, Any]) -> None:
        """What a message_delta gives replaces what was there; counts are totals; nulls change nothing."""
        message = self._started("message_delta")
        changes = {key: value for key, value in data.items() if key != "delta"}
        changes |= _expect(data.get("delta", {}), dict, "message_delta")
        for key, value in changes.items():
            if key not in _NOT_CHANGED_BY_DELTA and (value is not None or key not in message):
                message[key] = value
        if isinstance(usage := data.get("usage"), dict):
            before = message.get("usage")
            told = {key: value for key, value in usage.items() if value is not None}
            message["usage"] = (before if isinstance(before, dict) else {}) | told
        self.committed = True

    def _stop_message(self, _: dict[str, Any]) -> None:
        self._started("message_stop")
        for block in self._blocks.values():
            block.open = False
        self.finished = True

    def _set_error(self, data: dict[str, Any]) -> None:
        self.error = data

    def _started(self, name: str) -> dict[str, Any]:
        if self._message is None:
            raise MalformedEvent(f"{name} before message_start")
        return self._message

    def _open_block(self, data: dict[str, Any]) -> _Block:
        block = self._blocks.get(_index(data))
        if block is None or not block.open:
            raise MalformedEvent("an event of a content block that is not open")
        return block

    def _hear_ping(self, _: dict[str, Any]) -> None:
        """It says nothing; one that cannot be read is broken all the same."""

    _HANDLERS: ClassVar = {
        "message_start": _start_message,
        "content_block_start": _start_block,
        "content_block_delta": _add_delta,
        "content_block_stop": _stop_block,
        "message_delta": _change_message,
        "message_stop": _stop_message,
        "error": _set_error,
        "ping": _hear_ping,
    }


def _parsed(name: str, data: bytes) -> dict[str, Any]:
    if name == "content_block_delta":
        with suppress(ValueError):  # faster, and exact enough for text; refuses lone surrogates
            return _expect(orjson.loads(data), dict, name)
    try:
        return _expect(_exact_json(data), dict, name)
    except (ValueError, RecursionError):
        raise MalformedEvent(f"{name} does not hold JSON") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _exact_json(data: bytes) -> Any:
    """All digits of big integers, and lone surrogates as they are; ValueError or RecursionError."""
    with suppress(ValueError):  # faster, with one string for the same key of many streams; refuses lone surrogates
        return from_json(data, allow_inf_nan=False, cache_strings="keys")
    return _DECODER.decode(data.decode())


def _expect(value: Any, kind: type[_T], where: str) -> _T:
    if not isinstance(value, kind):
        raise MalformedEvent(f"{where} lacks a {kind.__name__} where it needs one")
    return value


def _index(data: dict[str, Any]) -> int:
    index = _expect(data.get("index"), int, "an event of a content block")
    if index < 0 or isinstance(index, bool):
        raise MalformedEvent("a content block's index is not a position")
    return index


def _halves(text: str) -> bytes:
    """UTF-16: there a surrogate pair that was split between two pieces becomes its character by itself."""
    return text.encode("utf-16-le", "surrogatepass")


def _whole(halves: bytes | bytearray) -> str:
    return halves.decode("utf-16-le", "surrogatepass")


def _tool_input(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}  # a tool without arguments: the input stays as the block started
    with suppress(ValueError, RecursionError):
        value = _DECODER.decode(text)
        if isinstance(value, dict):
            return {"input": value}
    return {"input": {}, "partial_json": text, "incomplete": True}


def storable(value: Any) -> tuple[Any, bool]:
    """The value as the store can keep it, and whether that differs from what was given.

    In every string and key U+0000 and lone surrogates become U+FFFD; numbers that are not finite
    become null; what is nested deeper than STORABLE_DEPTH becomes its JSON text.
    """
    kept = _storable(value, 0)
    return kept, kept is not value


def _storable(value: Any, depth: int) -> Any:
    """The same object where nothing has to change."""
    if isinstance(value, str):
        return _storable_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, dict | list):
        return value
    if depth > STORABLE_DEPTH:
        with suppress(RecursionError):
            return json.dumps(value)
        return "…"
    if isinstance(value, list):
        items = [_storable(item, depth + 1) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    pairs = [(_storable_text(key), _storable(below, depth + 1)) for key, below in value.items()]
    same = all(key is old for (key, _), old in zip(pairs, value, strict=True))
    same = same and all(new is old for (_, new), old in zip(pairs, value.values(), strict=True))
    return value if same else dict(pairs)


def _storable_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\0", "\ufffd") if "\0" in text else text
