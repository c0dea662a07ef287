"""What an upstream's answer says about the account that it was asked with.

Its one invariant: a refusal of the client's own request never counts against the account.

Upstream's rate limits: `retry-after` in seconds, else the `anthropic-ratelimit-*-reset` header (RFC 3339) of a limit
that has nothing left (Anthropic's documentation of rate limits and of error types).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from services.relay.accounts import Reason

PASSED_STATUSES: Final = frozenset({400, 404, 413, 422})
"""Refusals that concern the client's request: passed on as they are, and the turn is `refused`."""
OPERATORS_STATUSES: Final = frozenset({401, 402, 403})
LONGEST_SECONDS: Final = 1800.0
_FORBIDDEN_SECONDS: Final = 1800.0
_RATE_LIMITED_SECONDS: Final = 60.0
_FIRST_FAILURE_SECONDS: Final = 0.5
_LONGEST_FAILURE_SECONDS: Final = 60.0
_WORDS_CHARACTERS: Final = 2000
_DISABLED: Final = re.compile(
    r"(organi[sz]ation|account|workspace|user)\b[^.]{0,80}?\b(disabled|deactivated|suspended|banned|terminated|blocked)"
    r"|\b(disabled|deactivated|suspended|banned|terminated|blocked)\b[^.]{0,40}?\b(organi[sz]ation|account|workspace)"
    r"|(账号|账户|帐号|帐户|组织).{0,20}?(禁用|停用|封禁|冻结)",
    re.IGNORECASE,
)
_RESET: Final = re.compile(r"anthropic-ratelimit-([a-z-]+)-reset")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the account is to rest and for how long; `seconds` None: until an administrator enables it.

    For `failing` the seconds are what upstream asked for, 0 where it asked for nothing.
    """

    reason: Reason
    seconds: float | None
    error: str


def of_answer(status: int, headers: Mapping[str, str], content: bytes) -> Verdict | None:
    """The verdict on an answer other than 200; None: it is the client's business."""
    told = f"upstream answered {status}"
    if status in PASSED_STATUSES:
        return None
    if status in OPERATORS_STATUSES:
        words = content[:_WORDS_CHARACTERS].decode("utf-8", "replace")
        if _DISABLED.search(words):
            return Verdict("disabled", None, f"{told}: the account is disabled")
        return Verdict("forbidden", _FORBIDDEN_SECONDS, told)
    asked = asked_seconds(headers)
    if status == 429:
        return Verdict("rate_limited", _RATE_LIMITED_SECONDS if asked is None else asked, told)
    return Verdict("failing", asked or 0.0, told)


def of_failure(what: str) -> Verdict:
    """The verdict on a call that broke."""
    return Verdict("failing", 0.0, what)


def failure_seconds(failures_in_row: int) -> float:
    """How long an account rests after so many failures without a success: 0.5 s, doubled each time, at most 60 s."""
    return min(_LONGEST_FAILURE_SECONDS, _FIRST_FAILURE_SECONDS * 2.0 ** min(failures_in_row - 1, 10))


def asked_seconds(headers: Mapping[str, str]) -> float | None:
    """How long upstream wants to be left alone, at most half an hour; None where it does not say."""
    seconds = _delay(headers.get("retry-after", ""))
    if seconds is None:
        seconds = _until_reset(headers)
    return None if seconds is None else min(max(seconds, 0.0), LONGEST_SECONDS)


def _delay(value: str) -> float | None:
    """retry-after: seconds, or an HTTP date (RFC 9110, 10.2.3)."""
    try:
        return float(value) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value) else _seconds_to(parsedate_to_datetime(value))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _until_reset(headers: Mapping[str, str]) -> float | None:
    """Until the last reset of those limits that have nothing left; of any limit where none says so."""
    spent: list[float] = []
    others: list[float] = []
    for name, value in headers.items():
        if (found := _RESET.fullmatch(name.lower())) is None:
            continue
        try:
            seconds = _seconds_to(datetime.fromisoformat(value))
        except ValueError:
            continue
        left = headers.get(f"anthropic-ratelimit-{found[1]}-remaining", "")
        (spent if left.strip() == "0" else others).append(seconds)
    return max(spent) if spent else min(others, default=None)


def _seconds_to(moment: datetime) -> float:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime.now(UTC)).total_seconds()
