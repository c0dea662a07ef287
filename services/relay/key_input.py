"""What an administrator says of an API key, checked and made into columns; and a key as it is shown.

Its one invariant: names are camelCase outside and snake_case inside, and both lists are made here.
"""

import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.alias_generators import to_camel

from services.relay.errors import InvalidRequest
from services.relay.keys import Key, Permission
from shared import values

_MAX_BIGINT: Final = 2**53
_MAX_INTEGER: Final = 2**31 - 1
_MAX_COST: Final = Decimal("999999999999")
_COST_STEP: Final = Decimal("0.000001")
_NOT_IN_A_LINE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})


def _one_line(text: str) -> str:
    """Of any script, joined emoji and wide blanks included."""
    if not any(each.isprintable() and not each.isspace() for each in text):
        raise ValueError("must hold something visible")
    if any(unicodedata.category(each) in _NOT_IN_A_LINE for each in text):
        raise ValueError("must be one line without control characters")
    return text


def _moment(value: object) -> object:
    """A time as text, in UTC; what has no zone is UTC."""
    if not isinstance(value, str):
        raise ValueError("must be a time as text (RFC 3339)")  # noqa: TRY004 - pydantic wants this one
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be a time as text (RFC 3339)") from None


def _cost(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic wants this one
    cost = Decimal(str(value))
    if not cost.is_finite() or not 0 <= cost <= _MAX_COST:
        raise ValueError(f"must be a number from 0 to {_MAX_COST}")
    stored = cost.quantize(_COST_STEP)
    if cost and not stored:  # it would become 0, which is no limit at all
        raise ValueError(f"must be 0 or at least {_COST_STEP}")
    return stored


def _distinct(items: list[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _permissions(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """One message for all that is wrong, instead of one for each form that it could have."""
    try:
        checked: Literal["all"] | list[Permission] = check(value)
    except ValidationError:
        raise ValueError('must be "all" or a list of messages, chat, conversations') from None
    return checked if checked == "all" else _distinct(list(checked))


Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_one_line)]
Count = Annotated[int, Field(ge=0, le=_MAX_BIGINT)]
SmallCount = Annotated[int, Field(ge=0, le=_MAX_INTEGER)]
Cost = Annotated[Decimal, BeforeValidator(_cost)]
Word = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_one_line)]
Words = Annotated[list[Word], Field(max_length=100), AfterValidator(_distinct)]
Permissions = Annotated[Literal["all"] | list[Permission], WrapValidator(_permissions)]
Moment = Annotated[AwareDatetime, BeforeValidator(_moment)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True, alias_generator=to_camel)

    description: Annotated[str, Field(max_length=500)] | None = None
    user_id: values.UserId | None = None
    collect_session: bool | None = None
    token_limit: Count | None = None
    concurrency_limit: SmallCount | None = None
    rate_limit_window: SmallCount | None = None
    rate_limit_requests: SmallCount | None = None
    daily_cost_limit: Cost | None = None
    total_cost_limit: Cost | None = None
    permissions: Permissions | None = None
    allowed_models: Words | None = None
    expires_at: Moment | None = None
    is_active: bool | None = None
    tags: Words | None = None


class NewKey(_Fields):
    """Limits of 0 or null are none."""

    name: Name


class KeyChange(_Fields):
    """What is absent stays; null takes a limit, a list, the description or `expiresAt` away."""

    name: Name | None = None


class CollectSession(BaseModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True, alias_generator=to_camel)

    collect_session: bool


_LIMITS: Final = (
    *("token_limit", "concurrency_limit", "rate_limit_window"),
    *("rate_limit_requests", "daily_cost_limit", "total_cost_limit"),
)
_EMPTY: Final[dict[str, Any]] = {
    "description": "",
    "collect_session": False,
    "permissions": "all",
    "allowed_models": [],
    "tags": [],
}
_SHOWN: Final = (
    *("id", "name", "description", "user_id", "prefix", "collect_session", *_LIMITS),
    *("permissions", "allowed_models", "expires_at", "is_active", "tags", "created_at", "updated_at", "deleted_at"),
)


def columns_of(wanted: NewKey | KeyChange, key: Key | None, *, default_user_id: str) -> dict[str, Any]:
    """The columns that are given, as they are stored; raises InvalidRequest for what does not go together."""
    given: dict[str, Any] = {name: getattr(wanted, name) for name in wanted.model_fields_set}
    if key is None and given.get("is_active", False) is None:
        given["is_active"] = True
    for name in ("name", "is_active"):  # null must not switch a revoked key on again
        if name in given and given[name] is None:
            raise InvalidRequest.at(to_camel(name), "must not be null")
    for name, value in given.items():
        if name in _LIMITS:
            given[name] = value or None
        elif value is None and name in _EMPTY:
            given[name] = _EMPTY[name]
    if given.get("user_id", "") is None or (key is None and "user_id" not in given):
        given["user_id"] = default_user_id
    window = given.get("rate_limit_window", key and key.rate_limit_window)
    if given.get("rate_limit_requests", key and key.rate_limit_requests) and not window:
        raise InvalidRequest.at("rateLimitRequests", "needs a rateLimitWindow")
    return given


def shown(key: Key, use: Mapping[str, Any] | None) -> dict[str, Any]:
    """The key without its hash, with what it has used."""
    total = {name: (use[name] if use else 0) for name in ("requests", "tokens", "cost")}
    today = {name: (use[f"day_{name}"] if use else 0) for name in ("requests", "tokens", "cost")}
    return {
        **{to_camel(name): _plain(getattr(key, name)) for name in _SHOWN},
        "lastUsedAt": use["last_used_at"] if use else None,
        "usage": {
            **{name: _plain(value) for name, value in total.items()},
            "inFlight": use["in_flight"] if use else 0,
            "today": {name: _plain(value) for name, value in today.items()},
            "total": {name: _plain(value) for name, value in total.items()},
        },
    }


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value
