"""What became of a turn, for its user who asks afterwards.

Its one invariant: `yes` is said only of what is in the store, `deferred` only of what is on this relay's disk.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from services.relay.errors import UpstreamOverloaded
from services.relay.outcomes import OPERATORS_ERRORS
from services.relay.spool import NOT_STORABLE, Entry, Spool
from shared import wire
from shared.errors import Unavailable
from shared.session_client import SessionClient

Persisted = Literal["pending", "deferred", "yes", "none"]

_TOLD_OF_ERRORS: Final = ("type", "message")


@dataclass(frozen=True, slots=True)
class TurnStatus:
    """`persisted` is `pending` while the turn is open, `deferred` while its completion waits in the spool.

    Then it is `yes`, or `none` when nothing of the answer could be stored or the turn has expired. The times are
    the store's: of a turn whose completion waits, nobody here knows them.
    """

    turn_id: str
    session_id: str
    status: wire.TurnStatus
    persisted: Persisted
    stop_reason: str | None
    model: str | None
    usage: dict[str, Any] | None
    cost_usd: float | None
    error: dict[str, str] | None
    opened_at: datetime | None = None
    closed_at: datetime | None = None


async def get(sessions: SessionClient, spool: Spool, user_id: str, turn_id: str) -> TurnStatus:
    """The status of a turn of this user. Raises TurnNotFound; Unavailable for one that only the store knows."""
    if entry := spool.waits(user_id, turn_id):
        return _of_entry(entry)
    try:
        turn = await sessions.find_turn(user_id, turn_id)
    except Unavailable:
        # It may have gone into the spool while the store was asked in vain.
        if entry := spool.waits(user_id, turn_id):
            return _of_entry(entry)
        raise
    return _of_turn(turn)


def _of_entry(entry: Entry) -> TurnStatus:
    answer = entry.answer
    return TurnStatus(
        turn_id=entry.turn_id,
        session_id=entry.key.session_id,
        status=answer.status,
        persisted="deferred",
        stop_reason=answer.stop_reason,
        model=answer.model,
        usage=answer.usage,
        cost_usd=None if answer.cost_usd is None else float(answer.cost_usd),
        error=_told(answer.error),
    )


def _of_turn(turn: wire.Turn) -> TurnStatus:
    return TurnStatus(
        turn_id=turn.turn_id,
        session_id=turn.session_id,
        status=turn.status,
        persisted=_persisted(turn),
        stop_reason=turn.stop_reason,
        model=turn.model,
        usage=turn.usage,
        cost_usd=turn.cost_usd,
        error=_told(turn.error),
        opened_at=turn.opened_at,
        closed_at=turn.closed_at,
    )


def _persisted(turn: wire.Turn) -> Persisted:
    if turn.status == "open":
        return "pending"
    is_refused = turn.status == "failed" and (turn.error or {}).get("type") == NOT_STORABLE
    return "none" if is_refused or turn.status == "expired" else "yes"


def _told(error: dict[str, Any] | None) -> dict[str, str] | None:
    """Type and message of a stored error; what upstream said of the operator's account is told as an outage."""
    if error is None:
        return None
    told = {name: str(error[name]) for name in _TOLD_OF_ERRORS if error.get(name) is not None}
    if told.get("type") in OPERATORS_ERRORS:
        return {"type": UpstreamOverloaded.code}
    return told or None
