"""/sessions/{session_id}: a look at a session, and closing it."""

from typing import Any

from fastapi import APIRouter, Response

from services.relay.routes.parameters import AppState, CallerKey, SessionId
from shared import wire
from shared.door import answer
from shared.session_client import SessionKey

router = APIRouter(tags=["sessions"])

_SHOWN = ("session_id", "status", "created_at", "last_activity", "expires_at", "message_count", "total_tokens")


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


def _shown(session: wire.Session) -> dict[str, Any]:
    return {name: getattr(session, name) for name in _SHOWN}


for prefix in ("", "/api/v1"):
    shown = not prefix
    router.add_api_route(f"{prefix}/sessions/{{session_id}}", get_session, methods=["GET"], include_in_schema=shown)
    router.add_api_route(
        f"{prefix}/sessions/{{session_id}}/close", close_session, methods=["POST"], include_in_schema=shown
    )
