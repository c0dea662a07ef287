"""Export and import of sessions. Declared before /sessions/{session_id}, whose ids exclude `import`."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from services.session_service import export, idempotency, imports
from services.session_service.routes.creating import IdempotencyKey, creating_errors, given_key, replayed_answer
from services.session_service.routes.parameters import TAGGED, AppState, Db, SessionId, UserId, errors, session_answer
from shared import values, wire
from shared.database import Writer
from shared.errors import SessionExists, SessionNotFound
from shared.strict_route import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["transfer"], prefix="/api/v1")

NDJSON = "application/x-ndjson"
IMPORT_PATH = "/api/v1/sessions/import"
_LINES: dict[str, Any] = {"content": {NDJSON: {"schema": {"type": "string"}}}}


@router.get(
    "/sessions/{session_id}/export",
    response_class=StreamingResponse,
    responses=errors(SessionNotFound) | {200: {**_LINES, "description": "The session's lines"}},
)
async def export_session(session_id: SessionId, user_id: UserId, db: Db) -> Response:
    """The session as NDJSON: a header, messages (superseded ones too), memories, turns, and a sealing last line."""
    return StreamingResponse(await export.export(db, user_id, session_id), media_type=NDJSON)


@router.post(
    "/sessions/import",
    response_model=wire.Session,
    responses=TAGGED | creating_errors(SessionExists),
    openapi_extra={"requestBody": {"required": True, **_LINES}},
)
async def import_session(
    request: Request,
    user_id: UserId,
    db: Db,
    state: AppState,
    session_id: Annotated[values.SessionId | None, Query(description="Default: the id that it had")] = None,
    _key: IdempotencyKey = None,
) -> Response:
    """Takes an export back; a file that is cut short or damaged anywhere is refused whole."""
    received = await imports.receive(request.stream())
    with received.file:
        key = given_key(request, user_id, received.sha256)
        if key is None:
            return session_answer(await imports.store(db, user_id, session_id, received, state.settings.limits))
        try:
            async with state.running.alone(key):
                await idempotency.replay(db, key)
                writer: Writer = idempotency.Once(db, key)
                return session_answer(await imports.store(writer, user_id, session_id, received, state.settings.limits))
        except idempotency.Replayed as replayed:
            return replayed_answer(replayed)
