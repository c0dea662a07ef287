"""Accounts: the ways to a model, and which one a request takes.

Its one invariant: the demo account never stands in for a real one; it serves the model `demo`, and other models
only where there is no other account.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import httpx

from services.relay.errors import ModelNotServed, NoAccount
from services.relay.settings import RelaySettings
from services.relay.upstream import Upstream
from services.relay.upstream.anthropic import AnthropicUpstream, Timeouts
from services.relay.upstream.demo import DemoUpstream

DEMO_MODEL: Final = "demo"
_NO_ACCOUNT_SECONDS: Final = 30


@dataclass(frozen=True, slots=True)
class Account:
    id: str
    provider: Literal["anthropic", "demo"]
    upstream: Upstream


def from_settings(settings: RelaySettings, client: httpx.AsyncClient) -> list[Account]:
    """The account that the settings name; in development the demo account besides. Raises ValueError."""
    accounts = []
    if settings.relay_upstream_url:
        upstream = AnthropicUpstream(
            client,
            base_url=settings.relay_upstream_url,
            api_key=settings.relay_upstream_api_key.get_secret_value(),
            timeouts=Timeouts(
                connect_seconds=settings.relay_connect_timeout_seconds,
                silence_seconds=settings.relay_stream_silence_seconds,
                plain_seconds=settings.relay_plain_timeout_seconds,
            ),
        )
        accounts.append(Account("anthropic", "anthropic", upstream))
    if settings.is_development:
        demo = DemoUpstream(delay_seconds=settings.relay_demo_delay_ms / 1000)
        accounts.append(Account("demo", "demo", demo))
    return accounts


def choose(accounts: Sequence[Account], model: str) -> Account:
    """The account for a request of this model; raises NoAccount, or ModelNotServed when none takes the model."""
    if not accounts:
        raise NoAccount(retry_after_seconds=_NO_ACCOUNT_SECONDS)
    real = [account for account in accounts if account.provider != "demo"]
    demo = [account for account in accounts if account.provider == "demo"]
    eligible = demo or real if model == DEMO_MODEL else real or demo
    if not eligible:
        raise ModelNotServed
    return eligible[0]
