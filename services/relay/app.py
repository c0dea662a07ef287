"""The app: its parts put together, and its routes."""

from functools import partial

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from uuid_utils import uuid7

from services.relay import development
from services.relay.account_use import AccountUse
from services.relay.admission import Admission
from services.relay.affinity import Affinity
from services.relay.attachments import Uploads
from services.relay.attempts import Asking
from services.relay.beside import running
from services.relay.callers import Callers
from services.relay.conversing import Conversing, key_of
from services.relay.event_log import EventLog
from services.relay.idempotency import Idempotency
from services.relay.key_limits import KeyLimits
from services.relay.live import Live
from services.relay.metrics import Metrics
from services.relay.models import Models
from services.relay.parts import Parts
from services.relay.pool import Pool
from services.relay.posting import Posting
from services.relay.routes import (
    accounts,
    api_keys,
    chat,
    claude,
    conversations_v0,
    conversations_v1,
    files,
    front,
    health,
    runtime,
    session_pool,
    sessions,
    sockets,
    turns,
)
from services.relay.routes.conversation_access import check_path
from services.relay.routes.rendering import CONVERSATION_ERRORS, ERRORS, on_service_error, render
from services.relay.run import RunParts
from services.relay.runs import Runs
from services.relay.sealing import Sealer
from services.relay.session_limit import SessionLimit
from services.relay.session_pool import SessionPool
from services.relay.settings import RelaySettings
from services.relay.sides import Sides
from services.relay.slots import Slots
from services.relay.spool import Spool
from services.relay.starting import Starts
from services.relay.state import State
from services.relay.summaries import Summaries
from services.relay.summarizing import Summarizer
from services.relay.turns import Turns
from services.relay.ways import Ways
from shared import __version__
from shared.database import Database
from shared.description import describe
from shared.discovery import Instances
from shared.door import BodyRules, Door, client_gone
from shared.errors import Internal, MethodNotAllowed, NotFound, ServiceError
from shared.service import Lifecycle
from shared.session_client import SessionClient
from shared.strict_route import allowed, validation_failed

log = structlog.get_logger(__name__)

_ROUTERS = [each.router for each in (claude, chat, accounts, api_keys, session_pool, sessions, turns, health, front)]
_CONVERSATION_ROUTERS = [
    *(each.router for each in (conversations_v1, conversations_v0, runtime, files)),
    runtime.either,
]
_LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
_EXPOSED_HEADERS = (
    *("X-Session-ID", "X-Turn-Id", "X-Session-Persisted", "X-Relay-Attempts", "Idempotent-Replayed"),
    *("X-Request-Id", "request-id", "Retry-After", "X-Total-Count", "Content-Disposition"),
)


def create_app(settings: RelaySettings, database: Database, lifecycle: Lifecycle) -> ASGIApp:
    """The ASGI app of one relay; it opens and closes `database`. Raises OSError and ValueError for bad settings."""
    state = _state(settings, database, lifecycle)
    app = FastAPI(
        title="relay",
        version=__version__,
        description="The Claude Messages API with sessions that are kept.",
        lifespan=lambda _: running(state),
        responses=ERRORS,
    )
    app.state.relay = state
    app.state.limits = None
    for router in _ROUTERS:
        app.include_router(router)
    for router in _CONVERSATION_ROUTERS:
        app.include_router(router, responses=CONVERSATION_ERRORS)
    app.include_router(sockets.router)
    describe(app)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(Exception, _on_fault)
    rules = BodyRules(settings.relay_max_body_bytes, settings.body_timeout_seconds)
    return Door(
        _for_pages(claude.Direct(app, state), settings),
        rules=rules,
        duration=state.metrics.duration,
        admit=check_path,
        # What is refused at the door is told to pages as well.
        render=lambda error, scope: _for_pages(render(error, scope), settings),
        is_leaving=lambda: lifecycle.draining,
    )


