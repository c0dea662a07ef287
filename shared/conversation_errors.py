"""What can go wrong for a client of conversations.

    ConversationError            status, detail, retry_after_seconds
    ├── Refused                  the call is wrong: any 4xx without a class of its own
    │   ├── Unauthorized         401, 403, close code 4001
    │   ├── NotFound             404, close code 4004
    │   ├── Conflict             409: it runs already, or it does not run
    │   └── FileTooLarge         413
    ├── Unsupported              the server's API has no such call
    ├── StartFailed              the start task ended in ERROR, with this detail
    ├── StartTimeout             not ready in time: last_status, task_id
    └── Unavailable              not reached, or it could not answer now: 429, 5xx, a connection lost

Its one invariant: an Unavailable call of a kind that changes something may have been carried out; any other failed
one was not.
"""

from collections.abc import Mapping
from typing import Any, Final

import httpx

from shared.json import loads


class ConversationError(Exception):
    """`status` is the HTTP status, None where none was answered; `detail` is for people."""

    def __init__(self, detail: str, *, status: int | None = None, retry_after_seconds: float = 0) -> None:
        super().__init__(f"{status}: {detail}" if status else detail)
        self.status = status
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


class Refused(ConversationError): ...


class Unauthorized(Refused): ...


class NotFound(Refused): ...


class Conflict(Refused): ...


class FileTooLarge(Refused): ...


class Unsupported(ConversationError): ...


class StartFailed(ConversationError): ...


class StartTimeout(ConversationError):
    """Its start may go on all the same: `task_id` leads to it, if it was begun."""

    def __init__(self, detail: str, *, last_status: str, task_id: str | None) -> None:
        super().__init__(detail)
        self.last_status = last_status
        self.task_id = task_id


class Unavailable(ConversationError): ...


_BY_STATUS: Final[Mapping[int, type[ConversationError]]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    413: FileTooLarge,
    408: Unavailable,
    429: Unavailable,
}


def from_status(status: int, detail: str, retry_after: str | None = None) -> ConversationError:
    """The error that this status stands for."""
    default = Unavailable if status >= 500 else Refused
    seconds = float(retry_after) if retry_after and retry_after.isdecimal() else 0
    return _BY_STATUS.get(status, default)(detail, status=status, retry_after_seconds=seconds)


def from_response(response: httpx.Response) -> ConversationError:
    """The error that this answer tells, in whatever of its fields."""
    return from_status(response.status_code, _detail(response), response.headers.get("retry-after"))


def _detail(response: httpx.Response) -> str:
    try:
        body: Any = loads(response.content)
    except ValueError:
        body = None
    told = body if isinstance(body, dict) else {}
    texts = (told.get(name) for name in ("message", "detail", "error"))
    return next((text for text in texts if isinstance(text, str) and text), response.reason_phrase or "No reason given")
