"""An upstream's answer as the store keeps it: the completion of a turn.

Its one invariant: whatever upstream said, the completion made of it is one that the store takes; where something
had to be changed for that, the message's metadata says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError
from uuid_utils import uuid7

from services.relay import prices
from services.relay.arrays import REPLACED
from services.relay.assembly import storable
from services.relay.upstream.demo_model import estimate_tokens, input_tokens
from shared import wire
from shared.json import dump_text

ESTIMATED: Final = {"usage_estimated": True}
CUT: Final = {"truncated": True}
_CUT_CHARACTERS: Final = 2**20
_MAX_TOKENS: Final = 2**31 - 1
_NAME_CHARACTERS: Final = 255

Block = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """How a turn ended: `message` is the whole one or the part that came, None when nothing did."""

    status: wire.Outcome
    message: dict[str, Any] | None = None
    upstream: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None


def completion(
    answer: Answer, *, lease_token: str, prefill: list[Block], body: dict[str, Any], earlier: Sequence[Block] = ()
) -> wire.CompleteTurn:
    """The turn's completion; `body` is what went upstream, for the figures that upstream did not give.

    `earlier` is what stood in the answer's place, and stands there again when nothing came.
    """
    message = answer.message or {}
    content = message.get("content")
    blocks = [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []
    if answer.status != "completed":
        blocks = _of_partial(blocks)
    usage, is_estimated = _usage(message, blocks, body, is_partial=answer.status != "completed")
    metadata = ESTIMATED if is_estimated else {}
    messages = []
    if blocks or (prefill and answer.status == "completed"):
        messages.append(_message(_joined(prefill, blocks), metadata))
    elif earlier:
        messages.append(_message(list(earlier), {}))
    model = _name(message.get("model")) or _name(body.get("model"))
    return wire.CompleteTurn(
        lease_token=lease_token,
        status=answer.status,
        messages=messages,
        usage=usage if answer.message is not None else None,
        cost_usd=prices.cost_usd(model or "", usage) if answer.message is not None else None,
        stop_reason=_name(message.get("stop_reason")),
        model=_name(message.get("model")),
        upstream=storable(answer.upstream)[0] or None,
        error=storable(answer.error)[0],
    )


def _message(blocks: list[Block], metadata: dict[str, Any]) -> wire.NewMessage:
    kept, replaced = storable(blocks)
    try:
        return _new_message(kept, metadata | (REPLACED if replaced else {}))
    except ValidationError:
        fit = [_fit(block) for block in blocks]
        kept, replaced = storable(fit)
    is_cut = any(_is_cut(new, block) for new, block in zip(fit, blocks, strict=True))
    metadata = metadata | (REPLACED if replaced else {}) | (CUT if is_cut else {})
    try:
        return _new_message(kept, metadata)
    except ValidationError:  # each block fits, all together are over the limit
        text = "".join(str(block["text"]) for block in kept if block["type"] == "text")[:_CUT_CHARACTERS]
        return _new_message([{"type": "text", "text": text}], metadata | CUT)


def _new_message(blocks: list[Block], metadata: dict[str, Any]) -> wire.NewMessage:
    return wire.NewMessage(role="assistant", content=blocks, metadata=metadata or None, message_id=str(uuid7()))


def _of_partial(blocks: list[Block]) -> list[Block]:
    """The blocks of an interrupted answer: text that came is text, whole or not; blocks without any are left out."""
    kept = []
    for block in blocks:
        if block.get("type") == "text":
            if block.get("text"):
                kept.append({name: value for name, value in block.items() if name != "incomplete"})
        elif block.get("type") == "thinking" and not block.get("signature"):
            kept.append({**block, "incomplete": True})
        else:
            kept.append(block)
    return kept


def _joined(prefill: list[Block], blocks: list[Block]) -> list[Block]:
    """The answer with its given beginning; a text that was begun and goes on is one text."""
    if prefill and blocks and _is_plain_text(prefill[-1]) and _is_plain_text(blocks[0]):
        text = {**blocks[0], "text": prefill[-1]["text"] + blocks[0]["text"]}
        return [*prefill[:-1], text, *blocks[1:]]
    return [*prefill, *blocks]


def _is_plain_text(block: Block) -> bool:
    return block.get("type") == "text" and isinstance(block.get("text"), str) and not block.get("citations")


def _fit(block: Block) -> Block:
    """The block itself, or, when no store takes it, its text as far as that goes; of what is no text, a text of it
    that no context will hold."""
    try:
        wire.NewMessage(role="assistant", content=[storable(block)[0]])
    except ValidationError:
        if block.get("type") == "text" and isinstance(block.get("text"), str):
            return {"type": "text", "text": block["text"][:_CUT_CHARACTERS]}
        return {"type": "text", "text": dump_text(storable(block)[0])[:_CUT_CHARACTERS], "incomplete": True}
    return block


def _is_cut(fit: Block, block: Block) -> bool:
    return fit is not block and len(fit["text"]) == _CUT_CHARACTERS


def _usage(message: dict[str, Any], blocks: list[Block], body: dict[str, Any], *, is_partial: bool) -> tuple[Any, bool]:
    """Upstream's usage with every count in it sound, and whether one had to be estimated."""
    told = message.get("usage")
    usage: dict[str, Any] = dict(told) if isinstance(told, dict) else {}
    sound = {name: usage.get(name) for name in prices.TOKEN_CLASSES if _is_count(usage.get(name))}
    is_estimated = any(name in usage and usage[name] is not None and name not in sound for name in prices.TOKEN_CLASSES)
    if "input_tokens" not in sound:
        sound["input_tokens"], is_estimated = input_tokens(body), True
    if "output_tokens" not in sound or is_partial:
        # What a stream says at its start counts almost nothing of what came after.
        estimate = sum(estimate_tokens(_text(block)) for block in blocks)
        sound["output_tokens"], is_estimated = max(estimate, sound.get("output_tokens") or 0), True
    kept, _ = storable({name: value for name, value in usage.items() if name not in prices.TOKEN_CLASSES} | sound)
    try:
        wire.CompleteTurn(lease_token="", status="completed", usage=kept)
    except ValidationError:
        return sound, is_estimated
    return kept, is_estimated


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS


def _text(block: Block) -> str:
    for name in ("text", "thinking", "partial_json"):
        if isinstance(block.get(name), str):
            return str(block[name])
    return dump_text(storable(block.get("input"))[0]) if block.get("input") else ""


def _name(value: Any) -> str | None:
    return str(storable(value)[0])[:_NAME_CHARACTERS] if isinstance(value, str) else None
