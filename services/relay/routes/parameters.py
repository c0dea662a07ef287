"""What routes take from a request."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Path, Request

from services.relay.callers import presented
from services.relay.errors import NotPermitted
from services.relay.keys import Key, Permission
from services.relay.state import State
from shared import values


async def _state(request: Request) -> State:
    state: State = request.app.state.relay
    return state


AppState = Annotated[State, Depends(_state)]


def caller_with(permission: Permission | None) -> Callable[..., Awaitable[Key]]:
    """A dependency that gives the caller's key, if it has the permission."""

    async def key_of(request: Request, state: AppState) -> Key:
        state.require_ready()
        key = await state.callers.authenticate(presented(request.headers))
        if permission is not None and not key.may(permission):
            raise NotPermitted(f"The API key has no permission for {permission}")
        return key

    return key_of


CallerKey = Annotated[Key, Depends(caller_with(None))]
MessagesKey = Annotated[Key, Depends(caller_with("messages"))]
SessionId = Annotated[values.SessionId, Path()]
TurnId = Annotated[values.MessageId, Path()]
