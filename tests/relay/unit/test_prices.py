"""Prices: what the price library says of Claude's usage, for whatever usage and model an upstream tells of."""

import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import genai_prices
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from services.relay import spending
from services.relay.key_limits import Used
from services.relay.prices import all_tokens, cost_usd
from services.relay.request import ClaudeRequest
from shared import wire
from shared.values import MAX_COST_USD

MODEL = "claude-sonnet-4-5"
MODELS = (MODEL, "claude-sonnet-4-5-20250929", "claude-haiku-4-5", "claude-opus-4-1", "gpt-4o", "o1-pro")
CLASSES = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
MOST = 2**31 - 1


def priced(model: str, **counts: int) -> Decimal:
    """What the library says, of counts in its own words."""
    return genai_prices.calc_price(genai_prices.Usage(**counts), model_ref=model).total_price


def told(cost: Decimal) -> Decimal:
    return round(cost, 6)


@pytest.mark.parametrize("model", MODELS[:-1])
def test_each_class_has_its_own_price(model: str) -> None:
    """Claude counts what it reads from its cache and writes there beside `input_tokens`, the library among them."""
    assert cost_usd(model, {"input_tokens": 1000}) == told(priced(model, input_tokens=1000)) > 0
    assert cost_usd(model, {"output_tokens": 1000}) == told(priced(model, output_tokens=1000)) > 0
    read = {"input_tokens": 10, "output_tokens": 20, "cache_read_input_tokens": 1000}
    assert cost_usd(model, read) == told(priced(model, input_tokens=1010, output_tokens=20, cache_read_tokens=1000))
    written = {"input_tokens": 10, "cache_creation_input_tokens": 1000}
    assert cost_usd(model, written) == told(priced(model, input_tokens=1010, cache_write_tokens=1000))
    of_an_hour = written | {"cache_creation": {"ephemeral_5m_input_tokens": 400, "ephemeral_1h_input_tokens": 600}}
    counts = {"input_tokens": 1010, "cache_write_tokens": 1000, "cache_write_1h_tokens": 600}
    assert cost_usd(model, of_an_hour) == told(priced(model, **counts))


def test_the_classes_differ() -> None:
    """As Claude's prices do: read < input < written for five minutes < written for an hour < output."""
    hour = {"cache_creation_input_tokens": 10**6, "cache_creation": {"ephemeral_1h_input_tokens": 10**6}}
    usages: list[dict[str, Any]] = [
        {"cache_read_input_tokens": 10**6},
        {"input_tokens": 10**6},
        {"cache_creation_input_tokens": 10**6},
        hour,
        {"output_tokens": 10**6},
    ]
    costs = [cost_usd("claude-haiku-4-5", usage) for usage in usages]
    assert costs == sorted(costs)
    assert len(set(costs)) == 5
    assert cost_usd("claude-haiku-4-5", {"input_tokens": 10**6}) == 1


def test_nothing_used_costs_nothing() -> None:
    assert cost_usd(MODEL, {}) == cost_usd(MODEL, dict.fromkeys(CLASSES, 0)) == 0


@pytest.mark.parametrize("odd", [None, -5, True, 1.5, "7", [], {}, float("nan")])
def test_counts_that_are_none_cost_nothing(odd: Any) -> None:
    usage = dict.fromkeys(CLASSES, odd) | {"cache_creation": {"ephemeral_1h_input_tokens": odd}}
    assert cost_usd(MODEL, usage) == 0
    assert all_tokens(usage) == 0
    sound = {"input_tokens": 1000, "cache_creation_input_tokens": 10, "cache_creation": odd}
    assert cost_usd(MODEL, sound) == cost_usd(MODEL, {**sound, "cache_creation": None}) > 0


def test_more_hours_than_were_written_count_as_written() -> None:
    usage = {"cache_creation_input_tokens": 100, "cache_creation": {"ephemeral_1h_input_tokens": 10**6}}
    cost = priced(MODEL, input_tokens=100, cache_write_tokens=100, cache_write_1h_tokens=100)
    assert cost_usd(MODEL, usage) == told(cost)


