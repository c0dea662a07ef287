"""/sessions/{session_id}/memory and /memories, and a user's memories across sessions."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from services.session_service import memories
from services.session_service.routes.creating import CreatingRoute, Writes, creating_errors
from services.session_service.routes.parameters import (
    Cursor,
    Db,
    Integer,
    OtherId,
    SessionId,
    UserId,
    UserIdInPath,
    body_errors,
    errors,
)
from shared import values, wire
from shared.door import answer
from shared.errors import MemoryNotFound, SessionArchived, SessionNotFound

router = APIRouter(route_class=CreatingRoute, tags=["memories"], prefix="/api/v1")

Type = Annotated[wire.MemoryType | None, Query()]
Text = Annotated[values.QueryText | None, Query(description="Contained in the content, in any case")]
Limit = Annotated[Integer, Query(ge=1, le=200)]


@router.post(
    "/sessions/{session_id}/memory",
    response_model=wire.Memory,
    responses=creating_errors(SessionNotFound, SessionArchived),
)
async def create_memory(session_id: SessionId, user_id: UserId, new: wire.NewMemory, writer: Writes) -> Response:
    return answer(await memories.create(writer, user_id, session_id, new))


@router.get(
    "/sessions/{session_id}/memory", response_model=wire.Memory, responses=errors(SessionNotFound, MemoryNotFound)
)
async def get_newest_memory(session_id: SessionId, user_id: UserId, db: Db) -> Response:
    return answer(await memories.get_newest(db, user_id, session_id))


@router.get("/sessions/{session_id}/memories", response_model=wire.MemoryList, responses=errors(SessionNotFound))
async def list_memories(
    session_id: SessionId,
    user_id: UserId,
    db: Db,
    memory_type: Type = None,
    q: Text = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    listed = await memories.list_memories(
        db, user_id, session_id, memory_type=memory_type, q=q, limit=limit, cursor=cursor
    )
    return answer(listed)


@router.put(
    "/sessions/{session_id}/memories/{memory_id}",
    response_model=wire.Memory,
    responses=body_errors(SessionNotFound, MemoryNotFound, SessionArchived),
)
async def update_memory(
    session_id: SessionId, memory_id: OtherId, user_id: UserId, change: wire.UpdateMemory, db: Db
) -> Response:
    return answer(await memories.update(db, user_id, session_id, memory_id, change))


@router.delete(
    "/sessions/{session_id}/memories/{memory_id}",
    response_model=wire.Notice,
    responses=errors(SessionNotFound, MemoryNotFound, SessionArchived),
)
async def delete_memory(session_id: SessionId, memory_id: OtherId, user_id: UserId, db: Db) -> Response:
    await memories.delete(db, user_id, session_id, memory_id)
    return answer({"message": "Memory deleted successfully"})


@router.get("/users/{user_id}/memories", response_model=wire.MemoryList, responses=errors())
async def list_memories_of_user(
    user_id: UserIdInPath,
    db: Db,
    memory_type: Type = None,
    q: Text = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """A user's memories across sessions, newest first."""
    listed = await memories.list_memories(db, user_id, None, memory_type=memory_type, q=q, limit=limit, cursor=cursor)
    return answer(listed)
