"""One run of a conversation: what waits is delivered, the model is asked, the answer is kept, until nothing is left.

Its one invariant: however a run ends, the conversation's row says so, unless the run was taken from this relay; and
what its turn has stored is among the events before the status that tells of the end.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any, Final, Literal

import structlog
from uuid_utils import uuid7

from services.relay import chat, continuing, conversations, events, mentions
from services.relay.conversations import Conversation, ExecutionStatus
from services.relay.errors import ConversationArchived, ConversationNotFound, message_of
from services.relay.event_log import EventLog
from services.relay.events import NewEvent
from services.relay.keys import Key
from services.relay.live import Live
from services.relay.parts import Caller
from services.relay.pipe import Pipe
from services.relay.pool import Pool
from services.relay.request import ClaudeRequest, Continuation
from services.relay.settings import RelaySettings
from services.relay.turn import Turn
from services.relay.turns import Turns
from shared import wire
from shared.database import Conn, Database
from shared.errors import DatabaseUnavailable, ServiceError, TurnInProgress, Unavailable, VersionMismatch
from shared.session_client import SessionClient

log = structlog.get_logger(__name__)

LEASE_SECONDS: Final = 10.0
_RENEW_SECONDS: Final = 2.0
_LOOK_SECONDS: Final = 1.0
_STORING_SECONDS: Final = 60.0
_END_AGAIN_SECONDS: Final = 1.0

_GIVEN_UP: Final = frozenset({"client_gone", "relay_stopping", "interrupted"})
_FAILED: Final = frozenset({"failed", "refused", "rejected"})

Step = Literal["deliver", "again", "resumed", "ended"]


@dataclass(frozen=True, slots=True)
class RunParts:
    """What every run works with."""

    settings: RelaySettings
    database: Database
    sessions: SessionClient
    turns: Turns
    pool: Pool
    live: Live
    log: EventLog
    key_of: Callable[[Conversation], Awaitable[Key]]


class Run:
    """A run that has been put into its conversation's row."""

    def __init__(self, parts: RunParts, conversation_id: str, run_id: str) -> None:
        self._parts = parts
        self._id = conversation_id
        self._run_id = run_id
        self._turn: Turn | None = None
        self._heard_at = monotonic()
        self._outcome = "completed"
        self._is_pausing = False
        self._is_lost = False
        self._is_held_up = False

    async def go(self) -> None:
        """Runs to the end, and says how it ended."""
        structlog.contextvars.bind_contextvars(conversation=self._id, run=self._run_id)
        keeping = asyncio.create_task(self._keep())
        try:
            await self._work()
        except ConversationNotFound:
            log.info("run_of_deleted_conversation")
        except ServiceError as error:
            log.warning("run_failed", code=error.code)
            await self._end(events.of_error(error.code, message_of(error)))
        except Exception:
            log.exception("run_fault")
            await self._end(events.of_error("internal_error", "Internal error"))
        finally:
            keeping.cancel()

    # ── the order ───────────────────────────────────────────────────────────────────────────────

    async def _work(self) -> None:
        """Until the end is written, or the run is another's."""
        parts, asks = self._parts, True
        while not self._is_lost:
            conversation = await conversations.find(parts.database, self._id)
            if conversation is None:
                raise ConversationNotFound
            await self._deliver(conversation)
            session = await parts.log.catch_up(conversation)
            if session is None or not session.is_active:
                raise ConversationArchived
            if asks and not self._is_given_up:
                self._outcome = await self._answer(conversation, session)
                await parts.log.catch_up(conversation)
                if self._outcome == "moved":
                    continue
            step = await parts.database.transact(self._next)
            if step == "ended":
                return
            if step == "resumed":
                self._is_pausing = False
            asks = step != "deliver"

    @property
    def _is_given_up(self) -> bool:
        return self._is_pausing or self._is_lost

    async def _deliver(self, conversation: Conversation) -> None:
        """What cannot be delivered before a pause goes on waiting."""
        self._is_held_up = False
        try:
            await self._parts.log.deliver(conversation, gives_up=lambda: self._is_given_up)
        except TurnInProgress:
            if not self._is_given_up:
                raise
            self._is_held_up = True

    async def _next(self, conn: Conn) -> Step:
        """What is to be done after a turn, and the end where that is nothing."""
        row = await conversations.lock(conn, self._id)
        if row.run_id != self._run_id:
            self._is_lost = True
            return "ended"
        if not self._is_held_up and await events.pending(conn, self._id):
            return "deliver"
        if row.wants_pause:
            await events.end_run(conn, row, "paused")
            if not row.wants_run:
                return "ended"
            await events.begin_run(conn, row, self._run_id, lease_seconds=LEASE_SECONDS)
            return "resumed"
        told = [self._told()] if self._outcome in _FAILED else []
        if row.wants_run and self._outcome != "interrupted":
            await events.append(conn, row.id, told)
            await conn.rows(conversations.SET["wants_run"], id=row.id, value=False)
            return "again"
        if self._outcome != "completed":
            await events.end_run(conn, row, "error" if told else "paused", *told)
            return "ended"
        await events.end_run(conn, row, "finished")
        return "ended"

    def _told(self) -> NewEvent:
        failure = (self._turn.failure if self._turn else None) or {}
        return events.of_error(str(failure.get("type") or "failed"), str(failure.get("message") or "The turn failed"))

    async def _end(self, error: NewEvent) -> None:
        """Writes that it ended with an error, again until the database takes it, or the run is another's."""

        async def work(conn: Conn) -> None:
            row = await conversations.lock(conn, self._id)
            if row.run_id == self._run_id:
                await events.end_run(conn, row, "error", error)

        until = monotonic() + LEASE_SECONDS
        while monotonic() < until:
            try:
                await self._parts.database.transact(work)
            except DatabaseUnavailable:
                await asyncio.sleep(_END_AGAIN_SECONDS)
            except ConversationNotFound:
                return
            else:
                return

    # ── one answer ──────────────────────────────────────────────────────────────────────────────

    async def _answer(self, conversation: Conversation, session: wire.Session) -> str:
        """The turn's outcome; "completed" too when nothing asks."""
        enriched = partial(mentions.with_named, self._parts.database, conversation.session)
        continued = await continuing.continuation(self._parts.sessions, conversation.session, session, enriched)
        if continued is None:
            return "completed"
        outcome = await self._ask(conversation, continued)
        if continued.prefill and outcome == "refused" and not self._is_pausing:
            # Not every model takes a given beginning.
            session = await self._parts.sessions.get_session(conversation.session)
            outcome = await self._ask(conversation, replace(continued, version=session.version, prefill=()))
        return outcome

    async def _ask(self, conversation: Conversation, continued: Continuation) -> str:
        parts, settings = self._parts, self._parts.settings
        key = await parts.key_of(conversation)
        body: dict[str, Any] = {
            "model": conversation.llm_model or chat.default_model(parts.pool, settings.relay_chat_model, key),
            "max_tokens": settings.relay_default_max_tokens,
            "messages": [],
            "stream": True,
        }
        if conversation.instructions:
            body["system"] = conversation.instructions
        self._heard_at = monotonic()
        request = ClaudeRequest(body, None, continued)
        turn = self._turn = parts.turns.begin(Caller(key, {}, "", str(uuid7())), request)
        if self._is_pausing:
            turn.interrupt()
        try:
            reply = await turn.reply
            if isinstance(reply.content, Pipe):
                await self._drain(reply.content)
            await turn.task
        finally:
            turn.leave()
        reason = turn.failure["type"] if turn.failure else ""
        if reason in _GIVEN_UP:
            return "interrupted"
        if reason == VersionMismatch.code:
            return "moved"
        if turn.persisted == "deferred":
            await self._until_stored(conversation)
        return turn.outcome

    async def _drain(self, pipe: Pipe) -> None:
        while (piece := await pipe.get(_LOOK_SECONDS)) != b"":
            if piece is not None:
                self._heard_at = monotonic()

    async def _until_stored(self, conversation: Conversation) -> None:
        """The answer waits on this relay's disk for the store; the run goes on so long, within reason."""
        until = monotonic() + _STORING_SECONDS
        while monotonic() < until and not self._is_lost:
            with contextlib.suppress(Unavailable):
                turns = (await self._parts.sessions.list_turns(conversation.session, limit=1)).turns
                if turns and turns[0].status != "open":
                    return
            await asyncio.sleep(_LOOK_SECONDS)

    # ── beside ──────────────────────────────────────────────────────────────────────────────────

    async def _keep(self) -> None:
        """Renews the lease, hears of a pause, and says when upstream has been silent for too long."""
        parts = self._parts
        with parts.live.watching(self._id) as news:
            while not self._is_lost:
                news.clear()
                with contextlib.suppress(Unavailable):
                    await self._look()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), _RENEW_SECONDS)

    async def _look(self) -> None:
        renewed = {"id": self._id, "run_id": self._run_id, "lease_seconds": LEASE_SECONDS}
        row = await self._parts.database.row(conversations.RENEW_RUN, **renewed)
        self._is_lost = self._is_lost or row is None
        self._is_pausing = self._is_pausing or (row is not None and row["wants_pause"])
        if (self._is_lost or self._is_pausing) and self._turn is not None:
            self._turn.interrupt()
        if row is not None:
            is_stuck = monotonic() - self._heard_at >= self._parts.settings.relay_stuck_seconds
            status: ExecutionStatus = "stuck" if is_stuck and self._turn and not self._turn.task.done() else "running"
            if row["execution_status"] != status:
                await self._parts.database.transact(lambda conn: self._tell(conn, status))

    async def _tell(self, conn: Conn, status: ExecutionStatus) -> None:
        row = await conversations.lock(conn, self._id)
        if row.run_id == self._run_id:
            await events.set_execution_status(conn, row, status)
