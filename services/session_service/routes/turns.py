"""/sessions/{session_id}/turns and the context that a turn begins with; a turn by its id alone."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from services.session_service import completion, context, opening, sessions, turns
from services.session_service.recent import Recent
from services.session_service.routes.creating import CreatingRoute, Writes, creating_errors
from services.session_service.routes.parameters import (
    AppState,
    Cursor,
    Db,
    IfMatch,
    Integer,
    OtherId,
    SessionId,
    UserId,
    body_errors,
    check_ids,
    errors,
)
from shared import wire
from shared.database import Conn
from shared.door import answer
from shared.errors import (
    ContextTooSmall,
    LeaseLost,
    MessageExists,
    SessionArchived,
    SessionExists,
    SessionNotActive,
    SessionNotFound,
    TurnClosed,
    TurnExists,
    TurnInProgress,
    TurnNotFound,
    VersionMismatch,
)

router = APIRouter(route_class=CreatingRoute, tags=["turns"], prefix="/api/v1")

Budget = Annotated[Integer | None, Query(ge=1, le=2**31 - 1)]


@router.post(
    "/sessions/{session_id}/turns",
    response_model=wire.TurnOpened,
    responses=creating_errors(
        SessionNotFound,
        SessionExists,
        SessionNotActive,
        SessionArchived,
        TurnInProgress,
        MessageExists,
        TurnExists,
        ContextTooSmall,
        VersionMismatch,
    ),
)
async def open_turn(
    session_id: SessionId,
    user_id: UserId,
    turn: wire.OpenTurn,
    request: Request,
    writer: Writes,
    state: AppState,
    if_match: IfMatch,
) -> Response:
    """Finds or makes the session, stores the new messages, opens the turn and rebuilds the context, at once."""
    check_ids(turn.create_session, user_id, session_id)
    max_tokens = state.settings.context_max_tokens

    async def is_over() -> bool:
        """Whether nobody waits any more: the client has gone, or this process is about to."""
        return state.lifecycle.draining or await request.is_disconnected()

    opened = await state.lines.wait(
        (user_id, session_id),
        lambda: opening.open_turn(
            writer,
            user_id,
            session_id,
            turn,
            default_max_tokens=max_tokens,
            known=state.known,
            if_match=if_match,
        ),
        seconds=turn.wait_seconds,
        is_gone=is_over,
    )
    state.metrics.appends.inc(len(opened.messages))
    return answer(opened)


@router.get("/sessions/{session_id}/turns", response_model=wire.TurnList, responses=errors(SessionNotFound))
async def list_turns(
    session_id: SessionId,
    user_id: UserId,
    db: Db,
    limit: Annotated[Integer, Query(ge=1, le=100)] = 50,
    cursor: Cursor = None,
) -> Response:
    return answer(await turns.list_turns(db, user_id, session_id, limit=limit, cursor=cursor))


@router.get(
    "/sessions/{session_id}/turns/{turn_id}", response_model=wire.Turn, responses=errors(SessionNotFound, TurnNotFound)
)
async def get_turn(session_id: SessionId, turn_id: OtherId, user_id: UserId, db: Db) -> Response:
    return answer(await turns.get(db, user_id, session_id, turn_id))


@router.get("/turns/{turn_id}", response_model=wire.Turn, responses=errors(TurnNotFound))
async def find_turn(turn_id: OtherId, user_id: UserId, db: Db) -> Response:
    """The user's turn of this id, whatever its session; of several (a session and its import) the newest opened."""
    return answer(await turns.find(db, user_id, turn_id))


@router.post(
    "/sessions/{session_id}/turns/{turn_id}/renew",
    response_model=wire.TurnRenewed,
    responses=body_errors(SessionNotFound, TurnNotFound, TurnClosed, LeaseLost),
)
async def renew_turn(
    session_id: SessionId, turn_id: OtherId, user_id: UserId, lease: wire.RenewTurn, db: Db
) -> Response:
    return answer(await turns.renew(db, user_id, session_id, turn_id, lease.lease_token))


@router.post(
    "/sessions/{session_id}/turns/{turn_id}/complete",
    response_model=wire.TurnCompleted,
    responses=creating_errors(SessionNotFound, TurnNotFound, TurnClosed, LeaseLost, MessageExists),
)
async def complete_turn(
    session_id: SessionId, turn_id: OtherId, user_id: UserId, result: wire.CompleteTurn, writer: Writes, state: AppState
) -> Response:
    """Stores the answer and closes the turn; sent again, it changes nothing, with a key or without one."""
    completed = await completion.complete(writer, user_id, session_id, turn_id, result, known=state.known)
    state.lines.wake((user_id, session_id))
    state.metrics.appends.inc(len(completed.messages))
    return answer(completed)


@router.get(
    "/sessions/{session_id}/context", response_model=wire.Context, responses=errors(SessionNotFound, ContextTooSmall)
)
async def get_context(
    session_id: SessionId,
    user_id: UserId,
    db: Db,
    state: AppState,
    max_tokens: Budget = None,
    max_messages: Budget = None,
    memories: Annotated[bool, Query()] = False,
    format: Annotated[wire.ContextFormat, Query()] = "claude",  # noqa: A002 - the parameter's name
) -> Response:
    """What a model should see of this session; reading it changes nothing."""
    budget = context.Budget(max_tokens or state.settings.context_max_tokens, max_messages, memories, format)

    async def work(conn: Conn) -> wire.Context:
        recent = await Recent.read(conn, await sessions.look(conn, user_id, session_id), budget.limits)
        built, _ = await context.build(recent, budget, moves=False)
        return built

    return answer(await db.transact(work))
