"""/admin/accounts: the operator's upstream accounts."""

import asyncio
from time import monotonic, perf_counter
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, Field

from services.relay import account_input, accounts
from services.relay.account_input import AccountChange, NewAccount
from services.relay.accounts import Account, Use
from services.relay.members import Member
from services.relay.routes.admin import AdminRoute
from services.relay.routes.parameters import AppState
from services.relay.state import State
from services.relay.upstream import MESSAGES_PATH, UpstreamError, UpstreamRequest
from shared import values
from shared.door import answer

router = APIRouter(prefix="/admin/accounts", tags=["accounts"], route_class=AdminRoute)

_TRIED_MODEL: Final = "claude-haiku-4-5"
_TRIED_SECONDS: Final = 30.0
_WRITTEN_SECONDS: Final = 1.0
_SHOWN: Final = (
    *("id", "name", "provider", "base_url", "models", "priority", "weight", "max_concurrency"),
    *("failures_in_row", "last_error", "created_at", "updated_at"),
)

AccountId = Annotated[values.MessageId, Path(max_length=100)]


class TryWish(BaseModel):
    """`model`: the one to ask; by default the first that the account names."""

    model: Annotated[str, Field(min_length=1, max_length=255)] | None = None


@router.get("")
async def list_accounts(state: AppState) -> Response:
    """All accounts, the oldest first."""
    await state.pool.written(_WRITTEN_SECONDS)
    return answer(await _shown(state, await accounts.list_all(state.database)))


@router.post("")
async def create_account(new: NewAccount, state: AppState) -> Response:
    """A new account, eligible at once in all relays within a second."""
    account_id, values = account_input.new_columns(new, state.sealer)
    account = await accounts.add(state.database, account_id, values, enabled=new.enabled)
    return await _changed(state, account)


@router.get("/{account_id}")
async def get_account(account_id: AccountId, state: AppState) -> Response:
    await state.pool.written(_WRITTEN_SECONDS)
    return await _one(state, await accounts.get(state.database, account_id))


@router.patch("/{account_id}")
async def change_account(account_id: AccountId, change: AccountChange, state: AppState) -> Response:
    """Changes what is given; `enabled: true` also ends a cooldown."""
    await state.pool.written(_WRITTEN_SECONDS)
    account = await accounts.get(state.database, account_id)
    columns = account_input.changed_columns(account, change, state.sealer)
    enabled = change.enabled if "enabled" in change.model_fields_set else None
    return await _changed(state, await accounts.change(state.database, account_id, columns, enabled=enabled))


@router.delete("/{account_id}")
async def delete_account(account_id: AccountId, state: AppState) -> Response:
    """Takes the account out; answers that it still gives go on."""
    account = await accounts.delete(state.database, account_id)
    await state.pool.refresh()
    return answer({**_fields(account, None, Use()), "deleted": True})


@router.post("/{account_id}/enable")
async def enable_account(account_id: AccountId, state: AppState) -> Response:
    """Makes it eligible: also one that upstream had disabled, or that cools."""
    await state.pool.written(_WRITTEN_SECONDS)  # what befell it before must not be written after this
    return await _changed(state, await accounts.enable(state.database, account_id))


@router.post("/{account_id}/disable")
async def disable_account(account_id: AccountId, state: AppState) -> Response:
    """No new request takes it; those that run go on."""
    await state.pool.written(_WRITTEN_SECONDS)
    return await _changed(state, await accounts.disable(state.database, account_id))


@router.post("/{account_id}/test")
async def try_account(account_id: AccountId, state: AppState, wish: TryWish | None = None) -> Response:
    """Asks the account's upstream for one token, whatever state it is in; changes nothing about it."""
    account = await accounts.get(state.database, account_id)
    upstream = state.ways.connect(account)
    model = (wish and wish.model) or next(iter(account.models), _TRIED_MODEL)
    told: dict[str, Any] = {"id": account.id, "ok": False, "status": None, "model": model, "error": None}
    started = perf_counter()
    if upstream is None:
        told["error"] = "its secrets cannot be opened"
    else:
        body = {
            "model": account.upstream_model(model),
            "max_tokens": 1,
            "messages": [{"role": "user", "content": "ping"}],
        }
        try:
            async with (
                asyncio.timeout(_TRIED_SECONDS),
                await upstream.open(UpstreamRequest(MESSAGES_PATH, "", {}, body)) as reply,
            ):
                told["status"] = reply.status
                await reply.read()
                told["ok"] = reply.status == 200
                told["error"] = None if told["ok"] else f"upstream answered {reply.status}"
        except UpstreamError as error:
            told["error"] = f"{error.kind}: {error}"
        except TimeoutError:
            told["error"] = f"timeout: no answer within {_TRIED_SECONDS:.0f} s"
    return answer({**told, "latency_ms": round((perf_counter() - started) * 1000, 1)})


async def _changed(state: State, account: Account) -> Response:
    await state.pool.refresh()
    return await _one(state, account)


async def _one(state: State, account: Account) -> Response:
    return answer((await _shown(state, [account]))[0])


async def _shown(state: State, found: list[Account]) -> list[dict[str, Any]]:
    await state.account_use.tell()
    uses = await accounts.uses(state.database)
    return [_fields(each, state.pool.members.get(each.id), uses.get(each.id, Use())) for each in found]


def _fields(account: Account, member: Member | None, use: Use) -> dict[str, Any]:
    """The account without its secrets, and why no request may take it, if so."""
    obstacle = member.obstacle(monotonic()) if member else None
    reason, seconds = obstacle or (None, None)
    is_cooling = account.enabled and account.cooling_seconds > 0
    return {
        **{name: getattr(account, name) for name in _SHOWN},
        "has_api_key": account.secrets is not None,
        "proxy_url": account.proxy_shown,
        "enabled": account.enabled,
        "state": "disabled" if not account.enabled else "cooling" if is_cooling else "active",
        "disabled_reason": account.disabled_reason,
        "cooldown_until": account.cooldown_until if is_cooling else None,
        "ineligible_reason": reason,
        "ineligible_seconds": None if seconds in {None, float("inf")} else round(seconds or 0.0, 3),
        "in_flight": use.in_flight,
        "requests": use.requests,
        "failures": use.failures,
        "last_used_at": use.last_used_at,
    }
