"""/admin/session-pool: the sessions whose upstream prompt caches are kept warm and preferred."""

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from services.relay.pooled_sessions import Entry
from services.relay.routes.admin import AdminRoute
from services.relay.routes.parameters import AppState
from services.relay.session_pool import SessionPool
from shared import values
from shared.door import answer

router = APIRouter(prefix="/admin/session-pool", tags=["session pool"], route_class=AdminRoute)

_SHOWN = (
    *("session_id", "user_id", "account_id", "model", "cache_read_share"),
    *("collected_at", "last_used_at", "is_current"),
)


class CurrentSession(BaseModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True, alias_generator=to_camel)

    session_id: values.SessionId


@router.get("/stats")
async def get_stats(state: AppState) -> Response:
    """What is in the pool, in the order of collection; account, model and cache reads are those of the last turn."""
    pool = state.session_pool
    entries = await pool.entries()
    data = {
        "currentSession": _current(entries),
        "poolSize": len(entries),
        "sessions": [entry.session_id for entry in entries],
        "entries": [_shown(entry, pool) for entry in entries],
        "maxPoolSize": pool.max_size,
        "lastSwitchTime": entries[0].switched_at if entries else None,
    }
    return answer({"success": True, "data": data})


@router.post("/switch")
async def switch_session(state: AppState) -> Response:
    """Makes the next session current whose account can be used."""
    chosen = await state.session_pool.switch()
    current = chosen.session_id if chosen else _current(await state.session_pool.entries())
    if chosen is not None:
        message = f"Switched to session {current}"
    elif current is None:
        message = "The session pool is empty"
    else:
        message = "There is no other healthy session in the pool"
    return answer(
        {"success": True, "switched": chosen is not None, "message": message, "data": {"currentSession": current}}
    )


@router.post("/set-current")
async def set_current_session(wanted: CurrentSession, state: AppState) -> Response:
    """Makes this session current; of several with the same id, the one collected first."""
    await state.session_pool.set_current(wanted.session_id)
    data = {"currentSession": wanted.session_id}
    return answer({"success": True, "message": f"The current session is {wanted.session_id}", "data": data})


@router.delete("")
async def clear_session_pool(state: AppState) -> Response:
    """Empties the pool; conversations are untouched."""
    cleared = await state.session_pool.clear()
    return answer({"success": True, "message": "Session pool cleared", "data": {"cleared": cleared}})


def _current(entries: list[Entry]) -> str | None:
    return next((entry.session_id for entry in entries if entry.is_current), None)


def _shown(entry: Entry, pool: SessionPool) -> dict[str, Any]:
    return {**{to_camel(name): getattr(entry, name) for name in _SHOWN}, "isHealthy": pool.is_healthy(entry)}
