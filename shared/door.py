"""The outermost room of a service: every request passes in and every answer out through here.

Its one invariant: whatever happens inside, the client gets one whole answer with an X-Request-Id, and one log
line tells of it. Pure ASGI: what is built on BaseHTTPMiddleware leaks connections when streams are cut.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Final
from urllib.parse import unquote_to_bytes

import structlog
from prometheus_client import Histogram
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid7

from shared.errors import BodyTooLarge, BrokenOff, Internal, RequestTimeout, ServiceError, ValidationFailed
from shared.json import dumps

log = structlog.get_logger(__name__)

_SANE_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_GONE: Final = 499
"""nginx's status for it; no client ever sees it."""
_CLOSED: Final = "the handler is closed"
"""What uvloop says, with a bare RuntimeError, when something is written to a connection that was cut."""
_LINGER_SECONDS: Final = 3.0
_QUIET_ROUTES: Final = frozenset({"/health", "/health/live", "/health/ready", "/health/detailed", "/metrics"})


def answer(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer, written once, straight to bytes."""
    return Response(dumps(value), status_code=status, headers=headers, media_type="application/json")


def error_answer(error: ServiceError) -> Response:
    return answer(error.body(), status=error.status, headers=error.headers())


@dataclass(frozen=True, slots=True)
class BodyRules:
    """How much a request body may hold, and how long it may take to arrive."""

    max_bytes: int
    timeout_seconds: float
    unlimited_paths: frozenset[str] = frozenset()


class Door:
    """Gives each request its id, guards its body, measures and logs it, and catches what nobody else caught.

    `admit` raises a ServiceError for a request that must not come in. `render` makes the answer of an error, in
    the words of the service's protocol. While `is_leaving` each answer asks its client to connect anew, elsewhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        rules: BodyRules,
        duration: Histogram,
        admit: Callable[[Scope], None] = lambda scope: None,
        render: Callable[[ServiceError, Scope], ASGIApp] = lambda error, scope: error_answer(error),
        is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._rules = rules
        self._duration = duration
        self._admit = admit
        self._render = render
        self._is_leaving = is_leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the same, and the server leaves the body out (RFC 9110, 9.3.2)
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        body = _Body(receive, self._rules, unlimited=scope["path"] in self._rules.unlimited_paths)
        reply = _Reply(send, request_id, body, self._is_leaving)
        started_at = perf_counter()
        try:
            _require_utf8(scope)
            self._admit(scope)
            body.check_length(scope)
            await self._app(scope, body.receive, reply.send)
        except ServiceError as error:
            if not reply.started:
                await self._render(error, scope)(scope, receive, reply.send)
        except BrokenOff as broken:
            log.warning("answer_broken_off", reason=str(broken))
        except ClientDisconnect:
            pass  # there is nobody to answer; the log says CLIENT_GONE
        except Exception:
            log.exception("unhandled_error", method=scope["method"], path=scope["path"])
            if not reply.started:
                await self._render(Internal(), scope)(scope, receive, reply.send)
        finally:
            self._note(scope, reply.status, perf_counter() - started_at)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._duration.labels(route, method, str(status)).observe(seconds)
        write = log.debug if route in _QUIET_ROUTES and status < 400 else log.info
        write("request", method=method, route=route, status=status, duration_ms=round(seconds * 1000, 2))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _SANE_REQUEST_ID.fullmatch(text):
                return str(text)
    return str(uuid7())


def _require_utf8(scope: Scope) -> None:
    """Refuses a path or query whose bytes are no UTF-8: two of them must not become one id."""
    if not _is_utf8(scope.get("raw_path", b"")):
        raise ValidationFailed.at("path", msg="Not UTF-8")
    query: bytes = scope["query_string"]
    if not _is_utf8(query):
        names = [pair.partition(b"=")[0] for pair in query.split(b"&") if not _is_utf8(pair)]
        raise ValidationFailed.at("query", names[0].decode("ascii", "replace"), msg="Not UTF-8")


def _is_utf8(quoted: bytes) -> bool:
    if b"%" not in quoted and quoted.isascii():
        return True
    try:
        unquote_to_bytes(quoted).decode()
    except UnicodeDecodeError:
        return False
    return True


class _Body:
    """A request's body: its bytes are counted as they come, and there is a time when all of them must be here."""

    def __init__(self, receive: Receive, rules: BodyRules, *, unlimited: bool) -> None:
        self._receive = receive
        self._max_bytes = rules.max_bytes
        self._deadline = asyncio.get_running_loop().time() + rules.timeout_seconds
        self._unlimited = unlimited
        self._received_bytes = 0
        self._is_whole = False
        self.refused = False

    def check_length(self, scope: Scope) -> None:
        """Refuses a body that says by itself that it is too large."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes and not self._unlimited:
                raise self._too_large()

    async def receive(self) -> Message:
        if self._is_whole or self._unlimited:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refused = True
            raise RequestTimeout from None
        self._received_bytes += len(message.get("body", b""))
        if self._received_bytes > self._max_bytes:
            raise self._too_large()
        self._is_whole = not message.get("more_body", False)
        return message

    def _too_large(self) -> BodyTooLarge:
        self.refused = True
        limit = self._max_bytes
        return BodyTooLarge(f"A request body has at most {limit} bytes", max_bytes=limit)

    async def linger(self) -> None:
        """Reads on for a while and throws away: a client that still sends would lose the answer with the connection."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while (await self._receive()).get("more_body", False):
                    continue


class _Reply:
    """The answer on its way out; status 499 where the client left before there was one."""

    def __init__(self, send: Send, request_id: str, body: _Body, is_leaving: Callable[[], bool]) -> None:
        self._send = send
        self._request_id = request_id
        self._body = body
        self._is_leaving = is_leaving
        self.started = False
        self.status = CLIENT_GONE

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.setdefault("x-request-id", self._request_id)
            # What is left of a refused body must not be taken for a request.
            if self._body.refused or self._is_leaving():
                headers["connection"] = "close"
        elif self._body.refused and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._body.linger()
            message = {"type": "http.response.body", "body": b""}
        try:
            await self._send(message)
        except RuntimeError as error:
            if _CLOSED not in str(error):
                raise
            # The client has just left; to the server it will be so after this round of the loop.
            self.status = CLIENT_GONE
            await asyncio.sleep(0)


async def client_gone(_request: object, _error: Exception) -> Response:
    """What there is to answer a client that left in the middle of its request: nothing that it would read."""
    return Response(status_code=CLIENT_GONE)
