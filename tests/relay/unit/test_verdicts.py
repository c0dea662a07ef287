"""What upstream's answers say about an account, by themselves."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.relay.verdicts import (
    LONGEST_SECONDS,
    OPERATORS_STATUSES,
    PASSED_STATUSES,
    Verdict,
    asked_seconds,
    failure_seconds,
    of_answer,
    of_failure,
)

NOTHING = httpx.Headers()


def after(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def resets(**limits: tuple[object, str]) -> httpx.Headers:
    """Headers of limits by name: when they are reset, and what is left."""
    headers = httpx.Headers()
    for name, (moment, left) in limits.items():
        told = moment.isoformat() if isinstance(moment, datetime) else str(moment)
        headers[f"Anthropic-RateLimit-{name.replace('_', '-')}-Reset"] = told
        headers[f"anthropic-ratelimit-{name.replace('_', '-')}-remaining"] = left
    return headers


# ── by status ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_the_clients_refusals_say_nothing_of_the_account(status: int) -> None:
    """Whatever the body says, and whatever the headers wish."""
    assert status in PASSED_STATUSES
    assert of_answer(status, httpx.Headers({"retry-after": "9"}), b"This organization has been disabled.") is None


@pytest.mark.parametrize("status", [401, 402, 403])
def test_refusals_of_the_account(status: int) -> None:
    """Half an hour, whatever the headers wish; the error tells the status and nothing of upstream's words."""
    assert status in OPERATORS_STATUSES
    verdict = of_answer(status, httpx.Headers({"retry-after": "5"}), b'{"error": {"message": "secret words"}}')
    assert verdict == Verdict("forbidden", 1800.0, f"upstream answered {status}")


@pytest.mark.parametrize(
    "words",
    [
        "This organization has been disabled.",
        "this ORGANISATION is Disabled",
        "Your account has been suspended due to a violation of our policy",
        "The account is banned",
        "Workspace was terminated",
        "User account blocked",
        "This is a disabled account",
        "A deactivated organization may not call this",
        "您的账号已被禁用",
        "该账户已停用",
        "此组织已经被封禁，请联系管理员",
        "帐号被冻结",
        '{"type":"error","error":{"type":"permission_error","message":"This organization has been disabled."}}',
    ],
)
def test_words_that_mean_for_good(words: str) -> None:
    for status in (401, 402, 403):
        verdict = of_answer(status, NOTHING, words.encode())
        assert verdict is not None
        assert (verdict.reason, verdict.seconds) == ("disabled", None)
        assert str(status) in verdict.error
        assert words not in verdict.error


@pytest.mark.parametrize(
    "words",
    [
        "",
        "invalid x-api-key",
        "Your credit balance is too low",
        "Request not allowed",
        "Your account may not use this model. Streaming is disabled",
        "余额不足",
        "x" * 5000 + " organization has been disabled",
        "\xff\xfe",
    ],
)
def test_words_that_mean_for_a_while(words: str) -> None:
    verdict = of_answer(403, NOTHING, words.encode("latin-1", "replace"))
    assert verdict is not None
    assert (verdict.reason, verdict.seconds) == ("forbidden", 1800.0)


def test_a_body_that_is_no_text() -> None:
    verdict = of_answer(403, NOTHING, bytes(range(256)))
    assert verdict is not None
    assert verdict.reason == "forbidden"


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529, 408, 409, 418, 204, 301, 407])
def test_failures(status: int) -> None:
    """The rest is the pool's to find, unless upstream wishes for a time."""
    assert of_answer(status, NOTHING, b"") == Verdict("failing", 0.0, f"upstream answered {status}")
    wish = of_answer(status, httpx.Headers({"retry-after": "7"}), b"account disabled")
    assert wish == Verdict("failing", 7.0, f"upstream answered {status}")


def test_a_broken_call() -> None:
    assert of_failure("connect: refused") == Verdict("failing", 0.0, "connect: refused")


# ── how long ────────────────────────────────────────────────────────────────────────────────────


