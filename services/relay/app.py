"""The app: its rooms put together, and what runs beside the requests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from services.relay import accounts, development, keys
from services.relay.metrics import Metrics
from services.relay.parts import Parts
from services.relay.routes import claude, health, sessions
from services.relay.routes.rendering import on_service_error, render
from services.relay.settings import RelaySettings
from services.relay.spool import Spool
from services.relay.state import State
from services.relay.turns import Turns
from services.relay.upstream.anthropic import create_client
from shared import __version__
from shared.database import Database
from shared.description import describe
from shared.discovery import Consul, Instances, Watch
from shared.door import BodyRules, Door
from shared.errors import Internal, MethodNotAllowed, NotFound, ServiceError, Unavailable
from shared.service import Lifecycle
from shared.session_client import SessionClient
from shared.strict_route import validation_failed

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 1.0
_SESSION_SERVICE = "session_service"


def create_app(settings: RelaySettings, database: Database, lifecycle: Lifecycle) -> ASGIApp:
    """The ASGI app of one relay; it opens and closes `database`. Raises OSError and ValueError for bad settings."""
    secrets = development.secrets_of(settings)
    metrics = Metrics(settings.revision)
    instances = Instances([] if settings.consul_host else [settings.session_service_url.rstrip("/")])
    tokens = settings.session_service_tokens
    client = SessionClient(
        instances,
        token=tokens[0].get_secret_value() if tokens else "",
        timeout_seconds=settings.relay_store_timeout_seconds,
    )
    spool = Spool(settings.local_state / "spool", client, timeout_seconds=settings.relay_complete_timeout_seconds)
    spool.load()
    upstream_client = create_client()
    known = accounts.from_settings(settings, upstream_client)
    state = State(
        settings=settings,
        secrets=secrets,
        lifecycle=lifecycle,
        database=database,
        metrics=metrics,
        instances=instances,
        sessions=client,
        keys=keys.Keys(database, secrets.pepper),
        accounts=known,
        spool=spool,
        turns=Turns(Parts(settings, client, known, spool, metrics)),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        beside = [asyncio.create_task(_open(state)), asyncio.create_task(spool.keep_delivering())]
        if settings.consul_host:
            beside.append(asyncio.create_task(_watch(state)))
        try:
            yield
        finally:
            await state.turns.stop()
            for task in beside:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await client.close()
            await upstream_client.aclose()
            await database.close()

    app = FastAPI(
        title="relay",
        version=__version__,
        description="The Claude Messages API with sessions that are kept.",
        lifespan=lifespan,
    )
    app.state.relay = state
    for routes in (claude, sessions, health):
        app.include_router(routes.router)
    describe(app)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_fault)
    rules = BodyRules(settings.relay_max_body_bytes, settings.body_timeout_seconds)
    return Door(app, rules=rules, duration=metrics.duration, render=render)


async def _open(state: State) -> None:
    """Makes the app ready once Postgres answers and the tables are there; until then requests are sent away."""
    while not state.is_ready:
        try:
            if not state.database.is_open:
                await state.database.open()
            if await keys.table_exists(state.database, state.database.schema):
                if state.secrets.api_key is not None:
                    await state.keys.add(state.secrets.api_key, user_id=development.USER_ID, name="development")
                state.is_ready = True
                log.info("ready", schema=state.database.schema)
                return
            log.warning("schema_missing", schema=state.database.schema, hint="run the migrations")
        except Unavailable:
            log.warning("database_unreachable")
        await asyncio.sleep(_RETRY_SECONDS)


async def _watch(state: State) -> None:
    """Keeps the instances of session_service as Consul knows them."""
    settings = state.settings
    token = settings.consul_token.get_secret_value() or None
    agent = Consul(settings.consul_host, settings.consul_port, token=token)
    try:
        await Watch(agent, _SESSION_SERVICE, state.instances).run()
    finally:
        await agent.close()


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class
    return render(validation_failed(error.errors()), request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router says of unknown paths and methods, in the words of this API."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    told: ServiceError = MethodNotAllowed() if error.status_code == 405 else NotFound()
    response = render(told, request.scope)
    response.headers.update(error.headers or {})
    return response


async def _on_fault(request: Request, _error: Exception) -> Response:
    """Any fault of ours; the door logs it."""
    return render(Internal(), request.scope)
