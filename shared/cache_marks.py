"""Cache marks (`cache_control`) of content blocks, those inside tool results included.

Its one invariant: of too many marks the last ones stay; the Claude API takes four in a request (its documentation of
prompt caching), and later ones cover more of the prompt.
"""

from typing import Any, Final

MOST: Final = 4
_MARK: Final = "cache_control"


def count(blocks: Any) -> int:
    """How many marks there are in a list of blocks; none in anything else."""
    if not isinstance(blocks, list):
        return 0
    return sum(_is_marked(block) + count(block.get("content")) for block in blocks if isinstance(block, dict))


def with_last(blocks: list[Any], most: int) -> list[Any]:
    """The blocks with their last `most` marks; the same objects where nothing has to change."""
    kept: list[Any] = []
    for block in reversed(blocks):
        marks = count([block])
        if marks > most:
            block = _unmarked(block, most)
        most -= min(marks, most)
        kept.append(block)
    return kept[::-1]


def _unmarked(block: dict[str, Any], most: int) -> dict[str, Any]:
    """A block's own mark stands behind those of its content."""
    own = _is_marked(block)
    if own and not most:
        block = {name: value for name, value in block.items() if name != _MARK}
    inner = block.get("content")
    if isinstance(inner, list):
        block = {**block, "content": with_last(inner, max(0, most - own))}
    return block


def _is_marked(block: dict[str, Any]) -> bool:
    return block.get(_MARK) is not None
