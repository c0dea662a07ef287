"""Cache marks: counted wherever they stand, and the last ones stay."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shared import cache_marks

MARK = {"cache_control": {"type": "ephemeral"}}

_leaf = st.fixed_dictionaries({"type": st.just("text"), "text": st.sampled_from("ab")}).flatmap(
    lambda block: st.sampled_from([block, block | MARK])
)
_result = st.tuples(st.lists(_leaf, max_size=3), st.booleans()).map(
    lambda made: {"type": "tool_result", "content": made[0], **(MARK if made[1] else {})}
)
_blocks = st.lists(_leaf | _result, max_size=5)


def flat(blocks: list[Any]) -> list[bool]:
    """Whether there is a mark, place by place: a block's own stands behind those inside of it."""
    places: list[bool] = []
    for block in blocks:
        places += (
            [*flat(block["content"]), "cache_control" in block] if "content" in block else ["cache_control" in block]
        )
    return places


@given(blocks=_blocks, most=st.integers(0, 6))
def test_the_last_ones_stay(blocks: list[Any], most: int) -> None:
    before, kept = flat(blocks), cache_marks.with_last(blocks, most)
    marked = [place for place, mark in enumerate(before) if mark]
    assert cache_marks.count(blocks) == len(marked)
    assert [place for place, mark in enumerate(flat(kept)) if mark] == (marked[-most:] if most else [])
    assert flat(blocks) == before, "what was given is left as it is"


def test_what_is_no_list_of_blocks_has_none() -> None:
    assert cache_marks.count("text") == cache_marks.count(None) == cache_marks.count(["text", 3]) == 0
