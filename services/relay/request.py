"""A client's Claude request: read from bytes, checked as far as storing it needs, the relay's own field taken out.

Its one invariant: `body` is what goes upstream, equal in value to what the client sent in every field that is
not the relay's own. What upstream alone can judge is left to upstream.
"""

import json
import math
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from pydantic_core import from_json

from services.relay.errors import InvalidRequest

ROLES: Final = frozenset({"user", "assistant", "system"})
_MOST_MESSAGES: Final = 100_000  # as many as the Claude API takes, and the store lines up
_MAX_DEPTH: Final = 200  # as deep as the faster of the two parsers goes
_MAY_HOLD_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_MAY_OVERFLOW: Final = re.compile(rb"[0-9][eE]\+?[0-9]{2}|[0-9]{300}")


Enrich = Callable[[list[dict[str, Any]]], Awaitable[list[dict[str, Any]]]]


@dataclass(frozen=True, slots=True)
class Continuation:
    """A turn that brings no message: what is stored already asks.

    What comes after `rewind_to_seq` is taken back before, if the session has this `version` still: an answer that was
    `broken_off`, whose place it has again when no other comes. `prefill` is the answer's given beginning; `enriched`
    adds to the context's messages what goes upstream with them.
    """

    session_id: str
    version: int
    enriched: Enrich
    rewind_to_seq: int | None = None
    prefill: tuple[dict[str, Any], ...] = ()
    broken_off: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class ClaudeRequest:
    """`session_id` is what stood in metadata.session_id; with a `continuation` the body's messages are empty."""

    body: dict[str, Any]
    session_id: str | None
    continuation: Continuation | None = None

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self.body["messages"]
        return messages

    @property
    def stream(self) -> bool:
        return self.body.get("stream") is True

    @property
    def user_id(self) -> str | None:
        """metadata.user_id, which goes upstream as it is."""
        metadata = self.body.get("metadata")
        user_id = metadata.get("user_id") if isinstance(metadata, dict) else None
        return user_id if isinstance(user_id, str) else None


def read(content: bytes, *, default_max_tokens: int | None) -> ClaudeRequest:
    """The request in these bytes; raises InvalidRequest naming the field. None: max_tokens is not for this call."""
    body = _parsed(content)
    if not isinstance(body, dict):
        raise InvalidRequest.at("body", "must be a JSON object")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest.at("model", "must be a non-empty string")
    if not isinstance(body.get("stream"), bool | None):
        raise InvalidRequest.at("stream", "must be true or false")
    _check_messages(body.get("messages"))
    session_id = _take_session_id(body)
    if default_max_tokens is not None and body.get("max_tokens") is None:
        body["max_tokens"] = default_max_tokens
    return ClaudeRequest(body, session_id)


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────


def _parsed(content: bytes) -> Any:
    """The value of a UTF-8 JSON text, lone surrogates included; what JSON does not know is refused."""
    try:
        value = _value(content)
    except RecursionError:
        raise InvalidRequest.at("body", "is nested too deeply") from None
    if _MAY_OVERFLOW.search(content):
        for path in _infinite(value, ""):
            raise InvalidRequest.at(path, "number out of range")
    return value


def _value(content: bytes) -> Any:
    try:
        return from_json(content, allow_inf_nan=False, cache_strings="keys")
    except ValueError as problem:
        invalid = InvalidRequest.at("body", f"invalid JSON: {problem}")
    if not _MAY_HOLD_SURROGATE.search(content):
        raise invalid
    try:
        # Slower, and knows the escapes of lone surrogates, which a client may send.
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except ValueError:
        raise invalid from None
    if _is_deeper(value, _MAX_DEPTH):
        raise InvalidRequest.at("body", "is nested too deeply")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    below = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in below)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _infinite(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path or "body"
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _infinite(below, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _infinite(below, f"{path}.{index}")


# ── fields ──────────────────────────────────────────────────────────────────────────────────────


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest.at("messages", "must be a list with at least one message")
    if len(messages) > _MOST_MESSAGES:
        raise InvalidRequest.at("messages", f"must be {_MOST_MESSAGES} at most")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest.at(f"messages.{index}", "must be an object")
        if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
            raise InvalidRequest.at(f"messages.{index}.role", "must be user, assistant or system")
        content = message.get("content")
        if not isinstance(content, str | list):
            raise InvalidRequest.at(f"messages.{index}.content", "must be a string or a list of content blocks")
        for place, block in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(block, dict) or not isinstance(block.get("type"), str):
                raise InvalidRequest.at(f"messages.{index}.content.{place}", "must be an object with a type")
    if all(message["role"] != "user" for message in messages):
        raise InvalidRequest.at("messages", "must hold a message of the user")


def _take_session_id(body: dict[str, Any]) -> str | None:
    """metadata.session_id, taken out; metadata itself too when nothing else was in it."""
    metadata = body.get("metadata")
    if not isinstance(metadata, dict) or "session_id" not in metadata:
        return None
    session_id = metadata["session_id"]
    if session_id is not None and not isinstance(session_id, str):
        raise InvalidRequest.at("metadata.session_id", "must be a string")
    rest = {name: value for name, value in metadata.items() if name != "session_id"}
    if rest:
        body["metadata"] = rest
    else:
        del body["metadata"]
    return session_id
