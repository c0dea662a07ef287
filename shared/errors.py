"""Every error that crosses the wire between the services; a class here is one `code` there.

    ServiceError
    ├── ValidationFailed 400            validation_error
    ├── Unauthorized 401                unauthorized
    ├── NotFound 404                    not_found
    │   ├── SessionNotFound             session_not_found
    │   ├── MessageNotFound             message_not_found
    │   ├── TurnNotFound                turn_not_found
    │   └── MemoryNotFound              memory_not_found
    ├── MethodNotAllowed 405            method_not_allowed
    ├── RequestTimeout 408              request_timeout
    ├── Conflict 409
    │   ├── SessionExists               session_exists
    │   ├── SessionNotActive            session_not_active
    │   ├── SessionArchived             session_archived
    │   ├── InvalidTransition           invalid_transition
    │   ├── MessageExists               message_exists
    │   ├── TurnExists                  turn_exists
    │   ├── TurnInProgress              turn_in_progress   (turn_id, Retry-After)
    │   ├── TurnClosed                  turn_closed
    │   ├── LeaseLost                   lease_lost
    │   └── IdempotencyInProgress       idempotency_in_progress  (Retry-After)
    ├── VersionMismatch 412             version_mismatch   (version)
    ├── BodyTooLarge 413                body_too_large
    ├── ContextTooSmall 422             context_too_small  (over_by_tokens)
    ├── IdempotencyKeyReused 422        idempotency_key_reused
    ├── Internal 500                    internal_error
    └── Unavailable 503                 unavailable        (Retry-After)
        ├── NotInitialized              not_initialized
        ├── DatabaseUnavailable         database_unavailable
        └── SessionServiceUnavailable   session_service_unavailable

Its one invariant: `decode(error.status, error.body())` gives the same class with the same data.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar


class ServiceError(Exception):
    """An answer other than success: `status`, a stable `code`, a `detail` for people, and named data."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    default_detail: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str | list[dict[str, Any]] | None = None,
        *,
        retry_after_seconds: float | None = None,
        **data: Any,
    ) -> None:
        self.detail = self.default_detail if detail is None else detail
        self.retry_after_seconds = retry_after_seconds
        self.data = data
        super().__init__(f"{self.code}: {self.detail}")

    def body(self) -> dict[str, Any]:
        return {"detail": self.detail, "code": self.code, **self.data}

    def headers(self) -> dict[str, str]:
        if self.retry_after_seconds is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after_seconds)))}


class BrokenOff(Exception):
    """An answer that has begun cannot be finished; its connection is cut, so that no one takes it for whole."""


class ValidationFailed(ServiceError):
    """Input that breaks a rule; `detail` is a list of `{type, loc, msg}` and never repeats the input."""

    status = 400
    code = "validation_error"
    default_detail = "Invalid input"

    @classmethod
    def at(cls, *loc: str | int, msg: str, type: str = "value_error") -> "ValidationFailed":  # noqa: A002
        return cls([{"type": type, "loc": list(loc), "msg": msg}])


class Unauthorized(ServiceError):
    status = 401
    code = "unauthorized"
    default_detail = "Missing or unknown bearer token"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class NotFound(ServiceError):
    status = 404
    code = "not_found"
    default_detail = "Not found"


class SessionNotFound(NotFound):
    code = "session_not_found"
    default_detail = "Session not found"


class MessageNotFound(NotFound):
    code = "message_not_found"
    default_detail = "Message not found"


class TurnNotFound(NotFound):
    code = "turn_not_found"
    default_detail = "Turn not found"


class MemoryNotFound(NotFound):
    code = "memory_not_found"
    default_detail = "Memory not found"


class MethodNotAllowed(ServiceError):
    status = 405
    code = "method_not_allowed"
    default_detail = "Method not allowed"


class RequestTimeout(ServiceError):
    status = 408
    code = "request_timeout"
    default_detail = "The request body did not arrive in time"


class Conflict(ServiceError):
    status = 409
    code = "conflict"
    default_detail = "Conflict"


class SessionExists(Conflict):
    code = "session_exists"
    default_detail = "Session already exists"


class SessionNotActive(Conflict):
    code = "session_not_active"
    default_detail = "Session is not active"


class SessionArchived(Conflict):
    code = "session_archived"
    default_detail = "Session is archived"


class InvalidTransition(Conflict):
    code = "invalid_transition"
    default_detail = "The session's status cannot change this way"


class MessageExists(Conflict):
    code = "message_exists"
    default_detail = "Another message has this message_id"


class TurnExists(Conflict):
    code = "turn_exists"
    default_detail = "Another turn of this session has this turn_id"


class TurnInProgress(Conflict):
    code = "turn_in_progress"
    default_detail = "Another turn of this session is open"


class TurnClosed(Conflict):
    code = "turn_closed"
    default_detail = "Turn is closed"


class LeaseLost(Conflict):
    code = "lease_lost"
    default_detail = "This lease no longer holds the turn"


class IdempotencyInProgress(Conflict):
    code = "idempotency_in_progress"
    default_detail = "The first request with this Idempotency-Key is still running"


class VersionMismatch(ServiceError):
    status = 412
    code = "version_mismatch"
    default_detail = "The session's version is not the one that If-Match names"


class BodyTooLarge(ServiceError):
    status = 413
    code = "body_too_large"
    default_detail = "Request body too large"


class ContextTooSmall(ServiceError):
    status = 422
    code = "context_too_small"
    default_detail = "The newest user message alone exceeds the context budget"


class IdempotencyKeyReused(ServiceError):
    status = 422
    code = "idempotency_key_reused"
    default_detail = "This Idempotency-Key came before with another body"


class Internal(ServiceError):
    """A fault of ours; what happened is in the log under the request id."""


class Unavailable(ServiceError):
    status = 503
    code = "unavailable"
    default_detail = "Service unavailable"

    def __init__(
        self,
        detail: str | list[dict[str, Any]] | None = None,
        *,
        retry_after_seconds: float | None = 1,
        **data: Any,
    ) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds, **data)


class NotInitialized(Unavailable):
    code = "not_initialized"
    default_detail = "Session service not initialized"


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"
    default_detail = "Database unavailable"


class SessionServiceUnavailable(Unavailable):
    """No instance of session_service could be reached, or none gave a whole answer."""

    code = "session_service_unavailable"
    default_detail = "Session service unavailable"


def _leaves(cls: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _leaves(below)


def by_code() -> dict[str, type[ServiceError]]:
    """Every class of the tree by its code; a service's own errors, which no other service knows, are not among them."""
    classes: list[type[ServiceError]] = [*_leaves(ServiceError), Internal]
    return {cls.code: cls for cls in classes if cls.__module__ == __name__}


_SECONDS = re.compile(r"[0-9]{1,9}")
_ARGUMENTS = frozenset({"self", "detail", "code", "retry_after_seconds"})


def decode(status: int, body: Any, retry_after: str | None = None) -> ServiceError:
    """The error that session_service raised, from its answer; an unknown one by its status class."""
    told = body if isinstance(body, dict) else {}
    detail, code = told.get("detail"), told.get("code")
    data = {name: value for name, value in told.items() if name not in _ARGUMENTS}
    wait = float(retry_after) if retry_after and _SECONDS.fullmatch(retry_after) else None
    cls = by_code().get(code) if isinstance(code, str) else None
    if cls is None:
        cls = Unavailable if status in {502, 503, 504} else Internal if status >= 500 else ServiceError
    if issubclass(cls, Unavailable):
        return cls(detail, retry_after_seconds=wait or 1, **data)
    return cls(detail, retry_after_seconds=wait, **data)
