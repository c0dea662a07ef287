"""The chat door's words: a message in, made into a Claude request; a Claude answer out, made into text.

Its one invariant: a chat is a turn like any other; nothing here keeps anything.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from services.relay.accounts import DEMO_MODEL
from services.relay.keys import Key
from services.relay.pool import Pool
from services.relay.request import ClaudeRequest
from services.relay.sse import Splitter
from services.relay.upstream import encode_body
from shared import values

_LAST_RESORT: Final = "claude-sonnet-4-5"
_MESSAGE_CHARACTERS: Final = 2**20
_UNTOLD: Final = {"type": "api_error", "message": "The upstream failed to answer"}
_TEXTS: Final = {"content_block_start": "content_block", "content_block_delta": "delta"}


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


class ChatMessage(BaseModel):
    """`conversation_id` is the session's id; without one a new conversation begins."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    message: Annotated[str, Field(min_length=1, max_length=_MESSAGE_CHARACTERS), AfterValidator(_not_blank)]
    conversation_id: values.SessionId | None = None
    model: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    system: Annotated[str, Field(max_length=_MESSAGE_CHARACTERS)] | None = None


def request_of(chat: ChatMessage, *, default_model: str, max_tokens: int, stream: bool) -> ClaudeRequest:
    """The Claude request that says the same; what was said before comes out of the session."""
    body: dict[str, Any] = {
        "model": chat.model or default_model,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": chat.message}],
    }
    if chat.system:
        body["system"] = chat.system
    if stream:
        body["stream"] = True
    return ClaudeRequest(body, chat.conversation_id)


def default_model(pool: Pool, setting: str, key: Key) -> str:
    """The setting, else the first model that a real account names, else the demo's: of those that the key may ask."""
    real = [member.account for member in pool.members.values() if member.account.provider != "demo" and member.enabled]
    named = [setting] if setting else [name for account in real for name in account.models]
    usual = named or [_LAST_RESORT if real else DEMO_MODEL]
    return next((name for name in [*usual, *key.allowed_models] if key.may_ask(name)), usual[0])


def text_of(message: dict[str, Any]) -> str:
    """What a Claude message says."""
    blocks = message.get("content")
    texts = [block.get("text") for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
    return "".join(text for text in texts if isinstance(text, str))


@dataclass(slots=True)
class Translation:
    """A Claude stream read as a chat: feed it the bytes, take the texts; at the end `message` says the rest."""

    message: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    said: list[str] = field(default_factory=list)
    _splitter: Splitter = field(default_factory=Splitter)

    @property
    def whole(self) -> dict[str, Any]:
        """The message so far, with all that was said."""
        return {**self.message, "content": [{"type": "text", "text": "".join(self.said)}]}

    def feed(self, piece: bytes) -> Iterator[str]:
        """The texts that this piece of the stream brings."""
        for event in self._splitter.feed(piece):
            if event.name in _TEXTS:
                text = _object(json.loads(event.data), _TEXTS[event.name]).get("text")
                if isinstance(text, str) and text:
                    self.said.append(text)
                    yield text
            elif event.name == "error":
                self.error = _UNTOLD | _object(json.loads(event.data), "error")
            elif event.name == "message_start":
                self.message = _object(json.loads(event.data), "message")
            elif event.name == "message_delta":
                usage = {**_object(self.message, "usage"), **_object(json.loads(event.data), "usage")}
                self.message = {**self.message, "usage": usage or None}


def _object(holder: Any, name: str) -> dict[str, Any]:
    """What stands there, if it is an object: not all that upstream says is known to be one."""
    found = holder.get(name) if isinstance(holder, dict) else None
    return found if isinstance(found, dict) else {}


def event(kind: str, **fields: Any) -> bytes:
    """One event of a chat stream."""
    return b"data: " + encode_body({"type": kind, **fields}) + b"\n\n"
