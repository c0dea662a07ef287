"""What routes take from a request."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Path, Request, Response
from starlette.convertors import Convertor, register_url_convertor

from services.relay.callers import presented, shows_nothing
from services.relay.errors import NotPermitted
from services.relay.keys import ANONYMOUS_ID, Key, Permission, anonymous
from services.relay.state import State
from shared import values
from shared.strict_route import StrictRoute


async def _state(request: Request) -> State:
    state: State = request.app.state.relay
    return state


class _Anything(Convertor[str]):
    """Takes whatever the rest of the path is, newlines too, for a route that refuses it in its own words."""

    regex = r"(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


AppState = Annotated[State, Depends(_state)]


FindKey = Callable[[Request, State], Awaitable[Key]]


def caller_with(permission: Permission | None) -> FindKey:
    """A dependency that gives the caller's key, if it has the permission."""

    async def key_of(request: Request, state: AppState) -> Key:
        state.require_ready()
        key: Key | None = getattr(request.state, "key", None)  # a KeyedRoute has asked already
        if key is None:
            key = await state.callers.authenticate(presented(request.headers))
        if permission is not None and not key.may(permission):
            raise NotPermitted(f"The API key has no permission for {permission}")
        return key

    return key_of


def caller_or_anonymous(permission: Permission) -> FindKey:
    """As `caller_with`; where the settings allow it no key is needed, but a wrong one is refused all the same."""
    keyed = caller_with(permission)

    async def key_of(request: Request, state: AppState) -> Key:
        state.require_ready()
        if state.settings.serves_anonymous_chat and shows_nothing(request.headers):
            return anonymous(ANONYMOUS_ID)
        return await keyed(request, state)

    return key_of


_any_key = caller_with(None)


class KeyedRoute(StrictRoute):
    """A route that knows its caller before it looks at the body: a stranger hears 401, whatever else is wrong."""

    async def find(self, request: Request, state: State) -> Key:
        return await _any_key(request, state)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            request.state.key = await self.find(request, request.app.state.relay)
            return await handle(request)

        return guarded


CallerKey = Annotated[Key, Depends(_any_key)]
MessagesKey = Annotated[Key, Depends(caller_with("messages"))]
SessionId = Annotated[values.SessionId, Path()]
TurnId = Annotated[values.MessageId, Path()]
