"""uvicorn's HTTP protocol, with what it lacks: a deadline for the headers of each request, and a gentle end.

Its invariants: a connection that sends half a request's headers and no more is closed when the time is up. A server
that stops closes no connection that was open to requests a moment ago, except after an answer that says so. And
whoever offers another protocol (HTTP/2, as Java's client and curl may) is served in this one, body and all.
"""

import asyncio
from http import HTTPStatus
from typing import Any, Final

import httptools
from uuid_utils import uuid7
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shared.errors import RequestTimeout, ServiceError, ValidationFailed
from shared.json import dumps

_LAST_CALL_SECONDS: Final = 0.3
"""How long a connection must have been silent before a server that stops closes it: longer than a request travels."""
_REFUSAL: Final = (
    b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\nx-request-id: %s\r\n\r\n%s"
)
_TOO_LATE: Final = RequestTimeout("The request headers did not arrive in time")
_ELSEWHERE: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n"
    b"x-request-id: %s\r\n\r\n"
)


class Protocol(HttpToolsProtocol):
    """One connection; `header_timeout_seconds` is set by the subclass that the server uses."""

    header_timeout_seconds: float = 10

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._has_spoken = False
        self._is_in_headers = False
        self._is_last_call = False
        self._is_passed_over = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_spoken = self._is_in_headers = True
        self._is_passed_over = False
        # A pipelined request begins while another is being answered; that answer must not be cut.
        if not self.pipeline and not self._is_answering():
            self._start()

    def on_headers_complete(self) -> None:
        self._stop()
        self._is_in_headers = False
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self._is_passed_over = self._has_offer()
        if self._is_passed_over:
            return
        super().on_headers_complete()
        if self._is_last_call and self._is_answering():
            self.cycle.keep_alive = False

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # none before the first request
        return cycle is not None and not cycle.response_complete

    # ── the deadline ────────────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        self._stop()
        self._deadline = self.loop.call_later(self.header_timeout_seconds, self._close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        if self.transport.is_closing():
            return
        if self._has_spoken:
            self._refuse(_TOO_LATE)
        self.transport.close()

    def _refuse(self, error: ServiceError) -> None:
        body, status = dumps(error.body()), HTTPStatus(error.status)
        self.transport.write(_REFUSAL % (status, status.phrase.encode(), len(body), str(uuid7()).encode(), body))

    def send_400_response(self, msg: str) -> None:
        """What cannot be read as HTTP is refused as any other request would be."""
        self._refuse(ValidationFailed.at("request", msg=msg, type="http_invalid"))
        self.transport.close()

    # ── offers of another protocol ──────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        left = memoryview(data)
        try:
            while left:
                left = self._parse(left)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Not a valid HTTP request")

    def _parse(self, data: memoryview) -> memoryview:
        """Hands the bytes to the parser, which stops after the head of a request with an offer; what is left then."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            if self._is_passed_over:
                self.parser.feed_data(self._head_without_offer())
                return data[stopped.args[0] :]
            if self._should_upgrade():
                self.handle_websocket_upgrade()
        return data[:0]

    def _has_offer(self) -> bool:
        is_offer = self.parser.should_upgrade() and self.scope["method"] != "CONNECT"
        return is_offer and not self._should_upgrade()

    def _should_upgrade(self) -> bool:
        return self.scope["method"] == "GET" and super()._should_upgrade()

    def _head_without_offer(self) -> bytes:
        """The request's head, to be read once more as that of any other request, and its body with it."""
        version = self.parser.get_http_version().encode("ascii")
        first = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)
        headers = [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([first, *headers, b"", b""])

    def on_message_complete(self) -> None:
        if not self._is_passed_over:
            super().on_message_complete()

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def shutdown(self) -> None:
        """The server stops: the next answer to begin is the last one, and a silent connection is closed in a moment.

        uvicorn would close it at once, under a request on its way, and after an answer that did not say so.
        """
        self._is_last_call = True
        self.timeout_keep_alive = _LAST_CALL_SECONDS  # type: ignore[assignment]  # after an answer that has begun
        if not self._is_answering():
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(_LAST_CALL_SECONDS, self.timeout_keep_alive_handler)
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False

    def timeout_keep_alive_handler(self) -> None:
        if not self._is_in_headers:  # they have a deadline of their own
            super().timeout_keep_alive_handler()

    def handle_websocket_upgrade(self) -> None:
        if not self._is_last_call:
            super().handle_websocket_upgrade()
            return
        self.transport.write(_ELSEWHERE % str(uuid7()).encode())  # nobody would end it
        self.transport.close()


def protocol(header_timeout_seconds: float) -> type[Protocol]:
    """The protocol with this deadline."""
    return type("Protocol", (Protocol,), {"header_timeout_seconds": header_timeout_seconds})
