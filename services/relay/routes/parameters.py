"""What routes take from a request."""

from typing import Annotated

from fastapi import Depends, Path, Request

from services.relay import keys
from services.relay.state import State
from shared import values


async def _state(request: Request) -> State:
    state: State = request.app.state.relay
    return state


AppState = Annotated[State, Depends(_state)]


async def _caller_key(request: Request, state: AppState) -> keys.Key:
    state.require_ready()
    return await state.keys.authenticate(keys.presented(request.headers))


CallerKey = Annotated[keys.Key, Depends(_caller_key)]
SessionId = Annotated[values.SessionId, Path()]
TurnId = Annotated[values.MessageId, Path()]
