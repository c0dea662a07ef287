"""A request with an Idempotency-Key, from its beginning to its end.

Its one invariant: a key that was taken is given up on every way out: with the answer, or for the next one to run.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from services.relay import idempotency, replays
from services.relay.arrays import Array
from services.relay.idempotency import Earlier, Idempotency, Replay, Try
from services.relay.outcomes import Ended
from services.relay.parts import Caller, Parts
from services.relay.request import ClaudeRequest
from services.relay.session_ids import Choice, encoded
from services.relay.upstream import encode_body
from shared.session_client import SessionKey

_KEPT_HEADERS: tuple[str, ...] = ("x-session-id", "x-turn-id", "x-session-persisted", "request-id")


@dataclass(slots=True)
class Once:
    """The try that runs; it takes the place of the turn `earlier` (`opened_last`, once the store was asked)."""

    records: Idempotency
    a_try: Try
    opened_last: Earlier | None = field(default=None)
    is_over: bool = field(default=False)

    @property
    def earlier(self) -> Earlier | None:
        return self.opened_last or self.a_try.earlier

    def in_session(self, choice: Choice) -> Choice:
        """The session of the earlier try, where this one would get a fresh one."""
        if self.earlier is not None and choice.kind == "fresh":
            return replace(choice, session_id=self.earlier.session_id)
        return choice

    async def opening(self, key: SessionKey, turn_id: str) -> None:
        """Remembers the turn before it is opened; raises IdempotencyInProgress when another try has taken over."""
        await self.records.opening(self.a_try, key.session_id, turn_id)

    async def end(self, ended: Ended, headers: dict[str, str]) -> None:
        """Keeps a completed answer, or gives the key up, before the client hears the end: it may try again at once."""
        if ended.answer.status == "completed" and ended.answer.message is not None:
            message = ended.plain or encode_body(ended.answer.message)
            await self.complete({name: headers[name] for name in _KEPT_HEADERS if name in headers}, message)
        await self.give_up()

    async def complete(self, headers: dict[str, str], message: bytes) -> None:
        self.is_over = True
        await self.records.completed(self.a_try, headers, message)

    async def give_up(self) -> None:
        """Lets the next one with the key run, unless this try is over."""
        if not self.is_over:
            self.is_over = True
            await self.records.failed(self.a_try)


@asynccontextmanager
async def began(
    parts: Parts, caller: Caller, request: ClaudeRequest, choice: Choice | None
) -> AsyncIterator[Once | Replay | None]:
    """The try, or the answer that the key was given before; None for a request without a key.

    Raises InvalidRequest, IdempotencyKeyReused, IdempotencyInProgress, DatabaseUnavailable.
    """
    key = idempotency.header_of(caller.headers)
    if key is None:
        yield None
        return
    records, user_id = parts.idempotency, caller.key.user_id
    named = "" if choice is None or choice.kind == "fresh" else choice.session_id
    a_try = await records.begin(user_id, key, idempotency.request_hash(_asked(request), named))
    if isinstance(a_try, Replay):
        yield a_try
        return
    once = Once(records, a_try)
    try:
        async with records.kept(a_try):
            yield await _answered_before(parts, user_id, once, request) or once
    finally:
        await once.give_up()


def _asked(request: ClaudeRequest) -> dict[str, object]:
    """The body, however the answer is to come: it is given again as JSON or as a stream."""
    return {name: value for name, value in request.body.items() if name != "stream"}


async def _answered_before(parts: Parts, user_id: str, once: Once, request: ClaudeRequest) -> Replay | None:
    """The answer of an earlier try that was completed, but could not say so on the record."""
    if once.earlier is None:
        return None
    session = SessionKey(user_id, once.earlier.session_id)
    await parts.spool.settle(session)
    once.opened_last = await replays.opened_last(parts.sessions, user_id, once.earlier)
    prefill = Array.of(request).prefill
    message = await replays.earlier_answer(parts.sessions, user_id, once.earlier, prefill=prefill)
    if message is None:
        return None
    headers = {
        "x-session-id": encoded(session.session_id),
        "x-turn-id": once.earlier.turn_id,
        "x-session-persisted": "yes",
    }
    await once.complete(headers, message)
    return Replay(headers, message)
