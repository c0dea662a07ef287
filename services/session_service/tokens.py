"""How many tokens a message takes in a context, guessed where no provider has told.

Its one invariant: the guess errs on the high side, so that a context that fits here fits upstream.

Claude's tokenizer is not public; its documentation gives about 3.5 characters a token for English and
(width x height) / 750 tokens, at most about 1,600, for an image. The rest was set with a margin on top.
"""

from math import ceil
from typing import Any, Final

from shared.json import dumps

MARGIN: Final = 1.3
MESSAGE_OVERHEAD_TOKENS: Final = 4
IMAGE_TOKENS: Final = 1_600
_LATIN_CHARACTERS_A_TOKEN: Final = 3.5
_OTHER_BYTES_A_TOKEN: Final = 2.5
_PDF_BASE64_CHARACTERS_A_TOKEN: Final = 20
_THINKING: Final = ("thinking", "redacted_thinking")  # no set: a type may be anything, hashable or not


def of_text(text: str) -> float:
    """Tokens of a text: Latin letters share one, ideographs and other scripts take about one each."""
    if text.isascii():
        return len(text) / _LATIN_CHARACTERS_A_TOKEN
    size_bytes = len(text.encode("utf-8", "replace"))
    # Of a character past ASCII the UTF-8 bytes past the first tell how far it is from Latin.
    continuation_bytes = size_bytes - len(text)
    others = min(len(text), continuation_bytes / 2)
    return (len(text) - others) / _LATIN_CHARACTERS_A_TOKEN + 3 * others / _OTHER_BYTES_A_TOKEN


def of_block(block: Any) -> float:
    if not isinstance(block, dict):
        return of_text(dumps(block).decode())
    kind = block.get("type")
    if kind == "text" and isinstance(block.get("text"), str):
        return of_text(block["text"])
    if kind in _THINKING:
        return of_text(str(block.get("thinking") or block.get("data") or ""))
    if kind == "image":
        return IMAGE_TOKENS
    if kind == "document":
        return _of_document(block)
    if kind == "tool_result" and isinstance(block.get("content"), list):
        return 10 + sum(map(of_block, block["content"]))
    return 10 + of_text(dumps(block).decode())


def _of_document(block: dict[str, Any]) -> float:
    source = block.get("source")
    if isinstance(source, dict) and source.get("type") == "base64":
        return IMAGE_TOKENS + len(str(source.get("data") or "")) / _PDF_BASE64_CHARACTERS_A_TOKEN
    if isinstance(source, dict) and source.get("type") == "content" and isinstance(source.get("content"), list):
        return 10 + sum(map(of_block, source["content"]))
    return 10 + of_text(dumps(block).decode())


def estimate(content: str | list[Any]) -> int:
    """Tokens of a message with this content, with the margin."""
    raw = of_text(content) if isinstance(content, str) else sum(map(of_block, content))
    return ceil((raw + MESSAGE_OVERHEAD_TOKENS) * MARGIN)


def estimate_text(text: str) -> int:
    """Tokens of a text that stands for itself, such as a system prompt, with the margin."""
    return ceil(of_text(text) * MARGIN)
