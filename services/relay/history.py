"""Lines a client's message array up with the stored conversation, and opens the turn that follows from it.

Its one invariant: after `open_turn` what is visible of the session is exactly the conversation as its client sees
it, up to the message that asks. Clients send either only what is new or everything again:

- a named session and no assistant message in the array: it is new, and the stored context goes before it;
- else what agrees with the stored beginning stays, what is stored beyond that is taken back (rewound), and the
  rest of the array is appended. That covers a history that goes on, an answer asked for again, an edited message.
  It happens only to the version of the session that was looked at.

Messages of the assistant at the array's end are a prefill: no message of their own, but the answer's beginning.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import structlog
from pydantic import ValidationError

from services.relay.assembly import storable
from services.relay.errors import HistoryConflict, InvalidRequest
from services.relay.session_ids import Choice
from services.relay.settings import RelaySettings
from shared import wire
from shared.canonical import message_hash
from shared.errors import (
    SessionExists,
    SessionNotActive,
    SessionNotFound,
    TurnInProgress,
    VersionMismatch,
)
from shared.session_client import SessionClient, SessionKey

log = structlog.get_logger(__name__)

_LEAST_TRIES: Final = 5
_SIDE_ID_CHARACTERS: Final = 200
_SIDE_HASH_DIGITS: Final = 12
_BUSY_SECONDS: Final = 1.0
_BEYOND: Final = 100
# Whole arrays go upstream as they are; the store must not refuse one for the size of its own context.
_NO_BUDGET: Final = wire.ContextOptions(max_tokens=2**31 - 1)

REPLACED: Final = {"replaced_characters": True}
"""Metadata of a stored message in which U+FFFD stands for characters that cannot be stored."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A client's message in the form in which it can be stored; `place` is its index in the array."""

    place: int
    role: str
    content: Any
    replaced: bool

    @property
    def hash(self) -> str:
        return message_hash(self.role, self.content).hex()

    def new_message(self) -> wire.NewMessage:
        """Raises InvalidRequest for what no conversation can hold."""
        try:
            return wire.NewMessage.model_validate(
                {
                    "role": self.role,
                    "content": self.content,
                    "message_type": "system" if self.role == "system" else None,
                    "metadata": REPLACED if self.replaced else None,
                }
            )
        except ValidationError as error:
            raise InvalidRequest.at(f"messages.{self.place}.content", error.errors()[0]["msg"]) from None


@dataclass(frozen=True, slots=True)
class Array:
    """A client's messages without the prefill; `spoken` are those that histories are lined up by.

    `holds_answers`: there is a message of the assistant among them, a prefill included.
    """

    messages: list[Kept]
    spoken: list[Kept]
    prefill: list[dict[str, Any]]
    holds_answers: bool

    @classmethod
    def of(cls, messages: list[dict[str, Any]]) -> "Array":
        count = len(messages)
        while messages[count - 1]["role"] == "assistant":
            count -= 1
        kept = []
        for place, message in enumerate(messages[:count]):
            content, replaced = storable(message["content"])
            kept.append(Kept(place, message["role"], content, replaced))
        spoken = [each for each in kept if each.role != "system"]
        prefill = [block for each in messages[count:] for block in blocks_of(each["content"])]
        return cls(kept, spoken, prefill, any(message["role"] == "assistant" for message in messages))

    def hashes(self) -> list[str]:
        return [each.hash for each in self.spoken]

    def after(self, matched: int) -> list[Kept]:
        """The messages that follow the first `matched` spoken ones."""
        return self.messages[self.spoken[matched - 1].place + 1 :] if matched else self.messages


