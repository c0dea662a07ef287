"""Runs of conversations: begun, paused, gone on with, and given up when their relay is gone.

Its one invariant: of a conversation one run goes on at most, over all relays; how it ended is told by its status and
by an event, once.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from time import monotonic
from typing import Final

import structlog
from uuid_utils import uuid7

from services.relay import conversations, events, places, start_tasks
from services.relay.conversations import Conversation
from services.relay.errors import ConversationArchived, ConversationNotFound, RunInProgress
from services.relay.event_log import EventLog
from services.relay.live import Live
from services.relay.run import LEASE_SECONDS, Run, RunParts
from shared.database import Conn, Database, Row

log = structlog.get_logger(__name__)

SWEEP_SECONDS: Final = 2.0
# An owner that lives may have been kept from the database; it has this long to say so once that is back.
_DOUBT_SECONDS: Final = 3.0
_STALE_SECONDS: Final = 120.0
_PAUSE_SECONDS: Final = 10.0
_PAUSES: Final = 3
_STOP_SECONDS: Final = 6.0
_GONE: Final = "The relay that ran this conversation is gone; what it had stored is kept"
_TASK_GONE: Final = "The relay that started this conversation is gone"


@dataclass(slots=True, eq=False)
class Runs:
    """The runs of one relay."""

    database: Database
    live: Live
    log: EventLog
    parts: RunParts
    max_running: int
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _overdue: dict[str, tuple[datetime, float]] = field(default_factory=dict)

    async def start(self, conversation_id: str, *, if_running: bool = False) -> None:
        """Begins a run and returns; with `if_running` one that goes on shall go on once more after it.

        A conversation whose sandbox is paused is resumed. Raises RunInProgress, ConversationArchived, NoPlace,
        ConversationNotFound.
        """
        conversation = await conversations.find(self.database, conversation_id)
        if conversation is None:
            raise ConversationNotFound
        run_id = str(uuid7())

        async def work(conn: Conn) -> bool:
            # Also for one that has a place: it may have lost that until its row is locked.
            await places.lock(conn, conversation.user_id)
            row = await conversations.lock(conn, conversation_id)
            if row.is_running:
                if not if_running:
                    raise RunInProgress
                await conn.rows(conversations.SET["wants_run"], id=row.id, value=True)
                return False
            await self._wake_sandbox(conn, row)
            await events.begin_run(conn, row, run_id, lease_seconds=LEASE_SECONDS)
            return True

        if await self.database.transact(work):
            self._spawn(Run(self.parts, conversation_id, run_id))

    async def resume_sandbox(self, conversation: Conversation) -> None:
        """Makes a paused conversation ready to go on. Raises NoPlace, ConversationArchived."""

        async def work(conn: Conn) -> None:
            await places.lock(conn, conversation.user_id)
            await self._wake_sandbox(conn, await conversations.lock(conn, conversation.id))

        await self.database.transact(work)

    async def _wake_sandbox(self, conn: Conn, row: Conversation) -> None:
        if row.sandbox_status == "PAUSED":
            await places.take(conn, row.user_id, row.id, most=self.max_running)
            await events.set_sandbox_status(conn, row, "RUNNING")
        elif row.sandbox_status == "ERROR":
            raise ConversationArchived("The conversation could not be started")

    async def pause(self, conversation_id: str) -> None:
        """Stops the run after the piece of the answer that has come, and returns once that is kept.

        Of a conversation that does nothing only the status changes; one that is paused stays so.
        """

        async def work(conn: Conn) -> None:
            row = await conversations.lock(conn, conversation_id)
            if row.is_running:
                await conn.rows(conversations.ASK_PAUSE, id=row.id)
            elif row.execution_status == "idle":
                await events.set_execution_status(conn, row, "paused")

        with self.live.watching(conversation_id) as news:
            await self.database.transact(work)
            await self._until_still(conversation_id, news)

    async def pause_sandbox(self, conversation: Conversation) -> None:
        """Pauses what runs, and gives the place up: but for one that is begun again and again meanwhile."""

        async def work(conn: Conn) -> bool:
            row = await conversations.lock(conn, conversation.id)
            if row.sandbox_status == "RUNNING" and not row.is_running:
                await events.set_sandbox_status(conn, row, "PAUSED")
            return not row.is_running

        for _ in range(_PAUSES):
            await self.pause(conversation.id)
            if await self.database.transact(work):
                return
        raise RunInProgress

    async def _until_still(self, conversation_id: str, news: asyncio.Event) -> None:
        until = monotonic() + _PAUSE_SECONDS
        while monotonic() < until:
            news.clear()
            row = await conversations.find(self.database, conversation_id)
            if row is None or not row.wants_pause:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), 1.0)

    def _spawn(self, run: Run) -> None:
        task = asyncio.create_task(run.go())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Waits for what runs, which the end of the relay's turns interrupts."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_STOP_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    # ── what others have left ───────────────────────────────────────────────────────────────────

    async def sweep(self) -> None:
        """Ends the runs and start tasks whose relay is gone; raises DatabaseUnavailable.

        One whose time has run out is looked at twice: when the database was away its owner may live.
        """
        runs = await self.database.rows(conversations.STRANDED)
        tasks = await self.database.rows(start_tasks.STRANDED)
        seen = {f"run {row['run_id']}": row["run_expires_at"] for row in runs}
        seen |= {f"task {row['id']}": row["expires_at"] for row in tasks}
        self._overdue = {
            name: self._overdue[name] if self._overdue.get(name, (None, 0))[0] == moment else (moment, monotonic())
            for name, moment in seen.items()
        }
        for row in await self.database.rows(conversations.DROP_STALE, seconds=_STALE_SECONDS):
            log.warning("start_stranded", conversation=row["id"])
        for row in runs:
            if self._is_gone(f"run {row['run_id']}"):
                await self.database.transact(partial(_end_stranded, conversation_id=row["id"], run_id=row["run_id"]))
        for row in tasks:
            if self._is_gone(f"task {row['id']}"):
                await self.database.transact(partial(_give_up, task=row))

    def _is_gone(self, name: str) -> bool:
        return monotonic() - self._overdue[name][1] >= _DOUBT_SECONDS


async def _end_stranded(conn: Conn, conversation_id: str, run_id: str) -> None:
    row = await conversations.lock(conn, conversation_id)
    if row.run_id == run_id:
        log.warning("run_stranded", conversation=conversation_id, run=run_id)
        await events.end_run(conn, row, "error", events.of_error("relay_gone", _GONE))


async def _give_up(conn: Conn, task: Row) -> None:
    values = {"id": task["id"], "expires_at": task["expires_at"], "detail": _TASK_GONE}
    if await conn.rows(start_tasks.GIVE_UP, **values):
        log.warning("start_task_stranded", task=task["id"])
        await conn.rows(conversations.DROP, id=task["conversation_id"])
