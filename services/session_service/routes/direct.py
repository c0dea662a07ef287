"""The calls of every turn (an append, lining up, opening, completing) and the plain reading of messages, served past
FastAPI's layers.

Its one invariant: what is served here is answered as its route would answer it; whatever is unusual about a request
(a key, a bad id, another method) is left to the route.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from fastapi import Request, Response
from pydantic import TypeAdapter, ValidationError
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.session_service.errors import error_of
from services.session_service.routes import messages, turns
from services.session_service.routes.parameters import if_match_of
from services.session_service.state import State
from shared import values, wire
from shared.database import Violation
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


async def _list(request: Request, state: State, ids: Ids) -> Response:
    numbers = {name: int(value) for name, value in request.query_params.items() if name in _NUMBERS}
    asked: dict[str, Any] = {**ids, **numbers}
    return await messages.list_messages(**asked, db=state.require_ready())


_CALLS: Final[dict[tuple[str, str], tuple[Call, str]]] = {
    ("POST", "messages"): (_append, "/api/v1/sessions/{session_id}/messages"),
    ("POST", "align"): (_align, "/api/v1/sessions/{session_id}/align"),
    ("POST", "turns"): (_open, "/api/v1/sessions/{session_id}/turns"),
    ("POST", "complete"): (_complete, "/api/v1/sessions/{session_id}/turns/{turn_id}/complete"),
    ("GET", "messages"): (_list, "/api/v1/sessions/{session_id}/messages"),
}
# With these alone a reading is plain; each is a number that its parameter takes.
_NUMBERS: Final = frozenset({"page", "page_size", "after_seq", "before_seq", "limit"})
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,2}")


class Direct:
    """Serves what it can itself, and leaves the rest to `app`."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        routes = [each for each in (*messages.router.routes, *turns.router.routes) if isinstance(each, Route)]
        known = {(method, each.path): each for each in routes for method in each.methods or ()}
        self._calls = {name: (call, known[name[0], path]) for name, (call, path) in _CALLS.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        served = self._served(scope, receive) if scope["type"] == "http" else None
        if served is None:
            await self._app(scope, receive, send)
            return
        call, request, ids = served
        try:
            response = await call(request, self._state, ids)
        except Violation as violation:
            raise error_of(violation) from violation
        await response(scope, receive, send)

    def _served(self, scope: Scope, receive: Receive) -> tuple[Call, Request, Ids] | None:
        """What answers the request here, and what it is given; None where that is left to the route."""
        found = _found(scope)
        if found is None or (name := (scope["method"], found[0])) not in self._calls:
            return None
        request = Request(scope, receive)
        ids = _ids(request, found[1])
        if ids is None or (name[0] == "GET" and not _is_plain(request)):
            return None
        call, scope["route"] = self._calls[name]
        return call, request, ids


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


def _is_plain(request: Request) -> bool:
    """Whether beside the user's id it asks for numbers only, each once, which every one of these parameters takes."""
    asked = request.query_params.multi_items()
    return len({name for name, _ in asked}) == len(asked) and all(
        name == "user_id" or (name in _NUMBERS and _NUMBER.fullmatch(value)) for name, value in asked
    )
