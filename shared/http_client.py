"""The HTTP client of everything here: httpx over aiohttp's connection pool, which survives cancelled streams.

Its one invariant: nothing of the machine's environment (proxies, netrc) finds its way into a call.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Final

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

KEEP_ALIVE_SECONDS: Final = 30
"""Shorter than our servers keep an idle connection (75 s), so that none is closed under a request on its way."""

SLICE_BYTES: Final = 256 * 2**10


def http_client(
    *, read_seconds: float | None, connect_seconds: float, headers: Mapping[str, str] | None = None
) -> httpx.AsyncClient:
    """A client with any number of connections; `read_seconds` is the longest silence of an answer."""
    return httpx.AsyncClient(
        transport=transport(),
        timeout=httpx.Timeout(read_seconds, connect=connect_seconds, pool=None),
        headers=dict(headers or {}),
        trust_env=False,
    )


def transport() -> httpx.AsyncBaseTransport:
    """Any number of connections."""

    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS))

    return _Transport(client=session)


async def exchange(over: httpx.AsyncBaseTransport, request: httpx.Request) -> httpx.Response:
    """The whole answer. For calls between our own parts, which know no cookies, redirects and logins.

    Looking for these is a third of what httpx' client does for a call.
    """
    response = await over.handle_async_request(request)
    try:
        await response.aread()
    finally:
        await response.aclose()
    return response


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
    return isinstance(error.__cause__, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
