"""The calls of every turn (an append, lining up, opening, completing), served past FastAPI's layers.

Its one invariant: what is served here is answered as its route would answer it; whatever is unusual about a request
(a key, a bad id, another method) is left to the route.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from fastapi import Request, Response
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.session_service.errors import error_of
from services.session_service.routes import messages, turns
from services.session_service.routes.parameters import if_match_of
from services.session_service.state import State
from shared import values, wire
from shared.database import Violation
from shared.door import client_gone, error_answer
from shared.strict_route import read_body

_PREFIX: Final = ["", "api", "v1", "sessions"]
_USER_ID: Final[TypeAdapter[str]] = TypeAdapter(values.UserId)
_SESSION_ID: Final[TypeAdapter[str]] = TypeAdapter(values.SessionId)
_OTHER_ID: Final[TypeAdapter[str]] = TypeAdapter(values.MessageId)

Ids = Mapping[str, str]
Call = Callable[[Request, State, Ids], Awaitable[Response]]


async def _append(request: Request, state: State, ids: Ids) -> Response:
    message = await read_body(request, wire.NewMessage, state.settings.limits)
    database = state.require_ready()
    return await messages.append_message(**ids, message=message, writer=database, db=database, state=state)


async def _align(request: Request, state: State, ids: Ids) -> Response:
    array = await read_body(request, wire.Align, state.settings.limits)
    return await messages.align_history(**ids, array=array, db=state.require_ready())


async def _open(request: Request, state: State, ids: Ids) -> Response:
    turn = await read_body(request, wire.OpenTurn, state.settings.limits)
    database = state.require_ready()
    if_match = if_match_of(request.headers.get("if-match"))
    return await turns.open_turn(ids["session_id"], ids["user_id"], turn, request, database, state, if_match)


async def _complete(request: Request, state: State, ids: Ids) -> Response:
    result = await read_body(request, wire.CompleteTurn, state.settings.limits)
    return await turns.complete_turn(**ids, result=result, writer=state.require_ready(), state=state)


_CALLS: Final[dict[str, tuple[Call, str]]] = {
    "messages": (_append, "/api/v1/sessions/{session_id}/messages"),
    "align": (_align, "/api/v1/sessions/{session_id}/align"),
    "turns": (_open, "/api/v1/sessions/{session_id}/turns"),
    "complete": (_complete, "/api/v1/sessions/{session_id}/turns/{turn_id}/complete"),
}


class Direct:
    """Serves what it can itself, and leaves the rest to `app`."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        routes = [*messages.router.routes, *turns.router.routes]
        posts = {each.path: each for each in routes if isinstance(each, Route) and "POST" in (each.methods or ())}
        self._calls = {name: (call, posts[path]) for name, (call, path) in _CALLS.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _found(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is not None:
            name, in_path = found
            request = Request(scope, receive)
            if (ids := _ids(request, in_path)) is not None:
                call, scope["route"] = self._calls[name]
                response = await self._response(request, call, ids)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _response(self, request: Request, call: Call, ids: Ids) -> Response:
        try:
            return await call(request, self._state, ids)
        except Violation as violation:
            return error_answer(error_of(violation))
        except ClientDisconnect as gone:
            return await client_gone(request, gone)


def _found(scope: Scope) -> tuple[str, dict[str, str]] | None:
    """The call's name and the ids in its path."""
    match scope["path"].split("/"):
        case [*prefix, session_id, ("messages" | "align" | "turns") as name] if prefix == _PREFIX:
            return name, {"session_id": session_id}
        case [*prefix, session_id, "turns", turn_id, "complete"] if prefix == _PREFIX:
            return "complete", {"session_id": session_id, "turn_id": turn_id}
    return None


def _ids(request: Request, in_path: dict[str, str]) -> dict[str, str] | None:
    """All ids of the request as its route would take them, or None."""
    if "idempotency-key" in request.headers:
        return None
    try:
        ids = {"user_id": _USER_ID.validate_python(request.query_params.get("user_id"))}
        ids["session_id"] = _SESSION_ID.validate_python(in_path["session_id"])
        if "turn_id" in in_path:
            ids["turn_id"] = _OTHER_ID.validate_python(in_path["turn_id"])
    except ValidationError:
        return None
    return ids
