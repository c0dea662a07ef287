"""Full text search over one user's titles, messages and memories.

Its one invariant: it finds visible messages of this user only; a hit in one place needs all words there.
"""

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson
import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, case, func, literal_column, or_, select, tuple_
from sqlalchemy.dialects.postgresql import TIMESTAMP, TSQUERY
from sqlalchemy.sql.elements import ColumnElement

from services.session_service import words
from services.session_service.schema import session_memories, session_messages
from services.session_service.schema import session_search as table
from services.session_service.schema import sessions as _session
from shared import wire
from shared.database import Conn
from shared.errors import ValidationFailed
from shared.json import rfc3339

SNIPPETS: Final = 3
_SNIPPET_CHARACTERS: Final = 160
_BEFORE_MATCH: Final = 40
# A title says what a session is about; a memory was thought worth keeping.
_SCORES: Final = {"title": 10, "memory": 3, "message": 1}

_loose = bindparam("loose", type_=sa.Text).cast(TSQUERY)
_exact = bindparam("exact", type_=sa.Text).cast(TSQUERY)
# The index answers for the words; their distances are then judged by their places, or in a long text by its letters.
_pattern = (
    func.unnest(bindparam("patterns", type_=ARRAY(sa.Text))).table_valued("pattern", name="patterns").render_derived()
)
_content = func.coalesce(session_messages.c.content, session_memories.c.content, "")
_shown = func.regexp_replace(func.left(_content, words.SEARCHED_BYTES), words.IGNORED, "", "g")
_text = func.normalize(_shown, literal_column("NFKC"))
_lacks_one = select(_pattern.c.pattern).where(~_text.op("~*")(_pattern.c.pattern)).exists()
_matches: ColumnElement[bool] = and_(
    table.c.words.op("@@")(_loose),
    case((table.c.is_long, ~_lacks_one), else_=table.c.words.op("@@")(_exact)),
)
# A user who is being erased loses messages and memories before what was indexed of them.
_visible = or_(table.c.seq == 0, and_(session_messages.c.seq.is_not(None), session_messages.c.superseded_at.is_(None)))
_there = or_(table.c.memory_id == "", session_memories.c.memory_id.is_not(None))
_with_sources = table.outerjoin(
    session_messages,
    and_(
        session_messages.c.user_id == table.c.user_id,
        session_messages.c.session_id == table.c.session_id,
        session_messages.c.seq == table.c.seq,
    ),
).outerjoin(
    session_memories,
    and_(
        session_memories.c.user_id == table.c.user_id,
        session_memories.c.session_id == table.c.session_id,
        session_memories.c.memory_id == table.c.memory_id,
    ),
)
_mine = table.c.user_id == bindparam("user_id")
_worth = case(
    (table.c.seq > 0, literal_column(str(_SCORES["message"]))),
    (table.c.memory_id != "", literal_column(str(_SCORES["memory"]))),
    else_=literal_column(str(_SCORES["title"])),
)
_found = (
    select(table.c.session_id, func.sum(_worth).label("score"))
    .select_from(_with_sources)
    .where(_mine, _matches, _visible, _there)
    .group_by(table.c.session_id)
    .subquery("found")
)
_rank = tuple_(_found.c.score, _session.c.last_activity, _session.c.session_id)
_after = tuple_(
    bindparam("after_score", type_=sa.BigInteger),
    bindparam("after_moment", type_=TIMESTAMP(timezone=True)),
    bindparam("after_id", type_=sa.Text),
)
SEARCH = (
    select(_session.c.session_id, _session.c.title, _session.c.last_activity, _found.c.score)
    .select_from(_found.join(_session, _session.c.session_id == _found.c.session_id))
    .where(
        _session.c.user_id == bindparam("user_id"),
        or_(bindparam("after_id", type_=sa.Text).is_(None), _rank < _after),
    )
    .order_by(_found.c.score.desc(), _session.c.last_activity.desc(), _session.c.session_id.desc())
    .limit(bindparam("limit", type_=sa.Integer))
)

_ids = (
    func.unnest(bindparam("session_ids", type_=ARRAY(sa.Text))).table_valued("session_id", name="page").render_derived()
)
_best = (
    select(
        table.c.session_id,
        table.c.seq,
        table.c.memory_id,
        func.left(func.coalesce(session_messages.c.content, session_memories.c.content), words.SEARCHED_BYTES).label(
            "content"
        ),
    )
    .select_from(_with_sources)
    .where(
        _mine,
        table.c.session_id == _ids.c.session_id,
        or_(table.c.seq > 0, table.c.memory_id != ""),
        _matches,
        _visible,
        _there,
    )
    .order_by(table.c.seq.desc(), table.c.memory_id.desc())
    .limit(SNIPPETS)
    .lateral("best")
)
HITS = select(_best.c.session_id, _best.c.seq, _best.c.memory_id, _best.c.content).select_from(
    _ids.join(_best, sa.true())
)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a page ended."""

    score: int
    moment: datetime
    session_id: str

    def cursor(self) -> str:
        place = orjson.dumps(["search", self.score, rfc3339(self.moment), self.session_id])
        return base64.urlsafe_b64encode(place).decode().rstrip("=")

    @classmethod
    def of(cls, cursor: str) -> "_Place":
        try:
            kind, score, moment, session_id = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
            is_score = type(score) is int and 0 <= score < 2**63
            if kind == "search" and is_score and isinstance(session_id, str) and "\0" not in session_id:
                return cls(score, datetime.fromisoformat(moment).astimezone(UTC), session_id)
        except (binascii.Error, ValueError, TypeError, OverflowError):
            pass
        raise ValidationFailed.at("query", "cursor", msg="Not a cursor of a search")


async def search(conn: Conn, user_id: str, asked: str, *, limit: int, cursor: str | None) -> wire.SearchResults:
    """The sessions with hits, best first: by the worth of their hits, then the latest."""
    after = _Place.of(cursor) if cursor else None
    query = words.query(user_id, asked)
    if query is None:
        return wire.SearchResults(results=[], next_cursor=None)
    exact, loose = query
    terms = {"user_id": user_id, "exact": exact, "loose": loose, "patterns": words.long_patterns(asked)}
    rows = await conn.rows(
        SEARCH,
        **terms,
        after_score=after.score if after else None,
        after_moment=after.moment if after else None,
        after_id=after.session_id if after else None,
        limit=limit + 1,
    )
    page = rows[:limit]
    hits = await conn.rows(HITS, **terms, session_ids=[row["session_id"] for row in page]) if page else []
    results = [
        wire.SearchResult.model_construct(
            session_id=row["session_id"],
            title=row["title"],
            score=row["score"],
            last_activity=row["last_activity"],
            snippets=[_snippet(hit, asked) for hit in hits if hit["session_id"] == row["session_id"]],
        )
        for row in page
    ]
    last = page[-1] if len(rows) > limit else None
    next_cursor = _Place(last["score"], last["last_activity"], last["session_id"]).cursor() if last else None
    return wire.SearchResults.model_construct(results=results, next_cursor=next_cursor)


def _snippet(hit: Any, asked: str) -> wire.Snippet:
    """The text around the first match, with where it stands."""
    content: str = hit["content"]
    start = max(0, words.find(asked, content) - _BEFORE_MATCH)
    text = content[start : start + _SNIPPET_CHARACTERS].strip()
    prefix, suffix = "…" if start else "", "…" if start + _SNIPPET_CHARACTERS < len(content) else ""
    return wire.Snippet(text=f"{prefix}{text}{suffix}", seq=hit["seq"] or None, memory_id=hit["memory_id"] or None)
