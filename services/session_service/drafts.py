"""Messages on their way into a session: every column but those that storing them gives.

Its one invariant: what a draft says of itself (text, size, canonical hash) follows from its content alone.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSON, JSONB
from uuid_utils import uuid7

from services.session_service import tokens
from shared import wire
from shared.canonical import message_hash
from shared.json import dump_text

# JSON goes in as text: in an array of JSON values, asyncpg takes a list for another dimension of the array.
ARRAYS: dict[str, sa.types.TypeEngine[Any]] = {
    "message_id": sa.Text(),
    "role": sa.Text(),
    "message_type": sa.Text(),
    "content": sa.Text(),
    "content_blocks": sa.Text(),
    "native": sa.Text(),
    "metadata": sa.Text(),
    "tokens_used": sa.Integer(),
    "cost_usd": sa.Numeric(),
    "context_tokens": sa.Integer(),
    "context_tokens_reported": sa.Boolean(),
    "begins_window": sa.Boolean(),
    "canonical_hash": sa.LargeBinary(),
}
JSON_ARRAYS: dict[str, sa.types.TypeEngine[Any]] = {"content_blocks": JSON(), "native": JSON(), "metadata": JSONB()}


@dataclass(frozen=True, slots=True)
class Draft:
    """A message ready to be stored: every column but those that the append gives."""

    message: wire.NewMessage
    message_id: str
    text: str
    blocks: list[dict[str, Any]] | None
    tokens_used: int
    cost_usd: Decimal
    context_tokens: int
    context_tokens_reported: bool
    canonical_hash: bytes

    def column(self, name: str) -> Any:
        message = self.message
        match name:
            case "role":
                return message.role
            case "message_type":
                return message.message_type or "chat"
            case "content":
                return self.text
            case "content_blocks":
                return self.blocks
            case "native":
                return message.native
            case "metadata":
                return message.metadata or {}
            case "begins_window":
                return message.role == "user" and not any(
                    block.get("type") == "tool_result" for block in self.blocks or ()
                )
            case _:
                return getattr(self, name)

    def parameter(self, name: str) -> Any:
        value = self.column(name)
        return dump_text(value) if name in JSON_ARRAYS and value is not None else value

    def stored(self, user_id: str, session_id: str, seq: int, created_at: datetime) -> wire.Message:
        own = {name: self.column(name) for name in wire.Message.model_fields if name in ARRAYS}
        return wire.Message.model_construct(
            **own, user_id=user_id, session_id=session_id, seq=seq, created_at=created_at, superseded_at=None
        )


def draft(
    message: wire.NewMessage,
    *,
    tokens_used: int = 0,
    cost_usd: Decimal = Decimal(0),
    reported_tokens: int | None = None,
) -> Draft:
    """The message with what it did not bring: an id, figures, its canonical hash and its size in a context."""
    content = message.content
    return Draft(
        message=message,
        message_id=message.message_id or str(uuid7()),
        text=content if isinstance(content, str) else text_of(content),
        blocks=None if isinstance(content, str) else content,
        tokens_used=message.tokens_used if message.tokens_used is not None else tokens_used,
        cost_usd=message.cost_usd if message.cost_usd is not None else cost_usd,
        context_tokens=tokens.estimate(content) if reported_tokens is None else reported_tokens,
        context_tokens_reported=reported_tokens is not None,
        canonical_hash=message_hash(message.role, content),
    )


def text_of(blocks: list[dict[str, Any]]) -> str:
    """The text of content blocks: adjacent text blocks are one text, others part it by a line end."""
    parts: list[str] = []
    apart = False
    for block in blocks:
        if block.get("type") == "text":
            if apart and parts:
                parts.append("\n")
            parts.append(block["text"])
            apart = False
        else:
            apart = True
    return "".join(parts)


def parameters(drafts: list[Draft]) -> dict[str, Any]:
    return {
        "count": len(drafts),
        "tokens": sum(each.tokens_used for each in drafts),
        "cost": sum((each.cost_usd for each in drafts), Decimal(0)),
        **{f"{name}_array": [each.parameter(name) for each in drafts] for name in ARRAYS},
    }


def stored(
    drafts: list[Draft], user_id: str, session_id: str, last_seq: int, created_at: datetime
) -> list[wire.Message]:
    """The messages that the drafts have become, of which the last has this seq."""
    first_seq = last_seq - len(drafts) + 1
    return [each.stored(user_id, session_id, first_seq + place, created_at) for place, each in enumerate(drafts)]
