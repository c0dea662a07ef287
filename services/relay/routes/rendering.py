"""Errors as the relay's clients expect them: Claude's shape, and on the seed's paths three bodies of their own.

Its one invariant: every error answer of the relay is made here.
"""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from services.relay.errors import NoAccount, UpstreamForbidden, UpstreamRateLimited, claude_body, claude_status
from shared.door import answer
from shared.errors import ServiceError, Unavailable

KIRO_PREFIX: Final = "/claude-kiro-oauth"
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
    headers = error.headers()
    request_id = request_id_of(scope)
    headers["request-id"] = request_id
    if KIRO_PREFIX in scope["path"]:
        for kind, (status, code, message) in _KIRO.items():
            if isinstance(error, kind):
                body = {"type": "error", "error": {"type": code, "message": message}}
                return answer(body, status=status, headers=headers)
    return answer(claude_body(error, request_id), status=claude_status(error), headers=headers)


def request_id_of(scope: Scope) -> str:
    """The id that the door has given the request."""
    return str(scope["state"]["request_id"])


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101 - registered for this class
    return render(error, request.scope)
