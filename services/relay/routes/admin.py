"""What all admin calls share: the administrator's token is asked for before anything else is looked at."""

import hmac
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from services.relay.errors import NotAdministrator
from services.relay.state import State
from shared.strict_route import StrictRoute


class AdminRoute(StrictRoute):
    """A route for the operator; anyone else hears 401, whatever else is wrong with the request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            state: State = request.app.state.relay
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            sent, known = token.strip().encode("utf-8", "surrogateescape"), state.secrets.admin_token.encode()
            if scheme.lower() != "bearer" or not hmac.compare_digest(sent, known):
                raise NotAdministrator
            state.require_ready()
            return await handle(request)

        return guarded
