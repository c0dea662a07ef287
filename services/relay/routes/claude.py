"""The Claude Messages API: messages, their tokens counted, and the models there are.

A message is served past FastAPI's layers, by `Direct`; its routes here describe it.
"""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.relay import request as requests
from services.relay.counting import count
from services.relay.errors import InvalidRequest, ModelNotServed, NotPermitted
from services.relay.keys import Key
from services.relay.parts import Caller
from services.relay.routes.parameters import AppState, MessagesKey, caller_with
from services.relay.routes.rendering import KIRO_PREFIX, request_id_of
from services.relay.routes.replies import reply_of, unless_gone
from services.relay.state import State
from services.relay.upstream import QUERY_LIMIT_CHARACTERS
from shared.door import answer

router = APIRouter(tags=["claude"])

_MESSAGES = "/v1/messages"
PREFIXES = ("", "/api", KIRO_PREFIX, f"/api/v1{KIRO_PREFIX}")


async def create_message(request: Request, state: AppState, key: MessagesKey) -> Response:
    """A message from a model, plain or streamed, in the session that the request belongs to."""
    content = requests.read(await _whole(request), default_max_tokens=state.settings.relay_default_max_tokens)
    _check_model(key, content.model)
    turn = state.turns.begin(_caller(request, key), content)
    return await reply_of(turn, request, ping_seconds=state.settings.relay_ping_seconds)


async def count_tokens(request: Request, state: AppState, key: MessagesKey) -> Response:
    """The tokens of a request, as upstream counts them; nothing is stored."""
    content = requests.read(await _whole(request), default_max_tokens=None)
    _check_model(key, content.model)

    async def counted() -> Response:
        async with state.admission.admitted():
            ended = await count(state.asking, _caller(request, key), content)
        return Response(ended.content, ended.status, {"request-id": request_id_of(request.scope)} | ended.headers)

    return await unless_gone(request, counted())


async def list_models(
    request: Request,
    state: AppState,
    key: MessagesKey,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after_id: str | None = None,
    before_id: str | None = None,
) -> Response:
    """The models that the accounts serve, paged as in the Claude API."""
    models = [model for model in await state.models.all() if key.may_ask(model["id"])]
    ids = [model["id"] for model in models]
    start, end = 0, len(models)
    if after_id in ids:
        start = ids.index(after_id) + 1
    if before_id in ids:
        end = ids.index(before_id)
        start = max(start, end - limit)
    page = models[start : min(end, start + limit)]
    return answer(
        {
            "data": page,
            "has_more": start > 0 if before_id in ids else start + len(page) < end,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
        },
        headers={"request-id": request_id_of(request.scope)},
    )


async def get_model(model_id: str, request: Request, state: AppState, key: MessagesKey) -> Response:
    for model in await state.models.all():
        if model["id"] == model_id and key.may_ask(model_id):
            return answer(model, headers={"request-id": request_id_of(request.scope)})
    raise ModelNotServed


async def _whole(request: Request) -> bytes:
    """The request's body, not kept with the request, which lives as long as its answer."""
    return b"".join([piece async for piece in request.stream()])


def _check_model(key: Key, model: str) -> None:
    if not key.may_ask(model):
        raise NotPermitted("model: the API key may not ask this one")


def _caller(request: Request, key: MessagesKey) -> Caller:
    query = request.url.query
    if len(query) > QUERY_LIMIT_CHARACTERS:
        raise InvalidRequest.at("query", f"has at most {QUERY_LIMIT_CHARACTERS} characters")
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Caller(key, headers, query, request_id_of(request.scope))


for prefix in PREFIXES:
    shown = not prefix
    router.add_api_route(prefix + _MESSAGES, create_message, methods=["POST"], include_in_schema=shown)
    router.add_api_route(f"{prefix}/v1/messages/count_tokens", count_tokens, methods=["POST"], include_in_schema=shown)
    router.add_api_route(f"{prefix}/v1/models", list_models, methods=["GET"], include_in_schema=shown)
    router.add_api_route(f"{prefix}/v1/models/{{model_id:path}}", get_model, methods=["GET"], include_in_schema=shown)


class Direct:
    """Serves POST of a message itself, and leaves the rest to `app`.

    FastAPI's layers have nothing to do for it, and a stream would hold a dozen of their frames for its whole length.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        self._key_of = caller_with("messages")
        paths = {prefix + _MESSAGES for prefix in PREFIXES}
        self._routes = {each.path: each for each in router.routes if isinstance(each, Route) and each.path in paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._routes:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._routes[scope["path"]]
        request = Request(scope, receive)
        key = await self._key_of(request, self._state)
        response = await create_message(request, self._state, key)
        del request  # a stream may run for minutes
        await response(scope, receive, send)