def test_a_limit_that_does_not_say_how_long() -> None:
    assert of_answer(429, NOTHING, b"") == Verdict("rate_limited", 60.0, "upstream answered 429")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0.0), ("1", 1.0), (" 17 ", 17.0), ("2.5", 2.5), ("1800", 1800.0), ("1801", 1800.0), ("9" * 400, 1800.0)],
)
def test_seconds(value: str, seconds: float) -> None:
    assert asked_seconds({"retry-after": value}) == seconds
    assert of_answer(429, {"retry-after": value}, b"") == Verdict("rate_limited", seconds, "upstream answered 429")


@pytest.mark.parametrize("value", ["", "soon", "-1", "-1.5", "1e3", "0x10", "1,5", "nan", "inf", "Wed, 99 Foo", "1 2"])
def test_values_that_say_nothing(value: str) -> None:
    assert asked_seconds({"retry-after": value}) is None
    verdict = of_answer(429, {"retry-after": value}, b"")
    assert verdict is not None
    assert verdict.seconds == 60.0


@pytest.mark.parametrize(("delta", "least", "most"), [(100, 97, 100), (-100, 0, 0), (99_999, 1800, 1800)])
def test_dates(delta: float, least: float, most: float) -> None:
    """An HTTP date; one that has passed means at once."""
    for value in (format_datetime(after(delta), usegmt=True), format_datetime(after(delta))):
        seconds = asked_seconds({"retry-after": value})
        assert seconds is not None
        assert least <= seconds <= most


def test_the_reset_of_a_limit_that_is_spent() -> None:
    """The last of those, because all of them must be whole; limits with something left do not count."""
    told = resets(requests=(after(100), "0"), input_tokens=(after(40), "0"), output_tokens=(after(900), "12"))
    seconds = asked_seconds(told)
    assert seconds is not None
    assert 97 < seconds <= 100


def test_the_first_reset_where_none_is_spent() -> None:
    seconds = asked_seconds(resets(requests=(after(100), "3"), tokens=(after(40), "")))
    assert seconds is not None
    assert 37 < seconds <= 40


@pytest.mark.parametrize("form", ["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S+00:00", "%Y-%m-%dT%H:%M:%S.%fZ"])
def test_forms_of_a_reset(form: str) -> None:
    seconds = asked_seconds(resets(requests=(after(100).strftime(form), "0")))
    assert seconds is not None
    assert 97 < seconds <= 100


@pytest.mark.parametrize("value", ["", "soon", "1735689600", "2025-13-01T00:00:00Z"])
def test_resets_that_say_nothing(value: str) -> None:
    assert asked_seconds(resets(requests=(value, "0"))) is None
    seconds = asked_seconds(resets(requests=(value, "0"), tokens=(after(40), "0")))
    assert seconds is not None
    assert 37 < seconds <= 40


def test_retry_after_wins_over_resets() -> None:
    told = resets(requests=(after(100), "0"))
    told["retry-after"] = "5"
    assert asked_seconds(told) == 5.0


def test_a_reset_is_half_an_hour_at_most_and_never_in_the_past() -> None:
    assert asked_seconds(resets(requests=(after(9999), "0"))) == LONGEST_SECONDS == 1800.0
    assert asked_seconds(resets(requests=(after(-9999), "0"))) == 0.0


def test_a_rest_grows_and_has_an_end() -> None:
    rests = [failure_seconds(number) for number in range(1, 12)]
    assert rests[:7] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert rests[7:] == [60.0] * 4
    assert failure_seconds(10**6) == 60.0


@given(
    st.integers(100, 599),
    st.dictionaries(
        st.sampled_from(
            ["retry-after", "anthropic-ratelimit-requests-reset", "anthropic-ratelimit-requests-remaining", "x"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40),
    ),
    st.binary(max_size=200),
)
def test_no_answer_is_too_odd(status: int, headers: dict[str, str], content: bytes) -> None:
    """Every answer has a verdict, none longer than half an hour."""
    verdict = of_answer(status, headers, content)
    assert (verdict is None) == (status in PASSED_STATUSES)
    if verdict is not None and verdict.seconds is not None:
        assert 0 <= verdict.seconds <= LONGEST_SECONDS
