"""The search index: words of titles, messages and memories.

Its one invariant: putting a text in again changes nothing.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, func, select
from sqlalchemy.dialects.postgresql import TSVECTOR, insert

from services.session_service import words
from services.session_service.schema import session_search, sessions
from shared.database import Conn

_ARRAYS: dict[str, sa.types.TypeEngine[Any]] = {
    "user_id": sa.Text(),
    "session_id": sa.Text(),
    "seq": sa.Integer(),
    "memory_id": sa.Text(),
    "words": sa.Text(),
    "is_long": sa.Boolean(),
}
_SHORT_CHARACTERS: Final = 2_000
_AT_ONCE: Final = 50
"""Texts put in by one statement: some 1.5 ms, in which appends have one processor less."""

_new = (
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _ARRAYS.items()))
    .table_valued(*_ARRAYS, name="new")
    .render_derived()
)
# Only of sessions that are still there: one that is erased meanwhile must not stop the others.
_put = insert(session_search).from_select(
    [*_ARRAYS],
    select(*(_new.c[name].cast(TSVECTOR) if name == "words" else _new.c[name] for name in _ARRAYS))
    .join(sessions, and_(sessions.c.user_id == _new.c.user_id, sessions.c.session_id == _new.c.session_id))
    .with_for_update(of=sessions, read=True, key_share=True),
)
PUT = _put.on_conflict_do_update(
    index_elements=["user_id", "session_id", "seq", "memory_id"],
    set_={"words": _put.excluded.words, "is_long": _put.excluded.is_long},
    where=session_search.c.words != _put.excluded.words,
)


class Text(NamedTuple):
    """A title (seq 0), a message (seq), or a memory (memory_id) to be found by its words."""

    user_id: str
    session_id: str
    seq: int
    memory_id: str
    text: str


async def put(conn: Conn, texts: Sequence[Text]) -> None:
    """Puts the texts in, in place of what stood for the same."""
    for start in range(0, len(texts), _AT_ONCE):
        rows = [await _row(each) for each in texts[start : start + _AT_ONCE]]
        columns = zip(*rows, strict=True)
        await conn.rows(PUT, **{f"{name}_array": list(values) for name, values in zip(_ARRAYS, columns, strict=True)})


async def _row(text: Text) -> tuple[Any, ...]:
    """Splitting texts must not hold up requests: a short one is a request's work, a long one is for a thread."""
    if len(text.text) <= _SHORT_CHARACTERS:
        await asyncio.sleep(0)
        vector, is_long = words.vector(text.user_id, text.text)
    else:
        vector, is_long = await asyncio.to_thread(words.vector, text.user_id, text.text)
    # A title's few words all have places; only their repeats may have lost theirs.
    is_title = text.seq == 0 and not text.memory_id
    return (*text[:-1], vector, is_long and not is_title)
