"""What the upstream adapters share: a request, an answer under way, and the ways in which a call fails.

Its one invariant: whatever goes wrong on the way to upstream and back is one of the errors below, and
none of them, in its text, its repr or its chain, holds an API key.

    UpstreamError                 kind
    ├── UpstreamUnreachable       connect      no connection: nothing was sent
    ├── UpstreamTimeout           timeout      no connection, or no bytes, for too long
    └── UpstreamProtocolError     protocol     closed early, not HTTP, a redirect
        ├── AnswerTooLarge        too_large
        ├── EventTooLarge         too_large    (sse.py)
        └── MalformedEvent        malformed    (assembly.py)
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from shared.json import dumps

MESSAGES_PATH = "/v1/messages"
MODELS_PATH = "/v1/models"
COUNT_TOKENS_PATH = "/v1/messages/count_tokens"
ANSWER_LIMIT_BYTES = 64 * 2**20
QUERY_LIMIT_CHARACTERS = 64_000
"""Longer query strings no URL is to hold."""


class UpstreamError(Exception):
    """Upstream gave no usable answer. `nothing_received` is true while no status line had come back."""

    kind: ClassVar[str] = "upstream"

    def __init__(self, message: str, *, nothing_received: bool = False) -> None:
        super().__init__(message)
        self.nothing_received = nothing_received


class UpstreamUnreachable(UpstreamError):
    """No connection could be made, so the request was not sent."""

    kind = "connect"


class UpstreamTimeout(UpstreamError):
    """Connecting, the answer's head, or the next bytes took too long."""

    kind = "timeout"


class UpstreamProtocolError(UpstreamError):
    """The connection ended early, or what came is not an answer that the protocol allows."""

    kind = "protocol"


class AnswerTooLarge(UpstreamProtocolError):
    """The answer is longer than the relay keeps."""

    kind = "too_large"


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One call: `body` is the whole Claude request, `query` the client's raw query string.

    Of `headers` the adapters send those whose name begins with `anthropic-`; nothing else of a client's
    goes upstream, so that a caller's key can never travel by accident.
    """

    path: str
    query: str
    headers: Mapping[str, str] = field(repr=False)
    body: dict[str, Any] = field(repr=False)

    @property
    def stream(self) -> bool:
        return self.body.get("stream") is True


class UpstreamAnswer(ABC):
    """An answer whose status and headers are there and whose body is still coming.

    Names in `headers` are in lower case. Whoever opened it closes it (`async with`, or `aclose`); closing one
    that is still running ends the connection at once, without reading the rest.
    """

    __slots__ = ("headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers

    def __repr__(self) -> str:
        return f"<UpstreamAnswer {self.status}>"

    @abstractmethod
    async def chunk(self) -> bytes:
        """The body's next bytes as they arrive, b"" at its end; raises UpstreamTimeout or UpstreamProtocolError."""

    @abstractmethod
    async def aclose(self) -> None:
        """Gives the connection back, or ends it when the body was not read to its end. Never raises."""

    async def read(self, limit_bytes: int = ANSWER_LIMIT_BYTES) -> bytes:
        """The whole body; raises AnswerTooLarge beyond `limit_bytes`, and what `chunk` raises."""
        parts: list[bytes] = []
        size_bytes = 0
        while chunk := await self.chunk():
            size_bytes += len(chunk)
            if size_bytes > limit_bytes:
                raise AnswerTooLarge(f"the answer is longer than {limit_bytes} bytes")
            parts.append(chunk)
        return b"".join(parts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Upstream(Protocol):
    """One account's way to a model."""

    async def open(self, request: UpstreamRequest) -> UpstreamAnswer:
        """Sends the request; returns once status and headers are there, whatever the status says.

        Raises UpstreamError. Cancelling it ends the connection.
        """
        ...

    async def models(self) -> list[dict[str, Any]]:
        """The models that it has, as it describes them, each with an `id`; raises UpstreamError."""
        ...


def encode_body(body: Any) -> bytes:
    """The JSON that goes upstream, equal in value to what the client sent, lone surrogates included.

    Raises RecursionError for bodies nested about a thousand levels deep.
    """
    try:
        return dumps(body)
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8, but it has an escape
        return json.dumps(body, separators=(",", ":")).encode("ascii")
