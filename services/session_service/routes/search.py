"""/sessions/search. Declared before /sessions/{session_id}, whose ids exclude `search`."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from services.session_service import search
from services.session_service.routes.parameters import Cursor, Db, Integer, UserId, errors
from shared import values, wire
from shared.door import answer
from shared.errors import ValidationFailed
from shared.strict_route import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["search"], prefix="/api/v1")


@router.get("/sessions/search", response_model=wire.SearchResults, responses=errors())
async def search_sessions(
    user_id: UserId,
    q: Annotated[values.QueryText, Query(description='Words; "quoted" ones as a phrase')],
    db: Db,
    limit: Annotated[Integer, Query(ge=1, le=100)] = 20,
    cursor: Cursor = None,
) -> Response:
    """Sessions whose title, visible messages or memories have all the words; best first."""
    if not q.strip():
        raise ValidationFailed.at("query", "q", msg="Empty or blank")
    return answer(await search.search(db, user_id, q, limit=limit, cursor=cursor))
