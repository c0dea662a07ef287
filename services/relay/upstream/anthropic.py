"""The Claude Messages protocol over HTTP: requests out, answers back byte for byte.

Its one invariant: nothing of one call reaches another (no cookies, no proxy from the environment, no
redirect followed), and the API key leaves only in the `x-api-key` header to `base_url`.
"""

import asyncio
import json
import string
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx
from aiohttp_socks import ProxyConnectionError, ProxyError, ProxyTimeoutError
from yarl import URL

from services.relay.upstream import (
    MODELS_PATH,
    QUERY_LIMIT_CHARACTERS,
    UpstreamAnswer,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRequest,
    UpstreamTimeout,
    UpstreamUnreachable,
    encode_body,
)
from services.relay.upstream.client import Client
from shared.http_client import FAULTS

DEFAULT_VERSION = "2023-06-01"

_MODELS_AT_ONCE = 1000
_MODELS_BYTES = 2**20
_IN_QUERIES = "".join(sorted({*string.ascii_letters, *string.digits, *string.punctuation} - set('"#<>')))

_PROXY_FAULTS = (ProxyError, ProxyConnectionError, ProxyTimeoutError)
_FAULTS = (*FAULTS, UnicodeError, *_PROXY_FAULTS)
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


class AnthropicUpstream:
    """One account at `base_url`, which ends before `/v1` and may have a path.

    Raises ValueError for a base URL or key that cannot work; the key is in no message.
    """

    def __init__(self, client: Client, *, base_url: str, api_key: str, timeouts: Timeouts | None = None) -> None:
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
        url = self._url(request.path, request.query)
        return await self._send("POST", url, request.headers, encode_body(request.body), read_seconds=read_seconds)

    async def models(self) -> list[dict[str, Any]]:
        """The first thousand models that it lists; an UpstreamProtocolError where it lists none."""
        url, read_seconds = self._url(MODELS_PATH, f"limit={_MODELS_AT_ONCE}"), self._timeouts.silence_seconds
        async with await self._send("GET", url, {}, read_seconds=read_seconds) as answer:
            content = await answer.read(_MODELS_BYTES)
        try:
            listed = json.loads(content)["data"]
            return [each for each in listed if isinstance(each["id"], str)]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UpstreamProtocolError(f"no list of models (status {answer.status})") from None

    def _url(self, path: str, query: str) -> URL:
        """Path and query as they are, but for what no query can hold."""
        if len(query) > QUERY_LIMIT_CHARACTERS or any(character < " " for character in query):
            raise ValueError("a query string that no URL can hold")
        return URL(f"{self._base_url}{path}" + (f"?{quote(query, safe=_IN_QUERIES)}" if query else ""), encoded=True)

    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str], body: bytes | None = None, *, read_seconds: float
    ) -> UpstreamAnswer:
        connect_seconds = self._timeouts.connect_seconds
        timeout = aiohttp.ClientTimeout(connect=connect_seconds, sock_connect=connect_seconds, sock_read=read_seconds)
        failure: UpstreamError | None = None
        try:
            async with asyncio.timeout(connect_seconds + read_seconds):  # uploading included
                response = await self._client.request(
                    method, url, headers=self._headers(headers, body), timeout=timeout, body=body
                )
        except _FAULTS as fault:
            failure = _failure(fault, nothing_received=True)
        if failure is not None:  # raised out here, so that no chain leads to the request and its key
            raise failure
        answer = _Answer(response)
        if 300 <= response.status < 400:
            await answer.aclose()
            raise UpstreamProtocolError(f"upstream answered with a redirect ({response.status})")
        return answer

    def _headers(self, headers: Mapping[str, str], body: bytes | None) -> dict[str, str]:
        sent = {"anthropic-version": DEFAULT_VERSION}
        for name, value in headers.items():
            if name.lower().startswith("anthropic-"):
                sent[name.lower()] = value.encode("ascii", "replace").decode()
        sent["x-api-key"] = self._api_key
        if body is not None:
            sent |= {"content-type": "application/json", "content-length": str(len(body))}
        return sent


class _Answer(UpstreamAnswer):
    """An answer that comes over HTTP."""

    __slots__ = ("_response",)

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        super().__init__(response.status, _headers(response))
        self._response = response

    async def chunk(self) -> bytes:
        failure: UpstreamError | None = None
        try:
            return await self._response.content.readany()
        except _FAULTS as fault:
            failure = _failure(fault, nothing_received=False)
        raise failure

    async def aclose(self) -> None:
        with suppress(*_FAULTS):
            self._response.release()  # whole, the connection is kept; else it ends


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


def _headers(response: aiohttp.ClientResponse) -> dict[str, str]:
    """Upstream's headers, without what no longer holds when it compressed although asked not to."""
    headers: dict[str, str] = {}
    for name, value in response.headers.items():
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if headers.get("content-encoding", "identity") != "identity":
        del headers["content-encoding"]
        headers.pop("content-length", None)
    return headers


def _failure(fault: BaseException, *, nothing_received: bool) -> UpstreamError:
    reason = type(fault).__name__
    if isinstance(fault, TimeoutError | ProxyTimeoutError):
        return UpstreamTimeout(f"upstream took too long ({reason})", nothing_received=nothing_received)
    if isinstance(fault, _NO_CONNECTION):
        return UpstreamUnreachable(f"no connection to upstream ({reason})", nothing_received=True)
    return UpstreamProtocolError(f"upstream broke off ({reason})", nothing_received=nothing_received)
