"""One turn, start to end: the only file that knows the whole order.

    session id -> turn opened, messages stored -> upstream asked -> bytes passed on -> turn completed -> last bytes

Its one invariant: a turn runs in a task of its own, which no client can cancel: whatever becomes of the client,
what upstream has given is stored, the turn is closed once, and the upstream connection is let go.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import structlog

from services.relay import (
    answers,
    history,
    once,
    outcomes,
    prompt,
    session_ids,
    spending,
    streaming,
)
from services.relay.admission import Entry
from services.relay.answers import Answer
from services.relay.arrays import Array
from services.relay.assembly import Assembly
from services.relay.attempts import Attempt
from services.relay.delivery import EVENT_STREAM, Delivery
from services.relay.errors import Interrupted, RelayError
from services.relay.history import Opened
from services.relay.idempotency import Replay
from services.relay.interruption import Interruption
from services.relay.key_limits import Used
from services.relay.leases import Lease
from services.relay.once import Once
from services.relay.outcomes import Ended
from services.relay.parts import Caller, Parts, Reply
from services.relay.replays import Kept
from services.relay.request import ClaudeRequest
from services.relay.session_ids import Choice
from services.relay.spending import Bill
from services.relay.spool import Persisted
from services.relay.upstream import MESSAGES_PATH, UpstreamAnswer, UpstreamRequest
from shared.errors import Internal, ServiceError, Unavailable

log = structlog.get_logger(__name__)


class Turn:
    """A turn that runs."""

    def __init__(self, parts: Parts, caller: Caller, request: ClaudeRequest, entry: Entry) -> None:
        self._parts = parts
        self._caller = caller
        self._request = request
        self._entry = entry
        self._body = request.body
        self._delivery = Delivery(caller, parts.metrics, is_stream=request.stream)
        self._attempt: Attempt | None = None
        self._interruption = Interruption()
        self._bill: Bill
        self._brings_session = False
        self._has_left = False
        self.kept: Kept | None = None
        """What the store has of the turn, or will have once it hears of it."""
        self.persisted: Persisted = "none"
        self.outcome = "rejected"
        self.failure: dict[str, Any] | None = None
        """Type and message of what went wrong."""
        self.task = asyncio.create_task(self._run())

    @property
    def reply(self) -> asyncio.Future[Reply]:
        """There when the answer's head may go out."""
        return self._delivery.reply

    def leave(self) -> None:
        """The client has gone; by the settings the turn is interrupted, or goes on without it."""
        self._has_left = True
        self._delivery.pipe.drop()
        if self._parts.settings.relay_on_disconnect == "cancel":
            self.interrupt()

    def interrupt(self) -> None:
        """Lets go of upstream, or of its place in a queue, at once; what has come of the answer is stored."""
        self._interruption.set()

    # ── the order ───────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        try:
            async with self._interruption.watched():
                await self._entry.begin()
            self.outcome = await self._serve()
        except ServiceError as error:
            self._fail(error)
        except Exception:
            log.exception("turn_fault")
            self._fail(Internal())
        finally:
            self._delivery.pipe.close()
            self._parts.metrics.turns.labels(self.outcome).inc()

    def _fail(self, error: ServiceError) -> None:
        self.failure = {"type": error.code, "message": error.detail}
        self._delivery.fail(error)

    async def _serve(self) -> str:
        """Runs the turn and gives its outcome; raises a ServiceError for what ends it before upstream is asked."""
        choice = session_ids.choose(self._request, self._caller.headers)
        self._brings_session = choice is not None and choice.kind != "fresh"
        async with once.began(self._parts, self._caller, self._request, choice) as began:
            if isinstance(began, Replay):
                self._delivery.replay(began)
                return "replayed"
            self._parts.asking.pool.check(self._request.model)
            async with spending.billed(self._parts.key_limits, self._caller.key, self._request) as self._bill:
                return await self._serve_once(choice, began)

    async def _serve_once(self, choice: Choice | None, began: Once | None) -> str:
        if choice is None:
            return await self._serve_alone(began)
        try:
            async with self._session(choice, began) as opened:
                return await self._serve_in(opened, began)
        except Unavailable:
            if self._caller.headers.get("x-session-store") != "best-effort" or self._delivery.has_turn:
                raise
        return await self._serve_alone(began)

    @asynccontextmanager
    async def _session(self, choice: Choice, began: Once | None) -> AsyncIterator[Opened]:
        """The turn, opened, and the session to itself until it is closed."""
        parts = self._parts
        choice = began.in_session(choice) if began else choice
        wishes = history.Wishes.of(self._caller.headers, parts.settings)
        array = Array.of(self._request)
        async with AsyncExitStack() as held:
            deadline = monotonic() + wishes.wait_seconds
            async with self._interruption.watched():
                ours = parts.sides.session_of(self._caller.key.user_id, choice, array.first)
                key = await held.enter_async_context(ours)
                await held.enter_async_context(parts.lines.place(key, wait_seconds=wishes.wait_seconds))
                await held.enter_async_context(self._entry.place())
            await parts.spool.settle(key)
            opening = history.Opening(key, choice, array, wishes, self._request.continuation)
            if began is not None:
                opening = replace(opening, earlier=began.earlier, announce=began.opening)
            opened = await self._opened(opening, held, wait_seconds=max(0.0, deadline - monotonic()))
            held.callback(Lease(parts.sessions, opened, parts.settings.relay_lease_seconds).let_go)
            yield opened

    async def _opened(self, opening: history.Opening, held: AsyncExitStack, *, wait_seconds: float) -> Opened:
        """The turn, open. Who is given up meanwhile, perhaps behind another relay's turn, is in nobody's way."""
        if self._interruption.is_set:
            raise Interrupted
        task = asyncio.create_task(self._open(opening, wait_seconds=wait_seconds))
        try:
            async with self._interruption.watched():
                opened = await asyncio.shield(task)
        except Interrupted:  # the store may be opening it just now: it is awaited, and taken back
            await held.aclose()
            self._entry.leave()
            await self._bill.settle(Used())
            opened = await task
        except asyncio.CancelledError:
            task.cancel()
            raise
        structlog.contextvars.bind_contextvars(turn_id=opened.turn.turn_id)
        return opened

    async def _open(self, opening: history.Opening, *, wait_seconds: float) -> Opened:
        limit = self._parts.session_limit
        await limit.check(opening.key, is_new=opening.choice.kind == "fresh")
        try:
            opened = await history.open_turn(self._parts.sessions, opening, wait_seconds=wait_seconds)
            limit.opened(opened.turn.session)
        finally:
            limit.leave(opening.key)
        self._delivery.opened(session_ids.encoded(opened.key.session_id), opened.turn.turn_id)
        return opened

    async def _serve_alone(self, began: Once | None) -> str:
        """Without a session."""
        async with AsyncExitStack() as held:
            async with self._interruption.watched():
                await held.enter_async_context(self._entry.place())
            return await self._serve_in(None, began)

    async def _serve_in(self, opened: Opened | None, began: Once | None) -> str:
        if self._interruption.is_set:  # nothing was asked yet: as if the request had not been
            ended = Ended(Answer("refused", error={"type": "client_gone"}), error=Interrupted())
        else:
            ended = await self._answered(opened)
        await self._end(ended, opened, began)
        if opened is not None and not opened.is_whole and ended.answer.status == "completed":
            self._parts.summaries.after(opened.key, opened.turn, self._request.model)
        return ended.answer.status

    async def _answered(self, opened: Opened | None) -> Ended:
        """How asking upstream ended; a fault of ours too is an end that closes the turn."""
        try:
            if opened is not None and (continued := self._request.continuation) is not None:
                opened.turn.context.messages = await continued.enriched(opened.turn.context.messages)
            self._body = prompt.upstream_body(self._request, opened)
            if opened is not None:
                opened.let_go()
            return await self._ask(self._body, opened)
        except (RelayError, Unavailable) as error:
            return Ended(Answer("failed", error={"type": error.code}), error=error)
        except Exception:
            log.exception("turn_fault")
            return Ended(Answer("failed", error={"type": "relay_fault"}), error=Internal())

    async def _end(self, ended: Ended, opened: Opened | None, began: Once | None) -> None:
        """Keeps what came of the turn, then lets the client have the end of it."""
        if ended.answer.error is not None:
            told = ended.error.detail if ended.error else "The request was refused"
            self.failure = {"message": told, **ended.answer.error}
        prefill = opened.prefill if opened else []
        lease_token = opened.turn.lease_token if opened else ""
        continued = self._request.continuation
        earlier = continued.broken_off if continued else ()
        completed = answers.completion(
            ended.answer, lease_token=lease_token, prefill=prefill, body=self._body, earlier=earlier
        )
        persisted: Persisted = "none"
        if opened is not None:
            place = (opened.key, opened.turn.turn_id)
            self.persisted = persisted = await self._parts.spool.complete(*place, completed)
            if persisted != "none":
                self.kept = Kept.of(opened.turn.session, completed)
            self._parts.event_log.note(opened.key)
        self._parts.metrics.count_tokens(completed.model, completed.usage)
        self._parts.metrics.count_cost(completed.model, completed.cost_usd)
        await self._bill.settle(spending.of(completed))
        if opened is not None and completed.status == "completed" and persisted != "none":
            account_id, usage = ended.answer.upstream.get("account"), completed.usage or {}
            pool, key = self._parts.session_pool, self._caller.key
            pool.note(key, opened.key, account_id=account_id, model=completed.model, usage=usage)
        if began is not None:
            await began.end(ended, self._delivery.whole_headers(ended, persisted))
        self._delivery.end(ended, persisted)

    # ── upstream ────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, body: dict[str, Any], opened: Opened | None) -> Ended:
        """Asks upstream and passes on what it says; every way in which that can end is an Ended."""
        parts, caller = self._parts, self._caller
        request = UpstreamRequest(MESSAGES_PATH, caller.query, caller.headers, body)
        early = asyncio.get_running_loop().call_later(parts.settings.relay_ping_seconds, self._delivery.release_early)
        try:
            async with self._interruption.watched():
                prefers = await self._preferred(opened)
                ended = await parts.asking.ask(request, self._take, prefers=prefers, on_attempt=self._on_attempt)
        except streaming.Stalled:
            return self._gave_up("client_stalled")
        except Interrupted:
            return self._gave_up("client_gone" if self._has_left else "relay_stopping")
        finally:
            early.cancel()
        if opened is not None and ended.answer.status == "completed":
            parts.affinity.note(opened.key, ended.answer.upstream["account"])
        return ended

    def _gave_up(self, reason: str) -> Ended:
        if self._attempt is None:
            return outcomes.interrupted(Assembly(), reason, Interrupted())
        ended = outcomes.interrupted(self._attempt.assembly, reason, Interrupted())
        ended.answer.upstream.update(self._attempt.source)
        return ended

    async def _preferred(self, opened: Opened | None) -> str | None:
        """The account whose prompt cache is warm: for the session, or for one who has brought none, in the pool."""
        if not self._parts.asking.pool.has_choice(self._request.model):
            return None
        if opened is None or not self._brings_session:
            return self._parts.session_pool.preferred_account
        return await self._parts.affinity.of(opened.key)

    def _on_attempt(self, attempt: Attempt) -> None:
        self._delivery.attempted(attempt.number)
        self._attempt = attempt

    async def _take(self, answer: UpstreamAnswer, attempt: Attempt) -> Ended:
        headers = outcomes.passed_headers(answer.headers)
        told = outcomes.source(answer.status, answer.headers)
        if not (self._request.stream and answer.headers.get("content-type", "").startswith(EVENT_STREAM)):
            content = await answer.read()
            return Ended(
                Answer("completed", outcomes.message_of(content), told), headers=headers, content=content, plain=content
            )

        def release() -> None:
            attempt.committed()
            self._delivery.release(headers)

        rest = await streaming.pass_on(
            answer,
            attempt.assembly,
            self._delivery.pipe,
            release=release,
            on_stall=self._on_stall,
            stalled_seconds=self._parts.settings.relay_stalled_client_seconds,
        )
        return Ended(Answer("completed", attempt.assembly.message(), told), content=rest)

    def _on_stall(self) -> None:
        """The client reads nothing: by the settings it is let go and the answer read on, or the turn interrupted."""
        if self._parts.settings.relay_on_disconnect == "cancel":
            raise streaming.Stalled
        self._delivery.let_go()
