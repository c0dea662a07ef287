"""What a call of upstream came to: an answer, a refusal that is the client's, or a failure that is upstream's.

Its one invariant: of a failure the client hears by a status of ours; upstream's own words about the operator's
account never reach it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from services.relay.answers import Answer
from services.relay.assembly import Assembly
from services.relay.errors import (
    RelayError,
    UpstreamFailed,
    UpstreamForbidden,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamTimedOut,
    UpstreamUnusable,
)
from services.relay.sse import EventTooLarge
from services.relay.upstream import AnswerTooLarge, UpstreamError, UpstreamProtocolError, UpstreamTimeout
from services.relay.verdicts import OPERATORS_STATUSES, PASSED_STATUSES
from shared.errors import ServiceError

_PASSED_HEADERS: Final = ("content-type", "request-id")
OPERATORS_ERRORS: Final = frozenset({"authentication_error", "permission_error", "billing_error"})
_STATUS_OF_TYPE: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_ID_CHARACTERS: Final = 200
_TYPE_CHARACTERS: Final = 100
_MESSAGE_CHARACTERS: Final = 1000


@dataclass(frozen=True, slots=True)
class Ended:
    """`content` is the rest of what the client gets: a whole body, or the last bytes of a stream.

    `error` is told to the client instead; a stream that has begun ends with it. `plain` is a whole JSON answer.
    """

    answer: Answer
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    error: ServiceError | None = None
    plain: bytes = b""


class ErrorEvent(UpstreamError):
    """Upstream said `event: error`; `is_passed` when its bytes went on to the client."""

    kind = "error_event"

    def __init__(self, data: dict[str, Any], *, is_passed: bool) -> None:
        super().__init__("upstream ended the stream with an error")
        self.data = data
        self.is_passed = is_passed

    @property
    def type(self) -> str:
        error = self.data.get("error")
        return str(error.get("type")) if isinstance(error, dict) else ""

    @property
    def status(self) -> int:
        return _STATUS_OF_TYPE.get(self.type, 500)

    @property
    def content(self) -> bytes:
        """As if it had been an answer's body."""
        return json.dumps(self.data).encode()


def passed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of upstream's headers that are for the client; odd ones no header of ours could hold are left out."""
    found = {name: headers.get(name, "") for name in _PASSED_HEADERS}
    return {name: value for name, value in found.items() if value and value.isascii() and value.isprintable()}


def source(status: int, headers: Mapping[str, str]) -> dict[str, Any]:
    """What a turn remembers of where its answer came from."""
    return {"status": status, "request_id": passed_headers(headers).get("request-id", "")[:_ID_CHARACTERS]}


def declined(status: int, headers: Mapping[str, str], content: bytes) -> Ended:
    """What becomes of an answer other than 200."""
    told = source(status, headers)
    if status in PASSED_STATUSES:
        answer = Answer("refused", upstream=told, error=_stored_error(content))
        return Ended(answer, status, passed_headers(headers), content)
    error: UpstreamFailed
    if status in OPERATORS_STATUSES:
        error = UpstreamForbidden()
    elif status == 429:
        error = UpstreamRateLimited()
    else:
        error = UpstreamOverloaded()
    return Ended(Answer("failed", upstream=told, error={"type": error.code, "status": status}), error=error)


def failed(failure: UpstreamError, partial: dict[str, Any] | None) -> Ended:
    """What becomes of a call that broke; `partial` is the part of the answer that the client has seen."""
    if isinstance(failure, ErrorEvent) and partial is None:
        return declined(failure.status, {"content-type": "application/json"}, failure.content)
    error: RelayError
    if isinstance(failure, AnswerTooLarge | EventTooLarge):
        error = UpstreamUnusable()
    elif isinstance(failure, UpstreamTimeout):
        error = UpstreamTimedOut()
    else:
        error = UpstreamOverloaded()
    kind = failure.type[:_TYPE_CHARACTERS] if isinstance(failure, ErrorEvent) else failure.kind
    told = {"type": kind, "message": str(failure)}
    answer = Answer("failed" if partial is None else "interrupted", message=partial, error=told)
    is_told = isinstance(failure, ErrorEvent) and failure.is_passed
    return Ended(answer, error=None if is_told else error)


def concluded(errors: Sequence[UpstreamFailed], retry_after_seconds: float | None) -> UpstreamFailed:
    """What all attempts together come to: one cause is told as itself; limits with refusals are limits."""
    kinds = {type(error) for error in errors}
    kind: type[UpstreamFailed] = UpstreamOverloaded
    if len(kinds) == 1 or UpstreamUnusable in kinds:
        kind = type(errors[-1])
    elif kinds == {UpstreamForbidden, UpstreamRateLimited}:
        kind = UpstreamRateLimited
    error = kind(retry_after_seconds=retry_after_seconds)
    error.attempts_used = True
    return error


def interrupted(assembly: Assembly, reason: str, error: ServiceError) -> Ended:
    """What becomes of a call that the relay gave up; `error` is for a client that is still there."""
    if assembly.finished:  # the answer was whole already, only the connection was not closed yet
        return Ended(Answer("completed", assembly.message()), error=error)
    return Ended(Answer("interrupted", assembly.partial() or None, error={"type": reason}), error=error)


def message_of(content: bytes) -> dict[str, Any]:
    """The message that a plain answer holds; raises UpstreamProtocolError when it holds none."""
    try:
        message = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise UpstreamProtocolError("the answer is not JSON") from None
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        raise UpstreamProtocolError("the answer is not a message")
    return message


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _stored_error(content: bytes) -> dict[str, Any]:
    """The refusal's type and text, as far as they are what Claude's errors are."""
    try:
        error = json.loads(content)["error"]
        return {"type": str(error["type"])[:_TYPE_CHARACTERS], "message": str(error["message"])[:_MESSAGE_CHARACTERS]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {"type": "invalid_request_error"}
