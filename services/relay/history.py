"""Lines a client's message array up with the stored conversation, and opens the turn that follows from it.

Its one invariant: after `open_turn` what is visible of the session is exactly the conversation as its client sees
it, up to the message that asks. Clients send either only what is new or everything again:

- a named session and no assistant message in the array: it is new, and the stored context goes before it;
- else what agrees with the stored beginning stays, what is stored beyond that is taken back (rewound), and the
  rest of the array is appended. That covers a history that goes on, an answer asked for again, an edited message.
  It happens only to the version of the session that was looked at.
- where the array departs from what is stored, the caller may want a fork instead: the session stays as it is, and
  the turn opens in a new one that begins with what agrees.

Messages of the assistant at the array's end are a prefill: no message of their own, but the answer's beginning.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Final, Literal

import structlog
from pydantic import TypeAdapter, ValidationError
from uuid_utils import uuid7

from services.relay.arrays import Array, Kept
from services.relay.errors import HistoryConflict, InvalidRequest
from services.relay.idempotency import Earlier
from services.relay.replays import rewind_for
from services.relay.request import Continuation
from services.relay.session_ids import Choice
from services.relay.settings import RelaySettings
from services.relay.sides import holds_another, side_of
from shared import wire
from shared.errors import (
    SessionExists,
    SessionNotActive,
    SessionNotFound,
    TurnInProgress,
    VersionMismatch,
)
from shared.session_client import SessionClient, SessionKey
from shared.values import Limits

log = structlog.get_logger(__name__)

MOST_NEW: Final = Limits().turn_messages
_LEAST_TRIES: Final = 5
_BUSY_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 0.05
_BEYOND: Final = 100
# Whole arrays go upstream as they are; the store must not refuse one for the size of its own context.
_NO_BUDGET: Final = wire.ContextOptions(max_tokens=2**31 - 1)

OnConflict = Literal["rewind", "fork", "reject"]
_ON_CONFLICT: Final[TypeAdapter[OnConflict]] = TypeAdapter(OnConflict)


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a caller wants its session treated, and what the settings say of all of them."""

    wait_seconds: float
    on_conflict: OnConflict
    lease_seconds: int
    idle_seconds: int
    resumes_expired: bool

    def that_rewind(self) -> "Wishes":
        return replace(self, on_conflict="rewind")

    @classmethod
    def of(cls, headers: Mapping[str, str], settings: RelaySettings) -> "Wishes":
        try:
            on_conflict = _ON_CONFLICT.validate_python(headers.get("x-session-conflict", "rewind"))
        except ValidationError:
            raise InvalidRequest.at("X-Session-Conflict", "must be rewind, fork or reject") from None
        rejects_busy = headers.get("x-session-busy") == "reject"
        return cls(
            wait_seconds=0 if rejects_busy else settings.relay_session_wait_seconds,
            on_conflict=on_conflict,
            lease_seconds=settings.relay_lease_seconds,
            idle_seconds=settings.relay_session_idle_seconds,
            resumes_expired=settings.relay_expired_sessions == "resume",
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """An open turn. `is_whole`: the array is the whole conversation, and nothing goes before it.

    `key` is the session that it is open in: the one that was asked for, or a fork of it.
    """

    key: SessionKey
    turn: wire.TurnOpened
    array: Array
    is_whole: bool

    @property
    def prefill(self) -> list[dict[str, Any]]:
        return self.array.prefill

    def let_go(self) -> None:
        """Drops what only the request to upstream is made of: a stream may run for minutes, and many do at once."""
        turn, session, receipt = self.turn, self.turn.session, self.turn.context.receipt
        turn.messages.clear()
        turn.context.messages.clear()
        kept: dict[str, Any] = {"message_count": session.message_count, "summary_to_seq": session.summary_to_seq}
        turn.session = wire.Session.model_construct(**kept)
        kept = {"left_out": receipt.left_out}
        turn.context.receipt = wire.Receipt.model_construct(**kept)
        self.array.messages.clear()
        self.array.spoken.clear()


@dataclass(frozen=True, slots=True)
class _Plan:
    """What opening the turn does; `version` is the one of the session that the plan was made for.

    With `fork_at_seq` it is done in a fork of the session up to there, with `aside` in that session instead.
    """

    new: list[Kept]
    rewind_to_seq: int | None = None
    if_exists: wire.IfExists = "return"
    version: int | None = None
    fork_at_seq: int | None = None
    aside: SessionKey | None = None

    def request(self, wishes: Wishes, context: wire.ContextOptions | None, wait_seconds: float) -> wire.OpenTurn:
        """Raises InvalidRequest for more messages than a turn can bring, or one that no conversation can hold."""
        if len(self.new) > MOST_NEW:
            raise InvalidRequest.at("messages", f"{len(self.new)} of them are new, {MOST_NEW} at most can be")
        return wire.OpenTurn(
            messages=[each.new_message() for each in self.new],
            rewind_to_seq=self.rewind_to_seq,
            create_session=wire.CreateSessionInTurn(if_exists=self.if_exists, idle_timeout_seconds=wishes.idle_seconds),
            context=context,
            lease_seconds=wishes.lease_seconds,
            wait_seconds=wait_seconds,
        )


@dataclass(frozen=True, slots=True)
class Opening:
    """A turn to be opened in the session `key`, in place of the `earlier` one where there was one.

    `announce` hears of the session and the turn's id before it is opened.
    """

    key: SessionKey
    choice: Choice
    array: Array
    wishes: Wishes
    continuation: Continuation | None = None
    earlier: Earlier | None = None
    announce: Callable[[SessionKey, str], Awaitable[None]] | None = None

    @property
    def is_whole(self) -> bool:
        return self.choice.kind in {"implied", "fresh"} or self.array.holds_answers

    @property
    def is_main_of_implied(self) -> bool:
        """Whether a conversation that begins differently does not belong into this session."""
        return self.choice.kind == "implied" and self.key.session_id == self.choice.session_id


async def open_turn(sessions: SessionClient, opening: Opening, *, wait_seconds: float) -> Opened:
    """The turn, open, its messages stored; in a fork of the session where the array departs and `wishes` want one.

    Raises InvalidRequest, HistoryConflict, and what session_service says.
    """
    key, wishes = opening.key, opening.wishes
    context = _NO_BUDGET if opening.is_whole else None
    deadline = monotonic() + wait_seconds
    tries = 0
    while tries < _LEAST_TRIES or monotonic() < deadline:
        tries += 1
        plan = await _plan(sessions, opening)
        left_seconds = max(0.0, deadline - monotonic())
        if plan.aside is not None:
            return await open_turn(sessions, replace(opening, key=plan.aside), wait_seconds=left_seconds)
        request = plan.request(wishes, context, left_seconds)
        if plan.fork_at_seq is not None:
            if opening.earlier is not None and opening.earlier.session_id != key.session_id:
                # The fork of the earlier try, which others may know: in there the caller's wishes hold as they are.
                there = replace(opening, key=SessionKey(key.user_id, opening.earlier.session_id))
                return await open_turn(sessions, there, wait_seconds=left_seconds)
            fork = await sessions.fork_session(key, wire.Fork(at_seq=plan.fork_at_seq))
            # Lined up anew, because the session may have been rewound meanwhile. Nobody else knows the fork yet:
            # whatever is taken back there is taken from nobody.
            there = replace(opening, key=SessionKey(key.user_id, fork.session_id), wishes=wishes.that_rewind())
            return await open_turn(sessions, there, wait_seconds=left_seconds)
        if opening.announce is not None:
            turn_id = str(uuid7())
            request = request.model_copy(update={"turn_id": turn_id})
            await opening.announce(key, turn_id)
        try:
            turn = await sessions.open_turn(key, request, if_match=plan.version)
            return Opened(key, turn, opening.array, opening.is_whole)
        except TurnInProgress:
            # An instance of the store that stops sends away who waits at it; another one takes them in.
            if monotonic() >= deadline:
                raise
            await asyncio.sleep(_AGAIN_SECONDS)
        except (SessionExists, VersionMismatch, SessionNotActive) as error:
            # Somebody else wrote since it was looked at, or it has ended: what is to be done is another thing now.
            log.info("history_moved", code=error.code)
            if opening.continuation is not None:
                raise
            await _revive_if_ended(sessions, key, wishes)
    raise TurnInProgress("Other requests keep changing this session", retry_after_seconds=_BUSY_SECONDS)


async def _plan(sessions: SessionClient, opening: Opening) -> _Plan:
    if (continued := opening.continuation) is not None:
        return _Plan([], rewind_to_seq=continued.rewind_to_seq, version=continued.version)
    if opening.is_whole and opening.choice.kind != "fresh":
        return await _lined_up(sessions, opening)
    new = opening.array.messages
    if opening.earlier is None:
        return _Plan(new)
    try:
        version = (await sessions.get_session(opening.key)).version
    except SessionNotFound:
        return _Plan(new)
    to_seq = await rewind_for(sessions, opening.key.user_id, opening.earlier)
    return _Plan(new, rewind_to_seq=to_seq, version=version)


async def _lined_up(sessions: SessionClient, opening: Opening) -> _Plan:
    """Raises HistoryConflict where the array departs from what is stored and that is to be refused."""
    key, array, on_conflict = opening.key, opening.array, opening.wishes.on_conflict
    try:
        aligned = await sessions.align(key, array.hashes())
    except SessionNotFound:
        return _Plan(array.messages, if_exists="error")
    new = array.after(aligned.matched)
    if not aligned.matched and opening.is_main_of_implied and await holds_another(sessions, key):
        return _Plan(new, aside=side_of(key, array.first))  # another relay was asked at the same time
    if on_conflict != "rewind" and aligned.matched < len(array.spoken) and await _goes_on(sessions, key, aligned.seq):
        if on_conflict == "reject":
            raise HistoryConflict
        return _Plan(new, fork_at_seq=aligned.seq)
    return _Plan(new, rewind_to_seq=aligned.seq, version=aligned.version)


async def _goes_on(sessions: SessionClient, key: SessionKey, seq: int) -> bool:
    """Whether more is stored of the conversation after this seq."""
    beyond = await sessions.list_messages(key, after_seq=seq, limit=_BEYOND)
    return any(message.role != "system" for message in beyond.messages)


async def _revive_if_ended(sessions: SessionClient, key: SessionKey, wishes: Wishes) -> None:
    """Makes an ended session active again; raises SessionNotActive for one that was completed or archived."""
    session = await sessions.get_session(key)
    if session.status == "active":
        return
    if session.status != "ended":
        raise SessionNotActive
    resumes = wishes.resumes_expired and session.ended_reason == "expired"
    await sessions.create_session(
        wire.CreateSession(
            user_id=key.user_id,
            session_id=key.session_id,
            if_exists="resume" if resumes else "restart",
            idle_timeout_seconds=wishes.idle_seconds,
        )
    )
