"""What a call of a model costs, by the price list of genai-prices.

Its one invariant: a model that the list does not know costs 0, and is named in the log once.
"""

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any, Final

import structlog
from genai_prices import Usage, calc_price

from services.relay.accounts import DEMO_MODEL

log = structlog.get_logger(__name__)

TOKEN_CLASSES: Final = (
    *("input_tokens", "output_tokens"),
    *("cache_creation_input_tokens", "cache_read_input_tokens"),
)
NOTHING: Final = Decimal(0)
_MOST: Final = Decimal("999999.999999")
_STEP: Final = Decimal("0.000001")
_NAMED_AT_MOST: Final = 1000
_unknown: set[str] = set()


def cost_usd(model: str, usage: Mapping[str, Any]) -> Decimal:
    """The price of a usage as Claude reports it, in US dollars with six decimals, at most what the store takes.

    Claude counts tokens read from and written to its prompt cache beside `input_tokens`; they have prices of their own.
    """
    read, written = _count(usage, "cache_read_input_tokens"), _count(usage, "cache_creation_input_tokens")
    by_lifetime = usage.get("cache_creation")
    for_an_hour = _count(by_lifetime, "ephemeral_1h_input_tokens") if isinstance(by_lifetime, Mapping) else 0
    counted = Usage(
        input_tokens=_count(usage, "input_tokens") + read + written,
        output_tokens=_count(usage, "output_tokens"),
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=min(for_an_hour, written),
    )
    try:
        price = calc_price(counted, model_ref=model).total_price
    except LookupError:
        if model != DEMO_MODEL and model not in _unknown and len(_unknown) < _NAMED_AT_MOST:
            _unknown.add(model)
            log.warning("model_without_price", model=model[:100])
        return NOTHING
    return min(price.quantize(_STEP, ROUND_HALF_EVEN), _MOST)


def all_tokens(usage: Mapping[str, Any]) -> int:
    """Tokens of all classes."""
    return sum(_count(usage, name) for name in TOKEN_CLASSES)


def _count(usage: Mapping[str, Any], name: str) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0
