"""The lease of an open turn, renewed for as long as the turn runs.

Its one invariant: a turn of a relay that lives never runs out of its lease while the store can be reached.
"""

import asyncio

import structlog

from services.relay.history import Opened
from shared.errors import ServiceError, Unavailable
from shared.session_client import SessionClient

log = structlog.get_logger(__name__)


class Lease:
    """Renewed three times in its length, from now until `let_go`, or until the turn is another's.

    A timer and not a task: most turns end before it is due, and of the others a thousand may wait for theirs.
    """

    __slots__ = ("_every_seconds", "_opened", "_renewing", "_sessions", "_timer")

    def __init__(self, sessions: SessionClient, opened: Opened, lease_seconds: float) -> None:
        self._sessions = sessions
        self._opened = opened
        self._every_seconds = lease_seconds / 3
        self._renewing: asyncio.Task[None] | None = None
        self._wait()

    def let_go(self) -> None:
        self._timer.cancel()
        if self._renewing is not None:
            self._renewing.cancel()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every_seconds, self._due)

    def _due(self) -> None:
        self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        turn = self._opened.turn
        try:
            await self._sessions.renew_turn(self._opened.key, turn.turn_id, turn.lease_token)
        except Unavailable:
            pass  # there is time for two more tries
        except ServiceError as error:
            log.warning("lease_not_renewed", code=error.code)
            return
        self._wait()
