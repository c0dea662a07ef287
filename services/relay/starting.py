"""The start of a conversation, step by step: a place, an account, the session, its files, the first message.

Its one invariant: every step that is begun is written down before it is done; a start ends in READY, and then the
conversation runs, or in ERROR, and then there is none.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import structlog
from uuid_utils import UUID, uuid7

from services.relay import conversation_lists, conversations, events, places, runtime_keys, start_tasks
from services.relay.conversations import Api, Conversation
from services.relay.errors import ConversationNotFound, NoAccount, NoPlace, SandboxNotFound, message_of
from services.relay.pool import Pool
from services.relay.posting import Posting
from services.relay.session_limit import SessionLimit
from services.relay.start_tasks import StartTask, Status
from shared import wire
from shared.database import Conn, Database
from shared.errors import DatabaseUnavailable, ServiceError
from shared.session_client import SessionClient, SessionKey

log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.3

Tell = Callable[..., Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be started: the columns that its maker gives, the model that answers, and the first message."""

    values: dict[str, Any]
    model: str
    api: Api
    first_message: list[dict[str, Any]] = field(default_factory=list)
    runs: bool = False
    sandbox_id: str | None = None


class _GivenUp(Exception):
    """The task is no longer this relay's."""


@dataclass(slots=True, eq=False)
class Starts:
    """The starts of one relay."""

    database: Database
    sessions: SessionClient
    pool: Pool
    limit: SessionLimit
    posting: Posting
    pepper: str
    max_running: int
    wait_seconds: float
    _running: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    # ── V1: in the background, each step a status ───────────────────────────────────────────────

    async def begin(self, wish: Wish, request: dict[str, Any], *, base_url: str) -> tuple[StartTask, "Steps"]:
        """A task whose start goes on in the background, and the steps that it takes from here on."""
        task = await start_tasks.create(
            self.database,
            task_id=uuid7().hex,
            user_id=wish.values["user_id"],
            conversation_id=uuid7().hex,
            request=request,
        )
        steps = Steps()
        steps.put(task)
        running = self._running[task.id] = asyncio.create_task(self._start(task, wish, base_url, steps))
        running.add_done_callback(lambda _: self._running.pop(task.id, None))
        return task, steps

    async def _start(self, task: StartTask, wish: Wish, base_url: str, steps: "Steps") -> None:
        structlog.contextvars.bind_contextvars(start_task=task.id)

        async def tell(status: Status, **told: str) -> None:
            advanced = await start_tasks.advance(self.database, task.id, status, **told)
            if advanced is None:
                raise _GivenUp
            steps.put(advanced)

        detail = None
        try:
            await self.carry_out(wish, task.conversation_id, tell, base_url=base_url, wait_seconds=self.wait_seconds)
            await tell("READY", app_conversation_id=task.conversation_id)
        except _GivenUp:
            log.warning("start_task_lost")
        except ServiceError as error:
            detail = message_of(error)
        except asyncio.CancelledError:
            detail = "The relay stopped while the conversation was starting"
        except Exception:
            log.exception("start_fault")
            detail = "Internal error"
        try:
            if detail is not None:
                log.warning("start_failed", detail=detail)
                await self._undo(task.user_id, task.conversation_id)
                await tell("ERROR", detail=detail)
        except (DatabaseUnavailable, _GivenUp):
            log.warning("start_failure_not_told")  # its time runs out, and the task is given up
        finally:
            steps.end()

    async def renew(self) -> None:
        """Holds the tasks that this relay works on; raises DatabaseUnavailable."""
        if self._running:
            await self.database.rows(start_tasks.RENEW, ids=list(self._running))

    async def stop(self) -> None:
        """Gives up what is starting, and says so."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ── the steps ───────────────────────────────────────────────────────────────────────────────

    async def carry_out(
        self, wish: Wish, conversation_id: str, tell: Tell, *, base_url: str, wait_seconds: float
    ) -> Conversation:
        """The conversation, started. Raises what keeps it from starting; then it is not there, or STARTING still."""
        until = monotonic() + wait_seconds
        sandbox_id = wish.sandbox_id or uuid7().hex
        await tell("WAITING_FOR_SANDBOX", sandbox_id=sandbox_id)
        if wish.sandbox_id and not await conversation_lists.by_sandboxes(
            self.database, wish.values["user_id"], [wish.sandbox_id]
        ):
            raise SandboxNotFound
        conversation = await self._placed(wish, conversation_id, sandbox_id, until)
        await self._account(wish.model, until)

        await tell("PREPARING_REPOSITORY")
        await self._session(conversation)

        await tell("RUNNING_SETUP_SCRIPT")
        await self.posting.log.catch_up(conversation)

        await tell("STARTING_CONVERSATION", agent_server_url=base_url)
        await self.database.transact(lambda conn: _is_up(conn, conversation.id))
        if wish.first_message:
            started = await conversations.find(self.database, conversation.id)
            if started is None:
                raise ConversationNotFound
            await self.posting.post(started, wish.first_message, run=wish.runs)
        return conversation

    async def _placed(self, wish: Wish, conversation_id: str, sandbox_id: str, until: float) -> Conversation:
        """The conversation's row, with a place among those that run; waits for one."""
        nonce = runtime_keys.new_nonce()
        secret = runtime_keys.secret_of(self.pepper, conversation_id, nonce)
        ids = {"id": conversation_id, "session_id": _hyphenated(conversation_id), "sandbox_id": sandbox_id}
        values = wish.values | ids | {"api": wish.api}

        async def work(conn: Conn) -> Conversation:
            await places.lock(conn, wish.values["user_id"])
            await places.take(conn, wish.values["user_id"], conversation_id, most=self.max_running)
            digest = runtime_keys.digest(self.pepper, secret)
            return await conversations.create(conn, values, nonce=nonce, key_hash=digest)

        while True:
            try:
                return await self.database.transact(work)
            except NoPlace:
                if monotonic() >= until:
                    raise
            await asyncio.sleep(_LOOK_SECONDS)

    async def _account(self, model: str, until: float) -> None:
        """Waits until an account could serve the model; raises what keeps all of them from it."""
        while True:
            self.pool.check(model)
            rest_seconds = self.pool.rest_seconds(model)
            if rest_seconds == 0:
                return
            if monotonic() >= until:
                raise NoAccount(retry_after_seconds=rest_seconds or 30.0)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _session(self, conversation: Conversation) -> None:
        key: SessionKey = conversation.session
        await self.limit.check(key, is_new=True)
        try:
            session = await self.sessions.create_session(
                wire.CreateSession(
                    user_id=key.user_id,
                    session_id=key.session_id,
                    title=conversation.title,
                    metadata={"conversation_id": conversation.id},
                    if_exists="return",
                )
            )
            self.limit.opened(session)
        finally:
            self.limit.leave(key)

    async def start_v0(self, wish: Wish, *, base_url: str, wait_seconds: float) -> Conversation:
        """The conversation, started, without a task; one that could not start is there no more.

        Raises what kept it from starting.
        """

        async def tell(_status: Status, **_told: str) -> None:
            return None

        conversation_id = uuid7().hex
        try:
            return await self.carry_out(wish, conversation_id, tell, base_url=base_url, wait_seconds=wait_seconds)
        except (ServiceError, asyncio.CancelledError):
            await self._undo(wish.values["user_id"], conversation_id)
            raise

    async def _undo(self, user_id: str, conversation_id: str) -> None:
        """Nothing is left of a start that failed, but what session_service has while it is away."""
        await conversations.delete(self.database, user_id, conversation_id)
        with suppress(ServiceError):
            await self.sessions.end_session(SessionKey(user_id, _hyphenated(conversation_id)))
            self.limit.closed()


async def _is_up(conn: Conn, conversation_id: str) -> None:
    row = await conversations.lock(conn, conversation_id)
    await events.set_sandbox_status(conn, row, "RUNNING")
    await events.append(conn, row.id, [events.of_status(row.execution_status)])


def _hyphenated(digits: str) -> str:
    return str(UUID(digits))


class Steps:
    """The steps of a start, for one who follows them."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[StartTask | None] = asyncio.Queue()

    def put(self, task: StartTask) -> None:
        self._queue.put_nowait(task)

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def all(self) -> AsyncIterator[StartTask]:
        while (task := await self._queue.get()) is not None:
            yield task
