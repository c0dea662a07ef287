"""One turn, start to end: the only file that knows the whole order.

    session id -> turn opened, messages stored -> upstream asked -> bytes passed on -> turn completed -> last bytes

Its one invariant: a turn runs in a task of its own, which no client can cancel: whatever becomes of the client,
what upstream has given is stored, the turn is closed once, and the upstream connection is let go.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Final

import structlog

from services.relay import answers, history, leases, outcomes, prompt, session_ids, streaming
from services.relay.accounts import Account, choose
from services.relay.answers import Answer
from services.relay.assembly import Assembly
from services.relay.errors import Interrupted
from services.relay.history import Opened
from services.relay.outcomes import Ended
from services.relay.parts import Caller, Parts, Reply
from services.relay.pipe import Pipe
from services.relay.request import ClaudeRequest
from services.relay.session_ids import Choice
from services.relay.upstream import MESSAGES_PATH, UpstreamAnswer, UpstreamError, UpstreamRequest
from shared.errors import Internal, ServiceError, Unavailable

log = structlog.get_logger(__name__)

_ATTEMPTS: Final = "1"
_EVENT_STREAM: Final = "text/event-stream"


class Turn:
    """A turn that runs. `reply` is there when the answer's head may go out."""

    def __init__(self, parts: Parts, caller: Caller, request: ClaudeRequest) -> None:
        self._parts = parts
        self._caller = caller
        self._request = request
        self._started_at = monotonic()
        self._body = request.body
        self._headers = {"x-relay-attempts": "0"}
        self._pipe = Pipe()
        self._asking: asyncio.Timeout | None = None
        self._has_left = False
        self._is_interrupted = False
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._run())

    def leave(self) -> None:
        """The client has gone; by the settings the turn is interrupted, or goes on without it."""
        self._has_left = True
        self._pipe.drop()
        if self._parts.settings.relay_on_disconnect == "cancel":
            self.interrupt()

    def interrupt(self) -> None:
        """Lets go of upstream at once; what has come of the answer is stored."""
        if self._asking is not None and not self._is_interrupted:
            self._asking.reschedule(asyncio.get_running_loop().time())
        self._is_interrupted = True

    # ── the order ───────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        outcome = "rejected"
        try:
            outcome = await self._serve()
        except ServiceError as error:
            self._tell(Reply(error.status, self._headers, error=error))
        except Exception:
            log.exception("turn_fault")
            self._tell(Reply(500, self._headers, error=Internal()))
        finally:
            self._pipe.close()
            self._parts.metrics.turns.labels(outcome).inc()

    async def _serve(self) -> str:
        """Runs the turn and gives its outcome; raises a ServiceError for what ends it before upstream is asked."""
        account = choose(self._parts.accounts, self._request.model)
        choice = session_ids.choose(self._request, self._caller.headers)
        if choice is None:
            return await self._serve_in(None, account)
        try:
            async with self._session(choice) as opened:
                return await self._serve_in(opened, account)
        except Unavailable:
            if self._caller.headers.get("x-session-store") != "best-effort" or "x-turn-id" in self._headers:
                raise
        return await self._serve_in(None, account)

    @asynccontextmanager
    async def _session(self, choice: Choice) -> AsyncIterator[Opened]:
        """The turn, opened, and the session to itself until it is closed."""
        parts, sessions = self._parts, self._parts.sessions
        wishes = history.Wishes.of(self._caller.headers, parts.settings)
        array = history.Array.of(self._request.messages)
        key = await history.session_of(sessions, self._caller.key.user_id, choice, array)
        deadline = monotonic() + wishes.wait_seconds
        async with parts.lines.place(key, wait_seconds=wishes.wait_seconds):
            if self._is_interrupted:
                raise Interrupted  # nothing was stored yet, and nobody waits for an answer
            await parts.spool.settle(key)
            left_seconds = max(0.0, deadline - monotonic())
            opened = await history.open_turn(sessions, key, choice, array, wishes, wait_seconds=left_seconds)
            self._headers["x-session-id"] = session_ids.encoded(key.session_id)
            self._headers["x-turn-id"] = opened.turn.turn_id
            self._headers["x-session-persisted"] = "pending"
            structlog.contextvars.bind_contextvars(turn_id=opened.turn.turn_id)
            lease = asyncio.create_task(leases.keep(sessions, opened, parts.settings.relay_lease_seconds))
            try:
                yield opened
            finally:
                lease.cancel()

    async def _serve_in(self, opened: Opened | None, account: Account) -> str:
        if self._is_interrupted:  # nothing was asked yet: as if the request had not been
            ended = Ended(Answer("refused", error={"type": "client_gone"}), error=Interrupted())
        else:
            ended = await self._answered(account, opened)
        await self._end(ended, opened)
        return ended.answer.status

    async def _answered(self, account: Account, opened: Opened | None) -> Ended:
        """How asking upstream ended; a fault of ours too is an end that closes the turn."""
        try:
            self._body = prompt.upstream_body(self._request, opened)
            return await self._ask(account, self._body)
        except Exception:
            log.exception("turn_fault")
            return Ended(Answer("failed", error={"type": "relay_fault"}), error=Internal())

    async def _end(self, ended: Ended, opened: Opened | None) -> None:
        """Keeps what came of the turn, then lets the client have the end of it."""
        prefill = opened.prefill if opened else []
        lease_token = opened.turn.lease_token if opened else ""
        completed = answers.completion(ended.answer, lease_token=lease_token, prefill=prefill, body=self._body)
        persisted = "none"
        if opened is not None:
            persisted = await self._parts.spool.complete(opened.key, opened.turn.turn_id, completed)
        self._parts.metrics.count_tokens(completed.model, completed.usage)
        if self.reply.done():
            if ended.error is not None:
                self._pipe.put_now(streaming.error_event(ended.error, self._caller.request_id))
            self._pipe.put_now(ended.content)
            return
        headers = self._headers | ended.headers | {"x-session-persisted": persisted}
        self._tell(Reply(ended.status, headers, ended.content, ended.error))

    # ── upstream ────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, account: Account, body: dict[str, Any]) -> Ended:
        """Asks upstream and passes on what it says; every way in which that can end is an Ended."""
        caller, metrics = self._caller, self._parts.metrics
        request = UpstreamRequest(MESSAGES_PATH, caller.query, caller.headers, body)
        assembly, status, asked_at = Assembly(), "none", monotonic()
        self._headers["x-relay-attempts"] = _ATTEMPTS
        early = asyncio.get_running_loop().call_later(self._parts.settings.relay_ping_seconds, self._release_early)
        self._asking = asyncio.timeout(None)
        try:
            async with self._asking, await account.upstream.open(request) as answer:
                status = str(answer.status)
                ended = await self._take(answer, assembly)
        except UpstreamError as failure:
            status = failure.kind if status == "none" else status
            ended = outcomes.failed(failure, assembly.partial() if assembly.committed else None)
        except streaming.Stalled:
            ended = outcomes.interrupted(assembly, "client_stalled", Interrupted())
        except TimeoutError:  # of leave() or interrupt()
            reason = "client_gone" if self._has_left else "relay_stopping"
            ended = outcomes.interrupted(assembly, reason, Interrupted())
        finally:
            self._asking = None
            early.cancel()
            metrics.upstream_requests.labels(account.id, status).inc()
            metrics.upstream_duration.observe(monotonic() - asked_at)
        ended.answer.upstream.update(account=account.id, attempts=int(_ATTEMPTS))
        return ended

    async def _take(self, answer: UpstreamAnswer, assembly: Assembly) -> Ended:
        headers = outcomes.passed_headers(answer.headers)
        told = outcomes.source(answer.status, answer.headers)
        if answer.status != 200:
            return outcomes.declined(answer.status, answer.headers, await answer.read())
        if self._request.stream and answer.headers.get("content-type", "").startswith(_EVENT_STREAM):
            rest = await streaming.pass_on(
                answer,
                assembly,
                self._pipe,
                release=lambda: self._release(headers),
                on_stall=self._on_stall,
                stalled_seconds=self._parts.settings.relay_stalled_client_seconds,
            )
            return Ended(Answer("completed", assembly.message(), told), content=rest)
        content = await answer.read()
        return Ended(Answer("completed", outcomes.message_of(content), told), headers=headers, content=content)

    # ── the client ──────────────────────────────────────────────────────────────────────────────

    def _release_early(self) -> None:
        """Upstream says nothing for long: a stream's head goes out, with a ping, before there is an answer."""
        if self._request.stream and not self.reply.done():
            self._pipe.put_now(streaming.PING)
            self._release({})

    def _release(self, headers: dict[str, str]) -> None:
        """Lets a stream's head go out."""
        own = {
            "content-type": f"{_EVENT_STREAM}; charset=utf-8",
            "cache-control": "no-cache",
            "request-id": self._caller.request_id,
        }
        persisted = {"x-session-persisted": self._headers.get("x-session-persisted", "none")}
        self._tell(Reply(200, own | self._headers | headers | persisted, self._pipe))

    def _on_stall(self) -> None:
        """The client reads nothing: by the settings it is let go and the answer read on, or the turn interrupted."""
        if self._parts.settings.relay_on_disconnect == "cancel":
            raise streaming.Stalled
        self._pipe.cut(streaming.error_event(Interrupted(), self._caller.request_id))

    def _tell(self, reply: Reply) -> None:
        if self.reply.done():
            if reply.error is not None:
                self._pipe.put_now(streaming.error_event(reply.error, self._caller.request_id))
            return
        self._parts.metrics.first_byte.observe(monotonic() - self._started_at)
        self.reply.set_result(reply)
