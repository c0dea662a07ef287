"""The places of a user's running conversations: so many may run, and starting one more pauses the oldest idle one.

Its one invariant: never more than RELAY_MAX_RUNNING_CONVERSATIONS of a user's conversations start or run, over all
relays together.
"""

from services.relay import conversations, events
from services.relay.errors import NoPlace
from shared.database import Conn

_SOON_SECONDS = 5.0


async def lock(conn: Conn, user_id: str) -> None:
    """One conversation of the user at a time takes a place, until the transaction ends. Comes before rows' locks."""
    await conn.rows(conversations.LOCK_USER, user_id=user_id)


async def take(conn: Conn, user_id: str, conversation_id: str, *, most: int) -> None:
    """Room for this conversation, under `lock`; raises NoPlace when all that run have something to do."""
    others = await conn.rows(conversations.PLACES, user_id=user_id, id=conversation_id)
    too_many = len(others) + 1 - most
    if too_many <= 0:
        return
    idle = [row["id"] for row in others if row["run_id"] is None and row["sandbox_status"] == "RUNNING"]
    for each in idle[:too_many]:
        row = await conversations.lock(conn, each)
        if row.run_id is None:
            await events.set_sandbox_status(conn, row, "PAUSED")
            too_many -= 1
    if too_many > 0:
        raise NoPlace(retry_after_seconds=_SOON_SECONDS)