def _state(settings: RelaySettings, database: Database, lifecycle: Lifecycle) -> State:
    """All parts of one relay, put together; nothing runs yet."""
    secrets = development.secrets_of(settings)
    metrics = Metrics(settings.revision)
    instances = Instances([] if settings.consul_host else [settings.session_service_url.rstrip("/")])
    client = _session_client(settings, instances)
    spool = Spool(settings.local_state / "spool", client, timeout_seconds=settings.relay_complete_timeout_seconds)
    spool.load()
    relay_id = str(uuid7())
    sealer = Sealer(secrets.encryption_keys)
    ways = Ways(settings, sealer)
    held = Slots(database, relay_id)
    pool = Pool(database, held, ways.connect)
    asking = Asking(pool, settings, metrics)
    affinity = Affinity(database)
    use = AccountUse(database, pool, relay_id)
    callers = Callers(database, secrets.pepper)
    key_limits = KeyLimits(database)
    records = Idempotency(database)
    pooled = SessionPool(database, pool, max_size=settings.relay_max_pool_size)
    summaries = Summaries(Summarizer(client, asking, metrics, key_limits), held, settings)
    limit = SessionLimit(client, max_sessions=settings.relay_max_sessions)
    events = EventLog(database, client)
    admission = _admission(settings)
    parts = Parts(
        *(settings, client, asking, affinity, spool, metrics, admission, limit, records, key_limits, pooled, summaries),
        sides=Sides(client),
        event_log=events,
    )
    turns = Turns(parts)
    return State(
        settings=settings,
        secrets=secrets,
        lifecycle=lifecycle,
        database=database,
        metrics=metrics,
        instances=instances,
        sessions=client,
        callers=callers,
        key_limits=key_limits,
        asking=asking,
        sealer=sealer,
        ways=ways,
        account_use=use,
        models=Models(pool),
        spool=spool,
        admission=admission,
        session_limit=limit,
        session_pool=pooled,
        summaries=summaries,
        slots=held,
        affinity=affinity,
        idempotency=records,
        turns=turns,
        conversing=_conversing(parts, turns, database, secrets.pepper),
        uploads=Uploads(database),
    )


def _session_client(settings: RelaySettings, instances: Instances) -> SessionClient:
    tokens = settings.session_service_tokens
    token = tokens[0].get_secret_value() if tokens else ""
    return SessionClient(instances, token=token, timeout_seconds=settings.relay_store_timeout_seconds)


def _admission(settings: RelaySettings) -> Admission:
    return Admission(
        max_in_flight=settings.relay_max_in_flight,
        max_queued=settings.relay_max_queued,
        queue_seconds=settings.relay_queue_seconds,
        requests_per_second=settings.relay_requests_per_second,
    )


def _conversing(parts: Parts, turns: Turns, database: Database, pepper: str) -> Conversing:
    settings, sessions, log = parts.settings, parts.sessions, parts.event_log
    live, pool = Live(database), parts.asking.pool
    most = settings.relay_max_running_conversations
    run_parts = RunParts(settings, database, sessions, turns, pool, live, log, partial(key_of, database))
    runs = Runs(database, live, log, run_parts, most)
    posting = Posting(database, sessions, log, runs)
    starts = Starts(
        *(database, sessions, pool, parts.session_limit, posting, pepper, most),
        wait_seconds=settings.relay_start_wait_seconds,
    )
    return Conversing(database, sessions, live, log, runs, posting, starts, pepper)


def _for_pages(app: ASGIApp, settings: RelaySettings) -> ASGIApp:
    """Lets web pages of the allowed origins call, and read what the answers' headers say."""
    local = _LOCAL_PAGES if settings.is_development and not settings.relay_cors_origins else None
    if not (settings.relay_cors_origins or local):
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.relay_cors_origins,
        allow_origin_regex=local,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=_EXPOSED_HEADERS,
    )


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class
    return render(validation_failed(error.errors()), request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router says of unknown paths and methods, in the words of this API."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    if error.status_code != 405:
        return render(NotFound(), request.scope)
    response = render(MethodNotAllowed(), request.scope)
    response.headers["allow"] = allowed([*_ROUTERS, *_CONVERSATION_ROUTERS], request.scope)
    return response


async def _on_fault(request: Request, _error: Exception) -> Response:
    """Any fault of ours; the door logs it."""
    return render(Internal(), request.scope)
