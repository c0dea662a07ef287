"""/sessions and /users/{user_id}/sessions."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from services.session_service import creation, erasure, forks, listing, rewind, sessions
from services.session_service.routes.creating import CreatingRoute, Writes, creating_errors
from services.session_service.routes.parameters import (
    TAGGED,
    AppState,
    Cursor,
    Db,
    IfMatch,
    Page,
    PageSize,
    SessionId,
    UserId,
    UserIdInPath,
    body_errors,
    errors,
    session_answer,
)
from shared import values, wire
from shared.door import answer
from shared.errors import (
    InvalidTransition,
    SessionArchived,
    SessionExists,
    SessionNotActive,
    SessionNotFound,
    TurnInProgress,
    VersionMismatch,
)

router = APIRouter(route_class=CreatingRoute, tags=["sessions"], prefix="/api/v1")

ActiveOnly = Annotated[bool, Query(description="Only active sessions")]
Status = Annotated[wire.Status | None, Query()]
SessionIds = Annotated[list[values.SessionId] | None, Query(max_length=100, description="Only these sessions")]
Order = Annotated[listing.Order, Query(description="Newest first by this time")]


@router.post(
    "/sessions",
    response_model=wire.Session,
    responses=TAGGED | creating_errors(SessionExists, SessionNotActive, SessionArchived, TurnInProgress),
)
async def create_session(new: wire.CreateSession, writer: Writes) -> Response:
    return session_answer(await creation.create(writer, new))


@router.get("/sessions", response_model=wire.SessionList, responses=errors())
async def list_sessions(
    user_id: UserId,
    db: Db,
    active_only: ActiveOnly = False,
    status: Status = None,
    order: Order = "last_activity",
    page: Page = 1,
    page_size: PageSize = 50,
    cursor: Cursor = None,
    session_id: SessionIds = None,
) -> Response:
    listed = await listing.list_sessions(
        db,
        user_id,
        status=status,
        active_only=active_only,
        order=order,
        page=page,
        page_size=page_size,
        cursor=cursor,
        session_ids=session_id,
    )
    return answer(listed)


@router.get("/users/{user_id}/sessions", response_model=wire.SessionList, responses=errors())
async def list_sessions_of_user(
    user_id: UserIdInPath,
    db: Db,
    active_only: ActiveOnly = False,
    status: Status = None,
    order: Order = "last_activity",
    page: Page = 1,
    page_size: PageSize = 50,
    cursor: Cursor = None,
    session_id: SessionIds = None,
) -> Response:
    return await list_sessions(user_id, db, active_only, status, order, page, page_size, cursor, session_id)


@router.get("/sessions/{session_id}", response_model=wire.Session, responses=TAGGED | errors(SessionNotFound))
async def get_session(session_id: SessionId, user_id: UserId, db: Db) -> Response:
    return session_answer(await sessions.get(db, user_id, session_id))


@router.put(
    "/sessions/{session_id}",
    response_model=wire.Session,
    responses=TAGGED | body_errors(SessionNotFound, SessionArchived, InvalidTransition, VersionMismatch),
)
async def update_session(
    session_id: SessionId, user_id: UserId, change: wire.UpdateSession, db: Db, if_match: IfMatch
) -> Response:
    return session_answer(await sessions.update(db, user_id, session_id, change, if_match))


@router.delete("/sessions/{session_id}", response_model=wire.Notice, responses=errors(SessionNotFound, SessionArchived))
async def end_session(session_id: SessionId, user_id: UserId, db: Db, if_match: IfMatch) -> Response:
    await sessions.end(db, user_id, session_id, if_match)
    return answer({"message": "Session ended successfully"})


@router.get("/sessions/{session_id}/summary", response_model=wire.SessionSummary, responses=errors(SessionNotFound))
async def get_summary(session_id: SessionId, user_id: UserId, db: Db) -> Response:
    return answer(await sessions.get_summary(db, user_id, session_id))


@router.post(
    "/sessions/{session_id}/rewind",
    response_model=wire.Session,
    responses=TAGGED | body_errors(SessionNotFound, SessionNotActive, TurnInProgress, VersionMismatch),
)
async def rewind_session(
    session_id: SessionId, user_id: UserId, to: wire.Rewind, db: Db, if_match: IfMatch
) -> Response:
    """Takes back all messages after to_seq; they stay stored, and no longer belong to the conversation."""
    return session_answer(await rewind.rewind(db, user_id, session_id, to.to_seq, if_match))


@router.post(
    "/sessions/{session_id}/fork",
    response_model=wire.Session,
    responses=TAGGED | creating_errors(SessionNotFound, SessionExists),
)
async def fork_session(
    session_id: SessionId, user_id: UserId, writer: Writes, wanted: wire.Fork | None = None
) -> Response:
    """A new session that begins with the visible messages up to at_seq."""
    return session_answer(await forks.fork(writer, user_id, session_id, wanted or wire.Fork()))


@router.delete("/users/{user_id}", response_model=wire.Erased, responses=errors(), tags=["users"])
async def erase_user(user_id: UserIdInPath, db: Db, state: AppState) -> Response:
    """Erases everything of a user."""
    deleted = await erasure.erase(db, user_id)
    state.known.forget_user(user_id)
    return answer({"deleted": deleted})
