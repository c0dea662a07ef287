"""What a request may use of its key's limits, and what it has used.

Its one invariant: both are counted the same way: tokens of all classes, and their price.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from services.relay import prices
from services.relay.key_limits import KeyLimits, Reservation, Used
from services.relay.keys import Key
from services.relay.request import ClaudeRequest
from services.relay.upstream.demo_model import input_tokens
from shared import wire

_MOST_EXPECTED_TOKENS: Final = 4096


@dataclass(slots=True)
class Bill:
    """What a request has reserved, until it is settled."""

    limits: KeyLimits
    reservation: Reservation | None

    async def settle(self, used: Used) -> None:
        """Puts what was used in place of what was reserved; a second time it does nothing."""
        reservation, self.reservation = self.reservation, None
        if reservation is not None:
            await self.limits.settle(reservation, used)


@asynccontextmanager
async def billed(limits: KeyLimits, key: Key, request: ClaudeRequest) -> AsyncIterator[Bill]:
    """Room within the key's limits for this request; raises KeyLimitReached. Not settled, it has used nothing."""
    wanted = expected(request) if key.is_limited else Used()
    bill = Bill(limits, await limits.reserve(key, wanted.tokens, wanted.cost))
    try:
        yield bill
    finally:
        await bill.settle(Used())


def expected(request: ClaudeRequest) -> Used:
    """About what the request may use. Of an answer's tokens so many at most: few answers use up their `max_tokens`."""
    asked = request.body.get("max_tokens")
    output = min(asked, _MOST_EXPECTED_TOKENS) if isinstance(asked, int) and asked > 0 else _MOST_EXPECTED_TOKENS
    usage = {"input_tokens": input_tokens(request.body), "output_tokens": output}
    return Used(1, prices.all_tokens(usage), prices.cost_usd(request.model, usage))


def of(completed: wire.CompleteTurn) -> Used:
    """What a turn has used."""
    return Used(1, prices.all_tokens(completed.usage or {}), completed.cost_usd or prices.NOTHING)
