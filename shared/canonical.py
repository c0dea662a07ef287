"""The canonical form of a message, by which a client's array is lined up with the stored history.

Its one invariant: two messages that a model would read alike have one hash, in every process and release.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

_UNSEEN_BY_MODEL = frozenset({"cache_control", "incomplete", "partial_json"})
_THINKING = ("thinking", "redacted_thinking")  # no set: a type may be anything, hashable or not
_DIRECT = {"type": "direct"}
_SPEAKER = {"tool_call": "assistant", "tool_result": "user", "tool": "user"}


def speaker(role: str) -> str:
    """The side of the conversation that a stored role speaks for."""
    return _SPEAKER.get(role, role)


def message_hash(role: str, content: str | list[Any]) -> bytes:
    """SHA-256 of the canonical form: who speaks, and the canonical blocks."""
    form = [speaker(role), canonical_blocks(content)]
    text = json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()


def chain(start: bytes, hashes: Iterable[bytes]) -> bytes:
    """One hash for a sequence of messages, from their hashes; `start` is the hash of those before them."""
    for each in hashes:
        start = hashlib.sha256(start + each).digest()
    return start


def canonical_blocks(content: str | list[Any]) -> list[Any]:
    """Content as blocks in which adjacent texts are one, without what does not reach the model's eye.

    Left out are cache_control, thinking blocks, nulls, blanks at the end of a text, empty texts, and what goes without
    saying: that a result is no error, and that the model itself has called.
    """
    blocks: list[Any] = []
    for block in _as_blocks(content):
        if not isinstance(block, dict):
            blocks.append(block)
            continue
        if block.get("type") in _THINKING:
            continue
        if _is_plain_text(block) and blocks and _is_plain_text(blocks[-1]):
            blocks[-1] = {"type": "text", "text": blocks[-1]["text"] + block["text"]}
            continue
        blocks.append(_canonical_block(block))
    return [_trimmed(block) for block in blocks if not _is_blank(block)]


def _as_blocks(content: str | list[Any]) -> Iterable[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _is_plain_text(block: Any) -> bool:
    return (
        isinstance(block, dict)
        and block.get("type") == "text"
        and isinstance(block.get("text"), str)
        and not block.get("citations")
    )


def _is_blank(block: Any) -> bool:
    return _is_plain_text(block) and not block["text"].strip()


def _trimmed(block: Any) -> Any:
    if _is_plain_text(block):
        return {"type": "text", "text": block["text"].rstrip()}
    return block


def _canonical_block(block: dict[str, Any]) -> dict[str, Any]:
    form: dict[str, Any] = {}
    for key, value in block.items():
        if value is None or key in _UNSEEN_BY_MODEL or _is_unsaid(key, value):
            continue
        if key == "content" and block.get("type") == "tool_result" and isinstance(value, str | list):
            form[key] = canonical_blocks(value)
        elif key == "input":
            form[key] = _number_form(value)
        else:
            form[key] = _without_nulls(value)
    return form


def _is_unsaid(key: str, value: Any) -> bool:
    """Whether upstream says it where many clients leave it out, and it means the same."""
    return (key == "is_error" and value is False) or (key == "caller" and value == _DIRECT)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_nulls(below)
            for key, below in value.items()
            if below is not None and key not in _UNSEEN_BY_MODEL
        }
    if isinstance(value, list):
        return [_without_nulls(below) for below in value]
    return _number_form(value)


def _number_form(value: Any) -> Any:
    """JSON knows one kind of number: 1 and 1.0 are the same value."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _number_form(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_number_form(below) for below in value]
    return value
