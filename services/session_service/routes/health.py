"""Health and metrics; these need no token."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import structlog
from fastapi import APIRouter, Response

from services.session_service import revision, turns
from services.session_service.routes.parameters import AppState
from services.session_service.state import State
from shared import __version__, wire
from shared.door import answer
from shared.errors import ServiceError
from shared.telemetry import exposition

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)

_PROBE_SECONDS = 2.0
_AWAY: dict[int | str, dict[str, Any]] = {503: {"model": wire.Health, "description": "Draining, or not ready"}}


def _told(state: State, status: str) -> dict[str, Any]:
    return {
        "status": status,
        "service": "session_service",
        "port": state.settings.service_port,
        "version": __version__,
        "timestamp": datetime.now(UTC),
    }


@router.get("/health", response_model=wire.Health, responses=_AWAY)
async def get_health(state: AppState) -> Response:
    """Whether this process takes calls; 503 while it stops."""
    if state.lifecycle.draining:
        return answer(_told(state, "draining"), status=503)
    return answer(_told(state, "healthy"))


@router.get("/health/live", response_model=wire.Health)
async def get_live(state: AppState) -> Response:
    """Whether this process runs; touches nothing."""
    return answer(_told(state, "alive"))


@router.get("/health/ready", response_model=wire.Health, responses=_AWAY)
async def get_ready(state: AppState) -> Response:
    """200 only when calls can be served."""
    if state.lifecycle.draining:
        return answer(_told(state, "draining"), status=503)
    connected = state.ready.is_set() and await _probe(state) is not None
    return answer(_told(state, "ready" if connected else "not_ready"), status=200 if connected else 503)


@router.get("/health/detailed", response_model=wire.DetailedHealth, responses=_AWAY)
async def get_detailed(state: AppState) -> Response:
    """As /health, with the database, its schema's revision and the pool's use; 503 when Postgres is away."""
    found = await _probe(state)
    size, idle, most = state.database.pool_use()
    told = _told(state, "operational" if found else "degraded") | {
        "database_connected": found is not None,
        "schema_revision": found,
        "pool": {"size": size, "idle": idle, "max": most},
    }
    return answer(told, status=200 if found else 503)


async def _probe(state: State) -> str | None:
    """The schema's revision, or None when Postgres does not tell it within two seconds."""
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            return await revision.get(state.database, state.database.schema)
    except (ServiceError, TimeoutError):
        return None


@router.get("/metrics", response_class=Response)
async def get_metrics(state: AppState) -> Response:
    size, idle, _most = state.database.pool_use()
    state.metrics.pool.labels("idle").set(idle)
    state.metrics.pool.labels("busy").set(size - idle)
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            state.metrics.open_turns.set(await state.require_ready().value(turns.COUNT_OPEN))
    except (ServiceError, TimeoutError):
        log.warning("open_turns_not_counted")
    return exposition(state.metrics.registry)