def test_tokens_of_all_classes() -> None:
    usage = {
        "input_tokens": 1,
        "output_tokens": 20,
        "cache_read_input_tokens": 300,
        "cache_creation_input_tokens": 4000,
    }
    more = {"server_tool_use": {"web_search_requests": 5}, "cache_creation": {"ephemeral_1h_input_tokens": 9}}
    assert all_tokens(usage | more) == 4321
    assert all_tokens({}) == 0


# ── whatever comes ──────────────────────────────────────────────────────────────────────────────

counts = st.integers(-10, MOST) | st.none() | st.text(max_size=3) | st.booleans() | st.floats()
lifetimes = st.fixed_dictionaries({}, optional=dict.fromkeys(("ephemeral_1h_input_tokens", "other"), counts))
usages = st.fixed_dictionaries({}, optional={**dict.fromkeys(CLASSES, counts), "cache_creation": lifetimes | counts})


@given(st.sampled_from(MODELS) | st.text(max_size=40), usages)
@example("o1-pro", dict.fromkeys(CLASSES, MOST))
def test_a_cost_is_always_one_that_the_store_takes(model: str, usage: Mapping[str, Any]) -> None:
    cost = cost_usd(model, usage)
    assert 0 <= cost <= MAX_COST_USD
    assert cost == told(cost)
    received = {"lease_token": "", "status": "completed", "cost_usd": float(cost)}
    assert wire.CompleteTurn.model_validate(received).cost_usd == cost
    assert all_tokens(usage) >= 0


@given(st.fixed_dictionaries(dict.fromkeys(CLASSES, st.integers(0, 10**6))), st.sampled_from(CLASSES))
def test_more_tokens_never_cost_less(usage: dict[str, int], name: str) -> None:
    assert cost_usd(MODEL, usage | {name: usage[name] + 1000}) > cost_usd(MODEL, usage)


# ── unknown models ──────────────────────────────────────────────────────────────────────────────


def test_an_unknown_model_costs_nothing_and_is_named_once() -> None:
    model = f"unheard-of-{uuid.uuid4().hex}-" + "x" * 200
    with capture_logs() as logs:
        for _ in range(3):
            assert cost_usd(model, {"input_tokens": 10**6}) == 0
        assert cost_usd(MODEL, {"input_tokens": 10**6}) > 0
    assert logs == [{"event": "model_without_price", "model": model[:100], "log_level": "warning"}]


def test_the_demo_model_is_no_surprise() -> None:
    with capture_logs() as logs:
        assert cost_usd("demo", {"input_tokens": 10**6, "output_tokens": 10**6}) == 0
    assert logs == []


def test_made_up_names_do_not_fill_the_log() -> None:
    """A process names a thousand of them, those of other tests included."""
    with capture_logs() as logs:
        for number in range(1100):
            assert cost_usd(f"made-up-{number}", {"input_tokens": 1}) == 0
    assert 500 < len(logs) <= 1000
    assert logs[-1]["model"] != "made-up-1099"


# ── what a request may use, and has used ────────────────────────────────────────────────────────


def request(**fields: Any) -> ClaudeRequest:
    return ClaudeRequest({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields}, None)


@pytest.mark.parametrize(("max_tokens", "output"), [
    (1, 1), (1000, 1000), (4096, 4096), (4097, 4096), (10**9, 4096), (None, 4096), (0, 4096), (-1, 4096), ("9", 4096),
])  # fmt: skip
def test_what_is_expected_of_a_request(max_tokens: Any, output: int) -> None:
    expected = spending.expected(request(max_tokens=max_tokens))
    few = expected.tokens - output
    assert 1 <= few <= 20
    assert expected == Used(1, few + output, cost_usd(MODEL, {"input_tokens": few, "output_tokens": output}))


def test_a_longer_request_is_expected_to_use_more() -> None:
    long = request(messages=[{"role": "user", "content": "word " * 1000}], max_tokens=10)
    assert spending.expected(long).tokens > 1000
    assert spending.expected(long).cost > spending.expected(request(max_tokens=10)).cost


def test_what_a_turn_has_used() -> None:
    usage = dict.fromkeys(CLASSES, 5)
    whole = wire.CompleteTurn(lease_token="", status="completed", usage=usage, cost_usd=Decimal("0.25"))
    assert spending.of(whole) == Used(1, 20, Decimal("0.25"))
    assert spending.of(wire.CompleteTurn(lease_token="", status="failed")) == Used(1, 0, Decimal(0))
