"""/sessions/{session_id}/messages, and lining up with them."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from starlette.convertors import StringConvertor, register_url_convertor

from services.session_service import align, batches, history, messages
from services.session_service.routes.creating import CreatingRoute, Writes, creating_errors
from services.session_service.routes.parameters import (
    AppState,
    Db,
    IfMatch,
    Integer,
    MessageId,
    MessagePageSize,
    Page,
    SessionId,
    UserId,
    body_errors,
    check_ids,
    errors,
)
from shared import wire
from shared.door import answer
from shared.errors import (
    MessageExists,
    MessageNotFound,
    SessionArchived,
    SessionExists,
    SessionNotActive,
    SessionNotFound,
    TurnInProgress,
    ValidationFailed,
    VersionMismatch,
)


class _AnythingConvertor(StringConvertor):
    """A message id is all the rest of the path: slashes, and a line end at its end, which `$` would pass over."""

    regex = "(?s:.+)"


register_url_convertor("anything", _AnythingConvertor())

router = APIRouter(route_class=CreatingRoute, tags=["messages"], prefix="/api/v1/sessions/{session_id}")

Seq = Annotated[Integer | None, Query(ge=0, le=2**31 - 1)]
Limit = Annotated[Integer, Query(ge=1, le=1000)]


@router.post(
    "/messages",
    response_model=wire.Message,
    responses=creating_errors(SessionNotFound, SessionNotActive, TurnInProgress, MessageExists),
)
async def append_message(
    session_id: SessionId, user_id: UserId, message: wire.NewMessage, writer: Writes, db: Db, state: AppState
) -> Response:
    stored = await messages.append(writer, db, user_id, session_id, message, state.gathering.append)
    state.metrics.appends.inc()
    return answer(stored)


@router.post(
    "/messages/batch",
    response_model=wire.BatchStored,
    responses=creating_errors(
        SessionNotFound,
        SessionExists,
        SessionNotActive,
        SessionArchived,
        TurnInProgress,
        MessageExists,
        VersionMismatch,
    ),
)
async def append_batch(
    session_id: SessionId,
    user_id: UserId,
    batch: wire.Batch,
    writer: Writes,
    state: AppState,
    if_match: IfMatch,
) -> Response:
    """Appends messages in order: all of them, or none."""
    check_ids(batch.create_session, user_id, session_id)
    stored = await batches.append_batch(writer, user_id, session_id, batch, if_match)
    state.metrics.appends.inc(len(stored.messages))
    return answer(stored)


@router.get("/messages", response_model=wire.MessageList, responses=errors(SessionNotFound))
async def list_messages(
    session_id: SessionId,
    user_id: UserId,
    db: Db,
    page: Page = 1,
    page_size: MessagePageSize = 100,
    after_seq: Seq = None,
    before_seq: Seq = None,
    limit: Limit = 100,
    order: Annotated[history.Direction, Query()] = "asc",
    role: Annotated[wire.Role | None, Query()] = None,
    message_type: Annotated[wire.MessageType | None, Query()] = None,
    include_superseded: Annotated[bool, Query()] = False,
) -> Response:
    """Messages by page, or with after_seq or before_seq the nearest ones on that side."""
    wanted = history.Filter(role, message_type, include_superseded)
    if after_seq is not None and before_seq is not None:
        raise ValidationFailed.at("query", "before_seq", msg="Give after_seq or before_seq, not both")
    if after_seq is None and before_seq is None:
        listed = await history.list_messages(
            db, user_id, session_id, wanted=wanted, order=order, page=page, page_size=page_size
        )
        return answer(listed)
    listed = await history.list_beside(
        db,
        user_id,
        session_id,
        wanted=wanted,
        order=order,
        side="after" if before_seq is None else "before",
        seq=after_seq if before_seq is None else before_seq,  # type: ignore[arg-type]
        limit=limit,
    )
    return answer(listed)


@router.get(
    "/messages/{message_id:anything}", response_model=wire.Message, responses=errors(SessionNotFound, MessageNotFound)
)
async def get_message(session_id: SessionId, message_id: MessageId, user_id: UserId, db: Db) -> Response:
    return answer(await messages.get(db, user_id, session_id, message_id))


@router.post("/align", response_model=wire.Aligned, responses=body_errors(SessionNotFound))
async def align_history(session_id: SessionId, user_id: UserId, array: wire.Align, db: Db) -> Response:
    """How much of a client's message array is the beginning of the visible history."""
    return answer(await align.align(db, user_id, session_id, array.hashes))
