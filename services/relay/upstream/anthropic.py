"""The Claude Messages protocol over HTTP: requests out, answers back byte for byte.

Its one invariant: nothing of one call reaches another (no cookies, no proxy from the environment, no
redirect followed), and the API key leaves only in the `x-api-key` header to `base_url`.
"""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import aiohttp
import httpx
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp_socks import ProxyConnectionError, ProxyConnector, ProxyError, ProxyTimeoutError
from httpx_aiohttp import AiohttpTransport

from services.relay.upstream import (
    MODELS_PATH,
    UpstreamAnswer,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRequest,
    UpstreamTimeout,
    UpstreamUnreachable,
    encode_body,
)
from shared import __version__
from shared.http_client import SLICE_BYTES, in_slices

DEFAULT_VERSION = "2023-06-01"
KEEPALIVE_SECONDS = 30.0
UNSENT_SECONDS = 120.0

_USER_AGENT = f"session-relay/{__version__}"
_READ_BUFFER_BYTES = 16 * 2**10

_MODELS_AT_ONCE = 1000
_MODELS_BYTES = 2**20
_SPENT = httpx.Request("POST", "http://spent.invalid")

# What the transport lets through besides its own mapping: the HTTP parser's errors and bare socket errors.
_PROXY_FAULTS = (ProxyError, ProxyConnectionError, ProxyTimeoutError)
_FAULTS = (httpx.HTTPError, aiohttp.ClientError, HttpProcessingError, OSError, UnicodeError, *_PROXY_FAULTS)
_NO_CONNECTION = (
    *(aiohttp.ClientConnectorError, aiohttp.InvalidURL, aiohttp.ClientHttpProxyError),
    *(ProxyError, ProxyConnectionError, UnicodeError),
)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """`silence_seconds` bounds the wait for a stream's head and between its bytes, `plain_seconds` the same
    for plain answers, which say nothing until they are done."""

    connect_seconds: float = 10.0
    silence_seconds: float = 120.0
    plain_seconds: float = 600.0


def create_client(proxy_url: str | None = None) -> httpx.AsyncClient:
    """The HTTP client that all accounts with this proxy, or with none, share. Close it with `aclose`.

    No limit on connections: how many calls run at once is decided before they get here.
    """
    tls = httpx.create_ssl_context()
    is_socks = proxy_url is not None and proxy_url.startswith("socks")

    def connector() -> aiohttp.BaseConnector:
        if proxy_url is not None and is_socks:
            return ProxyConnector.from_url(proxy_url, limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=tls, rdns=True)
        return aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=tls, socket_factory=_socket)

    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector(), cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=_READ_BUFFER_BYTES
        )

    proxy = None if proxy_url is None or is_socks else httpx.Proxy(proxy_url)
    return httpx.AsyncClient(
        transport=AiohttpTransport(verify=tls, client=session, proxy=proxy),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        headers={"user-agent": _USER_AGENT, "accept-encoding": "identity"},
        trust_env=False,
    )


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Closing a connection waits until what was written is sent: an upstream that takes no bytes must not
    keep it for ever, nor may one whose machine is gone."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNSENT_SECONDS * 1000))
    return made


