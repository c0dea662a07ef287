"""Errors as the relay's clients expect them: Claude's shape; three bodies of their own on the kiro paths, and one for
all errors of the conversation APIs.

Its one invariant: every error answer of the relay is made here.
"""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from services.relay.errors import (
    NoAccount,
    UpstreamForbidden,
    UpstreamRateLimited,
    claude_body,
    claude_status,
    message_of,
)
from shared.door import answer
from shared.errors import ServiceError, Unavailable, ValidationFailed

KIRO_PREFIX: Final = "/claude-kiro-oauth"
CONVERSATION_PATHS: Final = (
    *("/api/conversations", "/api/v1/app-conversations", "/api/v1/sandboxes", "/api/v1/events"),
    *("/api/file/", "/api/vscode/"),
)
_SHAPE: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
        "request_id": {"type": "string"},
    },
    "required": ["type", "error", "request_id"],
}
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"description": "Refused; the message says why", "content": {"application/json": {"schema": _SHAPE}}},
    "5XX": {"description": "Not now, or our fault", "content": {"application/json": {"schema": _SHAPE}}},
}
"""What the description of every route says of errors."""
_CONVERSATION_SHAPE: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"detail": {}, "message": {"type": "string"}, "code": {"type": "string"}},
    "required": ["detail", "message", "code"],
}
CONVERSATION_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {**told, "content": {"application/json": {"schema": _CONVERSATION_SHAPE}}}
    for status, told in ERRORS.items()
}
_FORBIDDEN: Final = (403, "forbidden", "账号已被禁用")
_RATE_LIMIT: Final = (429, "rate_limit", "请求过于频繁")
_UNAVAILABLE: Final = (503, "service_unavailable", "服务暂不可用：没有可用的Kiro账号")
_KIRO: Final[dict[type[ServiceError], tuple[int, str, str]]] = {
    UpstreamForbidden: _FORBIDDEN,
    UpstreamRateLimited: _RATE_LIMIT,
    NoAccount: _UNAVAILABLE,
    Unavailable: _UNAVAILABLE,
}


def render(error: ServiceError, scope: Scope) -> Response:
    """The answer that tells this error to the client of this request."""
    if scope["path"].startswith(CONVERSATION_PATHS):
        return answer(_conversation_body(error), status=_conversation_status(error), headers=error.headers())
    headers = error.headers()
    request_id = request_id_of(scope)
    headers["request-id"] = request_id
    if KIRO_PREFIX in scope["path"]:
        for kind, (status, code, message) in _KIRO.items():
            if isinstance(error, kind):
                body = {"type": "error", "error": {"type": code, "message": message}}
                return answer(body, status=status, headers=headers)
    return answer(claude_body(error, request_id), status=claude_status(error), headers=headers)


def _conversation_status(error: ServiceError) -> int:
    if isinstance(error, ValidationFailed):
        return 422
    return 503 if error.status == 529 else error.status


def _conversation_body(error: ServiceError) -> dict[str, object]:
    """What front ends of the conversation APIs show is `message`; programs read `detail`."""
    return {"detail": error.detail, "message": message_of(error), "code": error.code}


def request_id_of(scope: Scope) -> str:
    """The id that the door has given the request."""
    return str(scope["state"]["request_id"])


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101 - registered for this class
    return render(error, request.scope)
