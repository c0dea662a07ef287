"""What the routes take: ids, pages, and the state of the app; and how they tell of their errors."""

import re
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Path, Query, Request, Response
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from services.session_service.sessions import IfVersion
from services.session_service.state import State
from shared import values, wire
from shared.database import Database
from shared.door import answer
from shared.errors import (
    BodyTooLarge,
    DatabaseUnavailable,
    IdempotencyInProgress,
    IdempotencyKeyReused,
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

_INTEGER: Final = re.compile(r"-?[0-9]+")
_VERSION: Final = re.compile(r'"([0-9]{1,18})"|([0-9]{1,18})')

UserId = Annotated[values.UserId, Query(description="The user whose session it is")]
UserIdInPath = Annotated[values.UserId, Path()]
SessionId = Annotated[values.SessionId, Path()]
MessageId = Annotated[values.MessageId, Path()]
OtherId = Annotated[values.MessageId, Path()]


def _digits(value: Any) -> Any:
    """An integer is its digits: no `1.0`, `1_0` or ` 1`, as in bodies no float or string is one."""
    if isinstance(value, str) and not _INTEGER.fullmatch(value):
        raise PydanticCustomError("int_parsing", "Input should be a valid integer")
    return value


Integer = Annotated[int, BeforeValidator(_digits)]
Page = Annotated[Integer, Query(ge=1, le=10**9)]
PageSize = Annotated[Integer, Query(ge=1, le=100)]
MessagePageSize = Annotated[Integer, Query(ge=1, le=1000)]
Cursor = Annotated[str | None, Query(max_length=2048, description="next_cursor of the page before")]


IDEMPOTENCY_ERRORS = (IdempotencyInProgress, IdempotencyKeyReused)


async def _if_match(
    if_match: Annotated[str | None, Header(alias="If-Match", description='A version as in ETag, or "*"')] = None,
) -> IfVersion | None:
    return if_match_of(if_match)


def if_match_of(if_match: str | None) -> IfVersion | None:
    """What the header's value asks for. Raises ValidationFailed."""
    if if_match is None:
        return None
    if if_match.strip() == "*":
        return IfVersion(None)
    found = _VERSION.fullmatch(if_match.strip())
    if found is None:
        raise ValidationFailed.at("header", "if-match", msg='A version in quotes, or "*"')
    return IfVersion(int(found[1] or found[2]))


IfMatch = Annotated[IfVersion | None, Depends(_if_match)]


def check_ids(options: wire.CreateSessionInTurn | None, user_id: str, session_id: str) -> None:
    """Ids in `create_session` may be left out, and are the URL's where they are given."""
    for name, expected in (("user_id", user_id), ("session_id", session_id)):
        if options is not None and getattr(options, name) not in {None, expected}:
            raise ValidationFailed.at("body", "create_session", name, msg="Differs from the URL's")


def session_answer(session: wire.Session) -> Response:
    """A session, with its version as the ETag."""
    return answer(session, headers={"etag": f'"{session.version}"'})


TAGGED: Final[dict[int | str, dict[str, Any]]] = {
    200: {"headers": {"ETag": {"description": "The session's version, for If-Match", "schema": {"type": "string"}}}}
}


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
