"""The lease of an open turn, renewed for as long as the turn runs.

Its one invariant: a turn of a relay that lives never runs out of its lease while the store can be reached.
"""

import asyncio

import structlog

from services.relay.history import Opened
from shared.errors import ServiceError, Unavailable
from shared.session_client import SessionClient

log = structlog.get_logger(__name__)


async def keep(sessions: SessionClient, opened: Opened, lease_seconds: float) -> None:
    """Renews the lease three times in its length, until it is cancelled, or the turn is another's."""
    while True:
        await asyncio.sleep(lease_seconds / 3)
        try:
            await sessions.renew_turn(opened.key, opened.turn.turn_id, opened.turn.lease_token)
        except Unavailable:
            continue
        except ServiceError as error:
            log.warning("lease_not_renewed", code=error.code)
            return
