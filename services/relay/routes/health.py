"""Health, the queue's state, and metrics; these need no key."""

from time import monotonic
from typing import Any

from fastapi import APIRouter, Response

from services.relay.routes.parameters import AppState
from services.relay.state import State
from shared import __version__
from shared.door import answer
from shared.telemetry import exposition

router = APIRouter(tags=["health"])


def _told(state: State, status: str) -> dict[str, Any]:
    return {"status": status, "service": "relay", "version": __version__}


@router.get("/health")
async def get_health(state: AppState) -> Response:
    """Whether this process takes requests; 503 while it stops."""
    told = _told(state, "draining" if state.lifecycle.draining else "healthy")
    told |= {"agent_initialized": _is_ready(state), "session_count": state.session_limit.active or 0}
    return answer(told, status=503 if state.lifecycle.draining else 200)


@router.get("/health/live")
async def get_live(state: AppState) -> Response:
    """Whether this process runs; touches nothing."""
    return answer(_told(state, "alive"))


@router.get("/health/ready")
async def get_ready(state: AppState) -> Response:
    """200 only when requests can be served: the database was reached and an instance of session_service is known."""
    if state.lifecycle.draining:
        return answer(_told(state, "draining"), status=503)
    is_ready = _is_ready(state)
    return answer(_told(state, "ready" if is_ready else "not_ready"), status=200 if is_ready else 503)


def _is_ready(state: State) -> bool:
    return state.is_ready and bool(state.instances.urls)


@router.get("/queue/health")
@router.get("/api/v1/queue/health", include_in_schema=False)
async def get_queue(state: AppState) -> Response:
    """How busy the relay is, and whether there are accounts to serve with; 503 when there is none."""
    counts = {"total": len(state.pool.members), "available": 0, "cooling": 0, "disabled": 0}
    for member in state.pool.members.values():
        seen = member.state(monotonic())
        counts["available" if seen == "active" else seen] += 1
    told = {
        "status": "healthy" if counts["available"] else "unavailable",
        "in_flight": state.admission.in_flight,
        "queued": state.admission.queued,
        "max_in_flight": state.settings.relay_max_in_flight,
        "accounts": counts,
        "sessions": {"active": state.session_limit.active, "max": state.session_limit.max},
    }
    return answer(told, status=200 if counts["available"] else 503)


@router.get("/metrics", response_class=Response)
async def get_metrics(state: AppState) -> Response:
    metrics = state.metrics
    metrics.in_flight.set(state.admission.in_flight)
    metrics.queued.set(state.admission.queued)
    metrics.spool_entries.set(state.spool.count)
    metrics.spool_age.set(state.spool.oldest_age_seconds)
    metrics.account_state.clear()
    for member in state.pool.members.values():
        metrics.account_state.labels(member.account.id, member.state(monotonic())).set(1)
    return exposition(metrics.registry)
