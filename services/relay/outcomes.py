"""What a call of upstream came to: an answer, a refusal that is the client's, or a failure that is upstream's.

Its one invariant: of a failure the client hears by a status of ours; upstream's own words about the operator's
account never reach it.
"""

import json
from collections.abc import Mapping
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
from shared.errors import ServiceError

PASSED_STATUSES: Final = frozenset({400, 404, 413, 422})
"""Refusals that concern the client's request: passed on as they are, and the turn is `refused`."""
_PASSED_HEADERS: Final = ("content-type", "request-id")
_OPERATORS_STATUSES: Final = frozenset({401, 402, 403})
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
_RATE_LIMITED_SECONDS: Final = 60.0
_FORBIDDEN_SECONDS: Final = 30.0
_LONGEST_WAIT_SECONDS: Final = 1800
_ID_CHARACTERS: Final = 200
_TYPE_CHARACTERS: Final = 100
_MESSAGE_CHARACTERS: Final = 1000


@dataclass(frozen=True, slots=True)
class Ended:
    """`content` is the rest of what the client gets: a whole body, or the last bytes of a stream.

    `error` is told to the client instead; a stream that has begun ends with it.
    """

    answer: Answer
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    error: ServiceError | None = None


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
    wait = _retry_after_seconds(headers)
    error: UpstreamFailed
    if status in _OPERATORS_STATUSES:
        error = UpstreamForbidden(retry_after_seconds=_FORBIDDEN_SECONDS)
    elif status == 429:
        error = UpstreamRateLimited(retry_after_seconds=wait or _RATE_LIMITED_SECONDS)
    else:
        error = UpstreamOverloaded(retry_after_seconds=wait)
    return Ended(Answer("failed", upstream=told, error={"type": error.code, "status": status}), error=error)


def failed(failure: UpstreamError, partial: dict[str, Any] | None) -> Ended:
    """What becomes of a call that broke; `partial` is the part of the answer that the client has seen."""
    if isinstance(failure, ErrorEvent) and partial is None:
        return declined(failure.status, {"content-type": "application/json"}, json.dumps(failure.data).encode())
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


def _retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after", "")
    return min(int(value), _LONGEST_WAIT_SECONDS) if value.isdigit() else None
