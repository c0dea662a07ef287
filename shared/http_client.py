"""The HTTP client of everything here: aiohttp's connection pool, which survives cancelled streams.

Where a call is made for every turn it is aiohttp's own interface, elsewhere httpx' over the same pool. Its one
invariant: nothing of the machine's environment (proxies, netrc) finds its way into a call.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp
import httpx
from aiohttp.http_exceptions import HttpProcessingError
from httpx_aiohttp import AiohttpTransport
from yarl import URL

KEEP_ALIVE_SECONDS: Final = 30
"""Shorter than our servers keep an idle connection (75 s), so that none is closed under a request on its way."""

SLICE_BYTES: Final = 256 * 2**10

FAULTS: Final = (aiohttp.ClientError, HttpProcessingError, OSError)
"""The ways in which a call of aiohttp fails; timeouts are OSErrors."""


def http_client(
    *, read_seconds: float | None, connect_seconds: float, headers: Mapping[str, str] | None = None
) -> httpx.AsyncClient:
    """A client with any number of connections; `read_seconds` is the longest silence of an answer."""
    return httpx.AsyncClient(
        transport=_Transport(client=session),
        timeout=httpx.Timeout(read_seconds, connect=connect_seconds, pool=None),
        headers=dict(headers or {}),
        trust_env=False,
    )


def session() -> aiohttp.ClientSession:
    """Any number of connections, no cookies. Needs a running loop."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("accept-encoding", "user-agent"),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer to a call between our own parts; names in `headers` are looked up in any case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


async def exchange(
    over: aiohttp.ClientSession,
    method: str,
    url: URL,
    *,
    headers: dict[str, str],
    content: bytes,
    timeout: aiohttp.ClientTimeout,
) -> Answer:
    """The whole answer, whatever its status; raises one of FAULTS."""
    data: bytes | AsyncIterator[bytes] | None = content or None
    if len(content) > SLICE_BYTES:
        data, headers = in_slices(content), {**headers, "content-length": str(len(content))}
    async with over.request(
        method, url, headers=headers, data=data, timeout=timeout, allow_redirects=False
    ) as response:
        return Answer(response.status, response.headers, await response.read())


class _Transport(AiohttpTransport):
    """aiohttp's transport; what it has no httpx error for (an answer that is no HTTP, say) is a protocol error."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except aiohttp.ClientError as error:
            raise httpx.RemoteProtocolError(str(error), request=request) from error


async def in_slices(body: bytes) -> AsyncIterator[bytes]:
    """A large body in pieces, so that other calls go on while it is sent; goes with its content-length."""
    view = memoryview(body)
    for start in range(0, len(body), SLICE_BYTES):
        yield bytes(view[start : start + SLICE_BYTES])


def was_not_sent(error: Exception) -> bool:
    """Whether the request cannot have reached the other side: no connection was ever made for it."""
    return isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
