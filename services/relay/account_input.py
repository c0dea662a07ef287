"""What an administrator says of an account, checked and made into columns.

Its one invariant: secrets are sealed here, before anything is stored, and no error repeats one.
"""

from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from uuid_utils import uuid7

from services.relay.accounts import Account
from services.relay.errors import InvalidRequest
from services.relay.sealing import Sealer, Secrets, Unsealable
from services.relay.upstream.anthropic import checked_base_url
from services.relay.ways import check_proxy, is_host, shown_proxy

_LOGIN_TOKENS: Final = ("sk-ant-oat", "sk-ant-ort", "sk-ant-sid")
_MAX_MODELS: Final = 1000


def _checked_name(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("must hold something visible, and nothing that cannot be printed")
    return name


def _checked_api_key(key: str) -> str:
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("holds characters that no HTTP header may hold")
    if key.startswith(_LOGIN_TOKENS):
        raise ValueError("is a token of a consumer's login; only API keys are taken")
    return key


def _checked_url(url: str) -> str:
    url = checked_base_url(url)
    if url.endswith("/v1"):
        raise ValueError("must end before /v1")
    if not is_host(urlsplit(url).hostname) or urlsplit(url).port == 0:
        raise ValueError("must have a host, and a port where it is not the usual one")
    return url


def _checked_proxy(url: str) -> str:
    if url:
        check_proxy(url)
    return url


def _checked_models(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """One message for all that is wrong, instead of one for each form that it could have."""
    try:
        checked: list[str] | dict[str, str] = check(value)
    except ValidationError:
        raise ValueError("must be a list of names, or an object from names to upstream's names") from None
    if len(checked) > _MAX_MODELS:
        raise ValueError(f"must be {_MAX_MODELS} at most")
    return checked


_ID: Final = r"^[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*$"  # dots alone mean something else in a path

Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_checked_name)]
BaseUrl = Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_checked_url)]
ApiKey = Annotated[str, Field(min_length=1, max_length=10_000), AfterValidator(_checked_api_key)]
ProxyUrl = Annotated[str, Field(max_length=2000), AfterValidator(_checked_proxy)]
Model = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
Models = Annotated[list[Model] | dict[Model, Model], WrapValidator(_checked_models)]
Priority = Annotated[int, Field(ge=-1_000_000, le=1_000_000)]
Weight = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]
MaxConcurrency = Annotated[int, Field(ge=0, le=10_000)]


class _Input(BaseModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True)


class NewAccount(_Input):
    """`id` is made where none is given. A demo account needs nothing but a name."""

    id: Annotated[str, Field(min_length=1, max_length=100, pattern=_ID)] | None = None
    name: Name
    provider: Literal["anthropic", "demo"] = "anthropic"
    base_url: BaseUrl | None = None
    api_key: ApiKey | None = None
    proxy_url: ProxyUrl | None = None
    models: Models | None = None
    priority: Priority = 0
    weight: Weight = 1.0
    max_concurrency: MaxConcurrency | None = None
    enabled: bool = True


class AccountChange(_Input):
    """What is absent stays; null empties `proxy_url`, `models` and `max_concurrency`."""

    name: Name = ""
    provider: Literal["anthropic", "demo"] = "anthropic"
    base_url: BaseUrl = ""
    api_key: ApiKey = ""
    proxy_url: ProxyUrl | None = None
    models: Models | None = None
    priority: Priority = 0
    weight: Weight = 1.0
    max_concurrency: MaxConcurrency | None = None
    enabled: bool = True


def new_columns(new: NewAccount, sealer: Sealer) -> tuple[str, dict[str, Any]]:
    """The new account's id and columns; raises InvalidRequest naming what is missing."""
    account_id = new.id or str(uuid7())
    if new.provider == "anthropic":
        for name in ("base_url", "api_key"):
            if getattr(new, name) is None:
                raise InvalidRequest.at(name, "Field required")
    secrets = {name: value for name in ("api_key", "proxy_url") if (value := getattr(new, name))}
    return account_id, {
        "name": new.name,
        "provider": new.provider,
        "base_url": new.base_url or "",
        "models": new.models or [],
        "priority": new.priority,
        "weight": new.weight,
        "max_concurrency": new.max_concurrency or None,
        **_sealed(account_id, secrets, sealer),
    }


def changed_columns(account: Account, change: AccountChange, sealer: Sealer) -> dict[str, Any]:
    """The columns that change; raises InvalidRequest where the secrets are needed and cannot be opened."""
    given = {name: getattr(change, name) for name in change.model_fields_set}
    given.pop("enabled", None)
    if given.pop("provider", account.provider) != account.provider:
        raise InvalidRequest.at("provider", "cannot be changed")
    secrets: Secrets = {name: given.pop(name) or "" for name in ("api_key", "proxy_url") if name in given}
    if secrets.get("proxy_url") and secrets["proxy_url"] == account.proxy_shown:
        del secrets["proxy_url"]  # as it was shown, its password hidden: nothing new
    for name, empty in (("models", []), ("max_concurrency", None)):
        if name in given:
            given[name] = given[name] or empty
    if secrets:
        given |= _sealed(account.id, _merged(account, secrets, sealer), sealer)
    return given


def _merged(account: Account, secrets: Secrets, sealer: Sealer) -> Secrets:
    try:
        known = sealer.secrets_of(account)
    except Unsealable as problem:
        if "api_key" not in secrets:
            raise InvalidRequest.at("api_key", f"must be given anew: {problem}") from None
        known = {}
    return {name: value for name, value in {**known, **secrets}.items() if value}


def _sealed(account_id: str, secrets: Secrets, sealer: Sealer) -> dict[str, Any]:
    proxy_url = secrets.get("proxy_url")
    return {
        "secrets": sealer.seal(account_id, secrets) if secrets else None,
        "secrets_key_id": sealer.key_id if secrets else None,
        "proxy_shown": shown_proxy(proxy_url) if proxy_url else None,
    }
