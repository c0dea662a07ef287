"""The HTTP client that accounts are called with: aiohttp's, straight or through a proxy.

Its one invariant: nothing of one call reaches another (no cookies, no proxy from the environment), and a proxy's
credentials reach the proxy only in the header that it reads.
"""

import socket
import sys
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import httpx
from aiohttp_socks import ProxyConnector
from yarl import URL

from shared import __version__
from shared.http_client import SLICE_BYTES, in_slices

KEEPALIVE_SECONDS: Final = 30.0
UNSENT_SECONDS: Final = 120.0

_USER_AGENT: Final = f"session-relay/{__version__}"
_READ_BUFFER_BYTES: Final = 16 * 2**10


@dataclass(frozen=True, slots=True)
class Client:
    """The HTTP client that all accounts with this proxy, or with none, share."""

    session: aiohttp.ClientSession
    proxy: URL | None = None
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    """The header that the proxy asks for."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self.session.close()

    async def request(
        self,
        method: str,
        url: URL,
        *,
        headers: dict[str, str],
        timeout: aiohttp.ClientTimeout,
        body: bytes | None = None,
    ) -> aiohttp.ClientResponse:
        """The answer once its head is there. An HTTP proxy reads its credentials in the request itself, or, where
        that is encrypted, in the one for the tunnel."""
        tunnel: dict[str, str] | None = None
        if self.credentials:
            if url.scheme == "https":
                tunnel = self.credentials
            else:
                headers = headers | self.credentials
        return await self.session.request(
            method,
            url,
            data=body if body is None or len(body) <= SLICE_BYTES else in_slices(body),
            headers=headers,
            timeout=timeout,
            allow_redirects=False,
            proxy=self.proxy,
            proxy_headers=tunnel,
        )


def create_client(proxy_url: str | None = None) -> Client:
    """Close it with `aclose`. Raises ValueError for a proxy's URL that cannot be used.

    No limit on connections: how many calls run at once is decided before they get here.
    """
    tls = httpx.create_ssl_context()
    connector: aiohttp.BaseConnector
    proxy: URL | None = None
    credentials = {}
    if proxy_url is not None and proxy_url.startswith("socks"):
        connector = ProxyConnector.from_url(proxy_url, limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=tls, rdns=True)
    else:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=tls, socket_factory=_socket)
        if proxy_url is not None:
            parts = urlsplit(proxy_url)
            proxy = URL(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
            if parts.username or parts.password:
                user, password = unquote(parts.username or ""), unquote(parts.password or "")
                credentials = {"Proxy-Authorization": aiohttp.encode_basic_auth(user, password)}
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=_READ_BUFFER_BYTES,
        headers={"user-agent": _USER_AGENT, "accept-encoding": "identity"},
    )
    return Client(session, proxy, credentials)


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Closing a connection waits until what was written is sent: an upstream that takes no bytes must not
    keep it for ever, nor may one whose machine is gone."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNSENT_SECONDS * 1000))
    return made
