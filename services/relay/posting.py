"""A message for a conversation: stored in its session, shown as an event, and answered when that is asked for.

Its one invariant: when `post` returns, the message is in Postgres, in the session or among those that wait for it.
"""

from dataclasses import dataclass
from typing import Any, Literal

from uuid_utils import uuid7

from services.relay import conversations, events
from services.relay.conversations import Conversation
from services.relay.errors import ConversationArchived
from services.relay.event_log import EventLog, new_message
from services.relay.events import NewEvent
from services.relay.runs import Runs
from shared import wire
from shared.database import Conn, Database
from shared.errors import SessionNotActive, SessionNotFound, TurnInProgress
from shared.session_client import SessionClient

Part = dict[str, Any]
Place = Literal["free", "line", "run"]
"""Where a message stands: nothing is before it; behind others that wait; in a run, which delivers it."""


@dataclass(frozen=True, slots=True)
class Posting:
    """How messages get into conversations."""

    database: Database
    sessions: SessionClient
    log: EventLog
    runs: Runs

    async def post(self, conversation: Conversation, parts: list[Part], *, run: bool) -> None:
        """Stores a message of the user; with `run` the conversation answers it, now or after what it is at.

        Raises ValidationFailed, ConversationArchived, NoPlace.
        """
        event = NewEvent("message", "user", {"role": "user", "content": parts}, id=str(uuid7()), is_pending=True)
        message = new_message(event.id, event.payload)
        if await events.pending(self.database, conversation.id):
            session = await self.log.settle(conversation)
            if session is None or not session.is_active:
                raise ConversationArchived
        place = await self._placed(conversation, event, run=run)
        if place == "run":
            return
        if place == "free":
            await self._append(conversation, event, message)
        if run:
            await self.runs.start(conversation.id, if_running=True)

    async def _placed(self, conversation: Conversation, event: NewEvent, *, run: bool) -> Place:
        """Puts it behind what waits already. While the conversation runs its session is the run's, which delivers."""

        async def work(conn: Conn) -> Place:
            row = await conversations.lock(conn, conversation.id)
            if not row.is_running and not await events.pending(conn, row.id):
                return "free"
            await events.append(conn, row.id, [event])
            if row.is_running and run:
                await conn.rows(conversations.SET["wants_run"], id=row.id, value=True)
            return "run" if row.is_running else "line"

        return await self.database.transact(work)

    async def _append(self, conversation: Conversation, event: NewEvent, message: wire.NewMessage) -> None:
        try:
            await self.sessions.append_message(conversation.session, message)
        except TurnInProgress:  # another client's turn has the session; what that client has said came before
            await self.log.catch_up(conversation)
            await self.database.transact(lambda conn: events.append(conn, conversation.id, [event]))
        except (SessionNotActive, SessionNotFound):
            raise ConversationArchived from None
        else:
            await self.log.catch_up(conversation)

    async def note(self, conversation: Conversation, payload: dict[str, Any]) -> None:
        """Keeps an event of a client's own among the conversation's."""
        event = NewEvent("other", "user", payload)
        await self.database.transact(lambda conn: events.append(conn, conversation.id, [event]))
