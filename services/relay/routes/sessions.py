"""/sessions/{session_id}: a look at a session, closing it, and having it summarised."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from services.relay.outcomes import Ended
from services.relay.routes.parameters import AppState, CallerKey, KeyedRoute, MessagesKey, SessionId
from services.relay.routes.rendering import request_id_of
from services.relay.routes.replies import unless_gone
from shared import wire
from shared.door import answer
from shared.session_client import SessionKey

router = APIRouter(tags=["sessions"], route_class=KeyedRoute)

_SHOWN = ("session_id", "status", "created_at", "last_activity", "expires_at", "message_count", "total_tokens")
_SUMMARY = ("session_id", "session_summary", "summary_to_seq", "summary_model")


class SummaryWish(wire.Input):
    """`model` writes it, by default RELAY_SUMMARY_MODEL, else the one that answered last; `to_seq`: how far it goes."""

    model: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    to_seq: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


async def get_session(session_id: SessionId, state: AppState, key: CallerKey) -> Response:
    """The session, an ended one too."""
    return answer(_shown(await state.sessions.get_session(SessionKey(key.user_id, session_id))))


async def close_session(session_id: SessionId, state: AppState, key: CallerKey) -> Response:
    """Ends the session. Its history stays stored; the id may be used again, and then begins anew."""
    session = SessionKey(key.user_id, session_id)
    was_active = (await state.sessions.get_session(session)).is_active
    await state.sessions.end_session(session)
    if was_active:
        state.session_limit.closed()
    return answer(_shown(await state.sessions.get_session(session)))


async def summarize_session(
    request: Request, session_id: SessionId, state: AppState, key: MessagesKey, wish: SummaryWish | None = None
) -> Response:
    """Has a model summarise the session, and stores it; the next contexts carry it.

    It covers all visible messages, or those up to `to_seq`. A summary that is there is gone on with; one that covers
    as much already is made anew. Waits for it, two minutes at most.
    """
    model, to_seq = (wish.model, wish.to_seq) if wish else (None, None)
    session = SessionKey(key.user_id, session_id)

    async def summarized() -> Response:
        async with state.admission.admitted():
            made = await state.summaries.make(session, key, model=model, to_seq=to_seq)
        if isinstance(made, Ended):
            return Response(made.content, made.status, {"request-id": request_id_of(request.scope)} | made.headers)
        return answer({name: getattr(made, name) for name in _SUMMARY})

    return await unless_gone(request, summarized())


def _shown(session: wire.Session) -> dict[str, Any]:
    return {name: getattr(session, name) for name in _SHOWN}


for prefix in ("", "/api/v1"):
    shown = not prefix
    router.add_api_route(f"{prefix}/sessions/{{session_id}}", get_session, methods=["GET"], include_in_schema=shown)
    router.add_api_route(
        f"{prefix}/sessions/{{session_id}}/close", close_session, methods=["POST"], include_in_schema=shown
    )
    router.add_api_route(
        f"{prefix}/sessions/{{session_id}}/summarize", summarize_session, methods=["POST"], include_in_schema=shown
    )
