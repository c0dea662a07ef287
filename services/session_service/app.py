"""The app: its rooms put together, and what runs beside the requests."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Scope

from services.session_service import pacing, retention, revision
from services.session_service.errors import error_of
from services.session_service.gathering import Gathering
from services.session_service.known import KnownSessions
from services.session_service.metrics import Metrics
from services.session_service.routes import health, memories, messages, search, sessions, stats, transfer, turns
from services.session_service.routes.direct import Direct
from services.session_service.settings import SessionServiceSettings
from services.session_service.state import State
from services.session_service.stats import Cached
from shared import __version__
from shared.database import Database, Violation
from shared.description import describe
from shared.door import BodyRules, Door, client_gone, error_answer
from shared.errors import (
    Internal,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    Unauthorized,
    Unavailable,
    ValidationFailed,
)
from shared.service import Lifecycle
from shared.strict_route import allowed

log = structlog.get_logger(__name__)

_ROUTERS = [each.router for each in (stats, search, transfer, sessions, messages, turns, memories, health)]
_RETRY_SECONDS = 1.0


def create_app(settings: SessionServiceSettings, database: Database, lifecycle: Lifecycle) -> ASGIApp:
    """The ASGI app of one session_service; it opens and closes `database`."""
    metrics = Metrics(settings.revision)
    state = State(
        settings,
        lifecycle,
        database,
        metrics,
        stats=Cached(database, settings.stats_cache_seconds),
        gathering=Gathering(database),
        known=KnownSessions(settings.known_sessions),
    )
    app = FastAPI(
        title="session_service",
        version=__version__,
        description="The durable record of conversations: sessions, messages, turns, memories, stats.",
        lifespan=_lifespan,
    )
    app.state.service = state
    app.state.limits = settings.limits
    for router in _ROUTERS:
        app.include_router(router)
    describe(app, bearer="One of SESSION_SERVICE_TOKENS, where that is set")
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(Violation, _on_violation)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(Exception, _on_fault)
    return Door(
        Direct(app, state),
        rules=BodyRules(settings.limits.body_bytes, settings.body_timeout_seconds, frozenset({transfer.IMPORT_PATH})),
        duration=metrics.duration,
        admit=_admission(settings),
        is_leaving=lambda: lifecycle.draining,
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: State = app.state.service
    settings = state.settings
    work = [
        _open(state),
        retention.keep_sweeping(
            state.database, interval_seconds=settings.sweep_interval_seconds, expired_total=state.metrics.expired
        ),
    ]
    if settings.news_interval_seconds:
        work.append(_keep_up(state))
    beside = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await state.database.close()


async def _keep_up(state: State) -> None:
    await state.ready.wait()
    await pacing.keep_up(state.database, interval_seconds=state.settings.news_interval_seconds)


async def _open(state: State) -> None:
    """Makes the app ready once Postgres answers and the schema is there; until then calls get 503."""
    while not state.ready.is_set():
        try:
            if not state.database.is_open:
                await state.database.open()
            found = await revision.get(state.database, state.database.schema)
        except Unavailable:
            log.warning("database_unreachable")
        else:
            if found is not None:
                state.ready.set()
                log.info("ready", schema=state.database.schema, revision=found)
                return
            log.warning("schema_missing", schema=state.database.schema, hint="run the migrations")
        await asyncio.sleep(_RETRY_SECONDS)


def _admission(settings: SessionServiceSettings) -> Callable[[Scope], None]:
    """Refuses calls without one of the tokens, where there are any; health and metrics need none."""
    tokens = [token.get_secret_value().encode() for token in settings.session_service_tokens]

    def admit(scope: Scope) -> None:
        is_public = scope["path"].startswith("/health") or scope["path"] == "/metrics"
        if tokens and not is_public and not _has_token(scope, tokens):
            raise Unauthorized
        _refuse_hidden_slashes(scope)

    return admit


def _has_token(scope: Scope, tokens: list[bytes]) -> bool:
    sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, token = sent.partition(b" ")
    known = [secrets.compare_digest(token.strip(), each) for each in tokens]
    return scheme.lower() == b"bearer" and any(known)


def _refuse_hidden_slashes(scope: Scope) -> None:
    """An encoded slash in a user's or session's id would lead to another route; only message ids may have one."""
    segments = scope.get("raw_path", b"").lower().split(b"/")
    before_message_id = segments[:6] if segments[5:6] == [b"messages"] else segments
    if any(b"%2f" in segment for segment in before_message_id):
        raise ValidationFailed.at("path", msg="An id has no '/'")


async def _on_service_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101 - registered for this class
    return error_answer(error)


async def _on_violation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Violation)  # noqa: S101 - registered for this class
    return error_answer(error_of(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router says of unknown paths and methods, in the words of this API."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    if error.status_code != 405:
        return error_answer(NotFound())
    response = error_answer(MethodNotAllowed())
    response.headers["allow"] = allowed(_ROUTERS, request.scope)
    return response


async def _on_fault(_request: Request, _error: Exception) -> Response:
    """Any fault of ours; the door logs it."""
    return error_answer(Internal())