def blocks_of(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a caller wants its session treated, and what the settings say of all of them."""

    wait_seconds: float
    rejects_conflicts: bool
    lease_seconds: int
    idle_seconds: int
    resumes_expired: bool

    @classmethod
    def of(cls, headers: Mapping[str, str], settings: RelaySettings) -> "Wishes":
        conflict = headers.get("x-session-conflict", "rewind")
        if conflict not in {"rewind", "reject"}:
            raise InvalidRequest.at("X-Session-Conflict", "must be rewind or reject")
        rejects_busy = headers.get("x-session-busy") == "reject"
        return cls(
            wait_seconds=0 if rejects_busy else settings.relay_session_wait_seconds,
            rejects_conflicts=conflict == "reject",
            lease_seconds=settings.relay_lease_seconds,
            idle_seconds=settings.relay_session_idle_seconds,
            resumes_expired=settings.relay_expired_sessions == "resume",
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """An open turn. `is_whole`: the array is the whole conversation, and nothing goes before it."""

    key: SessionKey
    turn: wire.TurnOpened
    array: Array
    is_whole: bool

    @property
    def prefill(self) -> list[dict[str, Any]]:
        return self.array.prefill


@dataclass(frozen=True, slots=True)
class _Plan:
    """What opening the turn does; `version` is the one of the session that the plan was made for."""

    new: list[Kept]
    rewind_to_seq: int | None = None
    if_exists: wire.IfExists = "return"
    version: int | None = None

    def request(self, wishes: Wishes, context: wire.ContextOptions | None, wait_seconds: float) -> wire.OpenTurn:
        return wire.OpenTurn(
            messages=[each.new_message() for each in self.new],
            rewind_to_seq=self.rewind_to_seq,
            create_session=wire.CreateSessionInTurn(if_exists=self.if_exists, idle_timeout_seconds=wishes.idle_seconds),
            context=context,
            lease_seconds=wishes.lease_seconds,
            wait_seconds=wait_seconds,
        )


async def session_of(sessions: SessionClient, user_id: str, choice: Choice, array: Array) -> SessionKey:
    """The chosen session; for a client's side conversation under an implied id, a side session of its own."""
    key = SessionKey(user_id, choice.session_id)
    if choice.kind != "implied":
        return key
    if choice.agent_id is not None:
        return SessionKey(user_id, _side_id(choice.session_id, choice.agent_id))
    first = array.spoken[0].hash
    try:
        if (await sessions.align(key, [first])).matched or not (await sessions.get_session(key)).message_count:
            return key
    except SessionNotFound:
        return key
    return SessionKey(user_id, _side_id(choice.session_id, first[:_SIDE_HASH_DIGITS]))


def _side_id(session_id: str, part: str) -> str:
    if len(session_id) > _SIDE_ID_CHARACTERS:
        session_id = hashlib.sha256(session_id.encode()).hexdigest()
    return f"{session_id}~{part}"


async def open_turn(
    sessions: SessionClient, key: SessionKey, choice: Choice, array: Array, wishes: Wishes, *, wait_seconds: float
) -> Opened:
    """The turn, open, its messages stored. Raises InvalidRequest, HistoryConflict, and what session_service says."""
    is_whole = choice.kind != "named" or array.holds_answers
    context = _NO_BUDGET if is_whole else None
    deadline = monotonic() + wait_seconds
    tries = 0
    while tries < _LEAST_TRIES or monotonic() < deadline:
        tries += 1
        if is_whole and choice.kind != "fresh":
            plan = await _lined_up(sessions, key, array, rejects_conflicts=wishes.rejects_conflicts)
        else:
            plan = _Plan(array.messages)
        try:
            request = plan.request(wishes, context, max(0.0, deadline - monotonic()))
            return Opened(key, await sessions.open_turn(key, request, if_match=plan.version), array, is_whole)
        except (SessionExists, VersionMismatch, SessionNotActive) as error:
            # Somebody else wrote since it was looked at, or it has ended: what is to be done is another thing now.
            log.info("history_moved", code=error.code)
            await _revive_if_ended(sessions, key, wishes)
    raise TurnInProgress("Other requests keep changing this session", retry_after_seconds=_BUSY_SECONDS)


async def _lined_up(sessions: SessionClient, key: SessionKey, array: Array, *, rejects_conflicts: bool) -> _Plan:
    try:
        aligned = await sessions.align(key, array.hashes())
    except SessionNotFound:
        return _Plan(array.messages, if_exists="error")
    if rejects_conflicts and aligned.matched < len(array.spoken):
        beyond = await sessions.list_messages(key, after_seq=aligned.seq, limit=_BEYOND)
        if any(message.role != "system" for message in beyond.messages):
            raise HistoryConflict
    return _Plan(array.after(aligned.matched), rewind_to_seq=aligned.seq, version=aligned.version)


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