class AnthropicUpstream:
    """One account at `base_url`, which ends before `/v1` and may have a path.

    Raises ValueError for a base URL or key that cannot work; the key is in no message.
    """

    def __init__(
        self, client: httpx.AsyncClient, *, base_url: str, api_key: str, timeouts: Timeouts | None = None
    ) -> None:
        self._client = client
        self._base_url = checked_base_url(base_url)
        self._api_key = api_key.strip()
        self._timeouts = timeouts or Timeouts()
        if not (self._api_key and self._api_key.isascii() and self._api_key.isprintable()):
            raise ValueError("the API key is empty or holds characters that no HTTP header may hold")

    def __repr__(self) -> str:
        return f"<AnthropicUpstream {self._base_url}>"

    async def open(self, request: UpstreamRequest) -> UpstreamAnswer:
        """Sends the request; returns once status and headers are there, whatever the status says.

        A redirect is an UpstreamProtocolError. ValueError or RecursionError: a query or a body that cannot be
        written. Cancelling ends the connection.
        """
        limits = self._timeouts
        read_seconds = limits.silence_seconds if request.stream else limits.plain_seconds
        return await self._send(self._http_request(request, read_seconds), read_seconds)

    async def models(self) -> list[dict[str, Any]]:
        """The first thousand models that it lists; an UpstreamProtocolError where it lists none."""
        headers = {"anthropic-version": DEFAULT_VERSION, "x-api-key": self._api_key}
        url = f"{self._base_url}{MODELS_PATH}?limit={_MODELS_AT_ONCE}"
        timeout = httpx.Timeout(self._timeouts.silence_seconds, connect=self._timeouts.connect_seconds)
        request = self._client.build_request("GET", url, headers=headers, timeout=timeout)
        async with await self._send(request, self._timeouts.silence_seconds) as answer:
            content = await answer.read(_MODELS_BYTES)
        try:
            listed = json.loads(content)["data"]
            return [each for each in listed if isinstance(each["id"], str)]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UpstreamProtocolError(f"no list of models (status {answer.status})") from None

    async def _send(self, request: httpx.Request, read_seconds: float) -> UpstreamAnswer:
        failure: UpstreamError | None = None
        try:
            async with asyncio.timeout(self._timeouts.connect_seconds + read_seconds):  # uploading included
                response = await self._client.send(request, stream=True, follow_redirects=False)
        except _FAULTS as fault:
            failure = _failure(fault, nothing_received=True)
        if failure is not None:  # raised out here, so that no chain leads to the request and its key
            raise failure
        response.request = _SPENT  # an answer may run for minutes: its request's body and key can go
        if 300 <= response.status_code < 400:
            await _close(response)
            raise UpstreamProtocolError(f"upstream answered with a redirect ({response.status_code})")
        return UpstreamAnswer(response.status_code, _headers(response), _chunks(response), partial(_close, response))

    def _http_request(self, request: UpstreamRequest, read_seconds: float) -> httpx.Request:
        url = self._base_url + request.path + (f"?{request.query}" if request.query else "")
        body = encode_body(request.body)
        headers = {"anthropic-version": DEFAULT_VERSION}
        for name, value in request.headers.items():
            if name.lower().startswith("anthropic-"):
                headers[name.lower()] = value.encode("ascii", "replace").decode()
        headers |= {
            "x-api-key": self._api_key,
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        connect_seconds = self._timeouts.connect_seconds
        timeout = httpx.Timeout(connect=connect_seconds, pool=connect_seconds, read=read_seconds, write=None)
        content = body if len(body) <= SLICE_BYTES else in_slices(body)
        try:
            return self._client.build_request("POST", url, content=content, headers=headers, timeout=timeout)
        except httpx.InvalidURL:
            raise ValueError("a query string that no URL can hold") from None


def checked_base_url(base_url: str) -> str:
    """The URL without a slash at its end; raises ValueError, which does not repeat it."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        raise ValueError("base_url is not a URL") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("base_url must begin with http:// or https:// and a host")
    if url.userinfo or url.query or url.fragment:
        raise ValueError("base_url must not hold a user, a query or a fragment")
    return str(url).rstrip("/")


def _headers(response: httpx.Response) -> httpx.Headers:
    """Upstream's headers, without what no longer holds when it compressed although asked not to."""
    headers = response.headers.copy()
    if headers.get("content-encoding", "identity") != "identity":
        del headers["content-encoding"]
        headers.pop("content-length", None)
    return headers


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    failure: UpstreamError | None = None
    try:
        async for chunk in response.aiter_bytes():
            yield chunk
    except _FAULTS as fault:
        failure = _failure(fault, nothing_received=False)
    if failure is not None:
        raise failure


async def _close(response: httpx.Response) -> None:
    with suppress(*_FAULTS):
        await response.aclose()


def _failure(fault: BaseException, *, nothing_received: bool) -> UpstreamError:
    """The error by its cause under the transport's mapping, which calls a lost connection a timeout."""
    cause = fault if isinstance(fault, (TimeoutError, *_PROXY_FAULTS)) else fault.__cause__ or fault
    reason = type(cause).__name__
    if isinstance(cause, TimeoutError | ProxyTimeoutError):
        return UpstreamTimeout(f"upstream took too long ({reason})", nothing_received=nothing_received)
    if isinstance(cause, _NO_CONNECTION):
        return UpstreamUnreachable(f"no connection to upstream ({reason})", nothing_received=True)
    return UpstreamProtocolError(f"upstream broke off ({reason})", nothing_received=nothing_received)
