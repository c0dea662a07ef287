"""/admin/api-keys: the operator's keys for callers."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from pydantic import AfterValidator
from uuid_utils import uuid7

from services.relay import key_input, keys
from services.relay.key_input import CollectSession, KeyChange, NewKey
from services.relay.keys import KEY_PREFIX, Key
from services.relay.routes.admin import AdminRoute
from services.relay.routes.parameters import AppState
from services.relay.state import State
from shared.database import Conn
from shared.door import answer

router = APIRouter(prefix="/admin/api-keys", tags=["api keys"], route_class=AdminRoute)


def _storable(text: str | None) -> str | None:
    if text and "\0" in text:
        raise ValueError("must not hold U+0000")
    return text


KeyId = Annotated[str, Path(max_length=255), AfterValidator(_storable)]
Filter = Annotated[str | None, Query(max_length=255), AfterValidator(_storable)]


@router.get("")
async def list_keys(
    state: AppState,
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
    page_size: Annotated[int, Query(ge=1, le=1000)] = 100,
    search: Filter = None,
    tag: Filter = None,
    is_active: Annotated[bool | None, Query(alias="isActive")] = None,
) -> Response:
    """Keys that are not deleted, the oldest first; their number is in X-Total-Count."""
    offset = (page - 1) * page_size
    found, total = await keys.list_some(
        state.database, search=search or None, tag=tag or None, is_active=is_active, limit=page_size, offset=offset
    )
    return answer(await _shown(state, found), headers={"x-total-count": str(total)})


@router.post("")
async def create_key(new: NewKey, state: AppState) -> Response:
    """A new key. It is in this answer and nowhere else: only its hash is kept."""
    key_id, secret = str(uuid7()), KEY_PREFIX + secrets.token_hex(32)
    values = key_input.columns_of(new, None, default_user_id=key_id)
    key = await keys.add(state.database, key_id, state.secrets.pepper, secret, values)
    if key is None:
        raise AssertionError("a random key was there already")
    await state.callers.forget()
    told = {**key_input.shown(key, None), "apiKey": secret}
    return answer({"success": True, "message": "API key created", "data": told})


@router.get("/{key_id}")
async def get_key(key_id: KeyId, state: AppState) -> Response:
    return await _one(state, await keys.get(state.database, key_id))


@router.patch("/{key_id}")
async def change_key(key_id: KeyId, wanted: KeyChange, state: AppState) -> Response:
    """Changes what is given, at once."""
    return await _one(state, await _changed(state, key_id, wanted))


@router.patch("/{key_id}/collect-session")
async def change_collect_session(key_id: KeyId, wanted: CollectSession, state: AppState) -> Response:
    """Whether the sessions that the key's requests use enter the session pool."""
    key = await _changed(state, key_id, KeyChange.model_validate({"collectSession": wanted.collect_session}))
    told = "enabled" if key.collect_session else "disabled"
    data = {"id": key.id, "collectSession": key.collect_session}
    return answer({"success": True, "message": f"Session collection {told} for API key", "data": data})


@router.delete("/{key_id}")
async def delete_key(key_id: KeyId, state: AppState) -> Response:
    """Refuses the key from now on; it can be restored."""
    key = await keys.delete(state.database, key_id)
    await state.callers.forget()
    return answer({"success": True, "message": "API key deleted", "data": {"id": key.id, "deletedAt": key.deleted_at}})


@router.post("/{key_id}/restore")
async def restore_key(key_id: KeyId, state: AppState) -> Response:
    key = await keys.restore(state.database, key_id)
    await state.callers.forget()
    return await _one(state, key)


async def _changed(state: State, key_id: str, wanted: KeyChange) -> Key:
    async def work(conn: Conn) -> Key:
        key = await keys.lock(conn, key_id)
        return await keys.change(conn, key, key_input.columns_of(wanted, key, default_user_id=key.id))

    key = await state.database.transact(work)
    await state.callers.forget()
    return key


async def _one(state: State, key: Key) -> Response:
    return answer((await _shown(state, [key]))[0])


async def _shown(state: State, found: list[Key]) -> list[dict[str, Any]]:
    await state.key_limits.save()
    uses = await keys.uses(state.database, [key.id for key in found])
    return [key_input.shown(key, uses.get(key.id)) for key in found]
