"""The ways to the accounts' upstreams: one HTTP client for each proxy that is used, and one without.

Its one invariant: an account's calls leave through its own proxy, or not at all.
"""

import asyncio
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx
import structlog

from services.relay.accounts import Account
from services.relay.sealing import Sealer, Unsealable
from services.relay.settings import RelaySettings
from services.relay.upstream import Upstream
from services.relay.upstream.anthropic import AnthropicUpstream, Timeouts
from services.relay.upstream.client import Client, create_client
from services.relay.upstream.demo import DemoUpstream

log = structlog.get_logger(__name__)

PROXY_SCHEMES = ("http", "https", "socks5")
_HIDDEN = "***"
_LONGEST = 255  # the most that SOCKS5 has room for


class Ways:
    """Makes them; close it at the end."""

    def __init__(self, settings: RelaySettings, sealer: Sealer) -> None:
        self._settings = settings
        self._sealer = sealer
        self._clients: dict[str, Client] = {}

    def connect(self, account: Account) -> Upstream | None:
        """The way to this account's upstream; None when its secrets cannot be opened."""
        settings = self._settings
        if account.provider == "demo":
            return DemoUpstream(delay_seconds=settings.relay_demo_delay_ms / 1000)
        try:
            secrets = self._sealer.secrets_of(account)
            return AnthropicUpstream(
                self._client(secrets.get("proxy_url", "")),
                base_url=account.base_url,
                api_key=secrets.get("api_key", ""),
                timeouts=Timeouts(
                    connect_seconds=settings.relay_connect_timeout_seconds,
                    silence_seconds=settings.relay_stream_silence_seconds,
                    plain_seconds=settings.relay_plain_timeout_seconds,
                ),
            )
        except (Unsealable, ValueError, httpx.InvalidURL) as problem:
            log.error("account_unusable", account=account.id, reason=str(problem))  # noqa: TRY400 - one line says it
            return None

    def _client(self, proxy_url: str) -> Client:
        client = self._clients.get(proxy_url)
        if client is None:
            client = self._clients[proxy_url] = create_client(proxy_url or None)
        return client

    async def close(self) -> None:
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))


def check_proxy(url: str) -> None:
    """Raises ValueError, without the URL in it, for one that is no proxy's."""
    try:
        parts = urlsplit(url)
        port_needed = parts.scheme == "socks5"
        is_whole = parts.scheme in PROXY_SCHEMES and is_host(parts.hostname) and bool(httpx.URL(url).host)
        is_whole = is_whole and (parts.port != 0 if parts.port is not None else not port_needed)
    except (ValueError, httpx.InvalidURL):
        is_whole = False
    if not is_whole or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(
            "must be http:// or https:// with a host, and a port where it is not the usual one; or socks5:// with both"
        )
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if not all(each.isascii() and each.isprintable() and len(each) <= _LONGEST for each in (user, password)):
        raise ValueError(f"user and password must be printable ASCII, at most {_LONGEST} characters each")
    if ":" in user:
        raise ValueError("the user must not hold a colon")


def is_host(name: str | None) -> bool:
    """Whether it can be looked up at all: a name whose labels are neither empty nor too long, or an address."""
    try:
        return bool(name and name.encode("idna"))
    except UnicodeError:
        return False


def shown_proxy(url: str) -> str:
    """The proxy's URL without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    name, _, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{name.partition(':')[0]}:{_HIDDEN}@{place}"))
