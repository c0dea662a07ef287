"""A client's array of messages, in the form in which it can be stored.

Its one invariant: what is kept of a message differs from what was sent only in characters that cannot be stored, and
its metadata says so. Messages of the assistant at the array's end are a prefill: no message of their own, but the
answer's beginning.
"""

from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from services.relay.assembly import storable
from services.relay.errors import InvalidRequest
from services.relay.request import ClaudeRequest
from shared import wire
from shared.canonical import message_hash

REPLACED: Final = {"replaced_characters": True}
"""Metadata of a stored message in which U+FFFD stands for characters that cannot be stored."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A client's message in the form in which it can be stored; `place` is its index in the array."""

    place: int
    role: str
    content: Any
    replaced: bool

    @property
    def hash(self) -> str:
        return message_hash(self.role, self.content).hex()

    def new_message(self) -> wire.NewMessage:
        """Raises InvalidRequest for what no conversation can hold."""
        try:
            return wire.NewMessage.model_validate(
                {
                    "role": self.role,
                    "content": self.content,
                    "message_type": "system" if self.role == "system" else None,
                    "metadata": REPLACED if self.replaced else None,
                }
            )
        except ValidationError as error:
            raise InvalidRequest.at(f"messages.{self.place}.content", error.errors()[0]["msg"]) from None


@dataclass(frozen=True, slots=True)
class Array:
    """A client's messages without the prefill; `spoken` are those that histories are lined up by.

    `holds_answers`: there is a message of the assistant among them, a prefill included.
    """

    messages: list[Kept]
    spoken: list[Kept]
    prefill: list[dict[str, Any]]
    holds_answers: bool

    @classmethod
    def of(cls, request: ClaudeRequest) -> "Array":
        if request.continuation is not None:
            return cls([], [], list(request.continuation.prefill), holds_answers=False)
        messages = request.messages
        count = len(messages)
        while messages[count - 1]["role"] == "assistant":
            count -= 1
        kept = []
        for place, message in enumerate(messages[:count]):
            content, replaced = storable(message["content"])
            kept.append(Kept(place, message["role"], content, replaced))
        spoken = [each for each in kept if each.role != "system"]
        prefill = [block for each in messages[count:] for block in blocks_of(each["content"])]
        return cls(kept, spoken, prefill, any(message["role"] == "assistant" for message in messages))

    @property
    def first(self) -> str:
        """The hash of the first spoken message; "" where none is."""
        return self.spoken[0].hash if self.spoken else ""

    def hashes(self) -> list[str]:
        return [each.hash for each in self.spoken]

    def after(self, matched: int) -> list[Kept]:
        """The messages that follow the first `matched` spoken ones."""
        return self.messages[self.spoken[matched - 1].place + 1 :] if matched else self.messages


def blocks_of(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
