"""Routes that create something, and so take an Idempotency-Key."""

import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Request, Response
from pydantic import TypeAdapter, ValidationError

from services.session_service import idempotency
from services.session_service.routes.parameters import IDEMPOTENCY_ERRORS, body_errors
from services.session_service.state import State
from shared import values
from shared.database import Writer
from shared.errors import ServiceError, ValidationFailed
from shared.json import loads
from shared.strict_route import StrictRoute

_USER_ID: Final[TypeAdapter[str]] = TypeAdapter(values.UserId)
_SESSION_ID: Final[TypeAdapter[str]] = TypeAdapter(values.SessionId)
_VISIBLE_ASCII: Final = re.compile(r"[\x21-\x7e]{1,255}")


class CreatingRoute(StrictRoute):
    """A route whose write, given a key, is recorded with its answer and never done twice."""

    async def pass_on(self, request: Request, value: Any, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        if "idempotency-key" not in request.headers:
            return await handle(request)
        in_path = "{session_id}" in self.path
        user_id = request.query_params.get("user_id") if in_path else (value or {}).get("user_id")
        key = given_key(request, user_id, _hash(value), session_id=request.path_params.get("session_id"))
        if key is None:
            return await handle(request)
        state: State = request.app.state.service
        database = state.require_ready()
        try:
            async with state.running.alone(key):
                await idempotency.replay(database, key)
                request.state.writer = idempotency.Once(database, key)
                return await handle(request)
        except idempotency.Replayed as replayed:
            return replayed_answer(replayed)


def _hash(value: Any) -> bytes:
    """Of the body as a JSON value, so that its writing does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).digest()


def given_key(
    request: Request, user_id: object, body_hash: bytes, session_id: str | None = None
) -> idempotency.Key | None:
    """The key that came with the request, for a creating one; None where there is none.

    None as well for a user or session that no route takes: the route says what is wrong with it.
    """
    sent = request.headers.get("idempotency-key")
    if sent is None or request.method != "POST":
        return None
    if not _VISIBLE_ASCII.fullmatch(sent):
        raise ValidationFailed.at("header", "idempotency-key", msg="A key has 1 to 255 visible ASCII characters")
    try:
        user = _USER_ID.validate_python(user_id, strict=True)
        if session_id is not None:
            _SESSION_ID.validate_python(session_id)
    except ValidationError:
        return None
    scope = f"{request.method} {request.scope['path']}"
    return idempotency.Key(user_id=user, scope=scope, idempotency_key=sent, body_hash=body_hash)


def replayed_answer(replayed: idempotency.Replayed) -> Response:
    """The stored answer, marked as such; with its ETag, where it is a session."""
    headers = {"idempotent-replayed": "true"}
    version = loads(replayed.answer).get("version")
    if version is not None:
        headers["etag"] = f'"{version}"'
    return Response(replayed.answer, headers=headers, media_type="application/json")


# For the description; what is wrong with a key is said before.
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="With the same body again, within a day: the same answer",
        json_schema_extra={"minLength": 1, "maxLength": 255},
    ),
]


async def _writer(request: Request, _key: IdempotencyKey = None) -> Writer:
    recorded: Writer | None = getattr(request.state, "writer", None)
    state: State = request.app.state.service
    return recorded or state.require_ready()


Writes = Annotated[Writer, Depends(_writer)]


def creating_errors(*expected: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """As `body_errors`, with what may be said about the key."""
    return body_errors(*expected, *IDEMPOTENCY_ERRORS)
