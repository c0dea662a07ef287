"""What the routes take: ids, pages, and the state of the app; and how they tell of their errors."""

from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request

from services.session_service.state import State
from shared import wire
from shared.database import Database
from shared.errors import (
    BodyTooLarge,
    DatabaseUnavailable,
    RequestTimeout,
    ServiceError,
    Unauthorized,
    ValidationFailed,
)


async def _state(request: Request) -> State:
    state: State = request.app.state.service
    return state


async def _database(request: Request) -> Database:
    state: State = request.app.state.service
    return state.require_ready()


AppState = Annotated[State, Depends(_state)]
Db = Annotated[Database, Depends(_database)]

UserId = Annotated[wire.UserId, Query(description="The user whose session it is")]
UserIdInPath = Annotated[wire.UserId, Path()]
SessionId = Annotated[wire.SessionId, Path()]
MessageId = Annotated[wire.MessageId, Path()]
OtherId = Annotated[wire.MessageId, Path()]

Page = Annotated[int, Query(ge=1, le=10**9)]
PageSize = Annotated[int, Query(ge=1, le=100)]
MessagePageSize = Annotated[int, Query(ge=1, le=1000)]
Cursor = Annotated[str | None, Query(max_length=2048, description="next_cursor of the page before")]


def errors(*expected: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for its description."""
    told: dict[int | str, dict[str, Any]] = {}
    every: list[type[ServiceError]] = [ValidationFailed, Unauthorized, *expected, DatabaseUnavailable]
    for error in every:
        entry = told.setdefault(error.status, {"model": wire.Error, "description": ""})
        entry["description"] = ", ".join(filter(None, [entry["description"], f"`{error.code}`"]))
    return told


def body_errors(*expected: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """As `errors`, for routes that take a body."""
    return errors(*expected, BodyTooLarge, RequestTimeout)
