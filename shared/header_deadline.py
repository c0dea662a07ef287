"""A deadline for the headers of each request, which uvicorn does not have.

Its one invariant: a connection that sends half a request's headers and no more is closed when the time is up.
"""

import asyncio
from typing import Any, Final

from uuid_utils import uuid7
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_BODY: Final = b'{"detail":"The request headers did not arrive in time","code":"request_timeout"}'
_TOO_LATE: Final = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\nx-request-id: %s\r\n\r\n%s"
)


class DeadlineProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol; `header_timeout_seconds` is set by the subclass that the server uses."""

    header_timeout_seconds: float = 10

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._has_spoken = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_spoken = True
        # A pipelined request begins while another is being answered; that answer must not be cut.
        if not self.pipeline and not self._is_answering():
            self._start()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # none before the first request
        return cycle is not None and not cycle.response_complete

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
            self.transport.write(_TOO_LATE % (len(_BODY), str(uuid7()).encode(), _BODY))
        self.transport.close()


def deadline_protocol(header_timeout_seconds: float) -> type[DeadlineProtocol]:
    """The protocol with this deadline."""
    return type("Protocol", (DeadlineProtocol,), {"header_timeout_seconds": header_timeout_seconds})
