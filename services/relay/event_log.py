"""A conversation's session and its events, kept together: messages that came by any door become events of it.

Its one invariant: every visible message of the session that `catch_up` has seen is one event, in the order of the
messages, under the message's id; what was taken back in the session is marked so.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, Final

import structlog
from pydantic import ValidationError

from services.relay import conversations, events
from services.relay.conversations import Conversation
from services.relay.event_frames import blocks_of, parts_of
from services.relay.events import NewEvent, Source
from shared import wire
from shared.canonical import speaker
from shared.database import Conn, Database
from shared.errors import ServiceError, SessionNotFound, TurnInProgress, Unavailable, ValidationFailed
from shared.session_client import SessionClient, SessionKey

log = structlog.get_logger(__name__)

_PAGE: Final = 200
_BUSY_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 0.3
_TITLE_CHARACTERS: Final = 50
_FIRST_MESSAGES: Final = 20
_SOURCES: Final[dict[str, Source]] = {"user": "user", "assistant": "agent"}


class EventLog:
    """Takes sessions' messages into the events of their conversations."""

    def __init__(self, database: Database, sessions: SessionClient) -> None:
        self._database = database
        self._sessions = sessions
        self._told: set[SessionKey] = set()

    def note(self, key: SessionKey) -> None:
        """A turn has changed this session, which may be a conversation's."""
        self._told.add(key)

    async def take_notes(self) -> None:
        """Catches up with the conversations whose sessions were noted; raises DatabaseUnavailable."""
        if not self._told:
            return
        told, self._told = self._told, set()
        try:
            found = await conversations.by_sessions(self._database, list(told))
        except Unavailable:
            self._told |= told
            raise
        for conversation in found:
            try:
                await self.settle(conversation)
            except Unavailable:
                self._told.add(conversation.session)
            except ServiceError as error:
                log.warning("conversation_not_caught_up", conversation=conversation.id, code=error.code)

    async def settle(self, conversation: Conversation) -> wire.Session | None:
        """As `catch_up`; and what waits is delivered, if the conversation does not run and its session is free."""
        session = await self.catch_up(conversation)
        if conversation.is_running:
            return session
        if session is None or not session.is_active:
            await events.wait_no_more(self._database, conversation.id)
            return session
        with suppress(TurnInProgress):
            if await self.deliver(conversation, wait_seconds=0):
                return await self.catch_up(conversation)
        return session

    async def note_waiting(self) -> None:
        """Notes the conversations in which messages wait though nothing runs: whoever took them may be gone."""
        self._told |= await events.sessions_waited_for(self._database)

    async def deliver(
        self,
        conversation: Conversation,
        *,
        wait_seconds: float = _BUSY_SECONDS,
        gives_up: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Stores the messages that wait; whether there were any. Waits so long while another turn has the session.

        Raises TurnInProgress then, or once it `gives_up`, and what else session_service says.
        """
        waiting = await events.pending(self._database, conversation.id)
        until = monotonic() + wait_seconds
        for event in waiting:
            message = new_message(event.id, event.payload)
            while True:
                try:
                    stored = await self._sessions.append_message(conversation.session, message)
                except TurnInProgress:
                    if monotonic() >= until or gives_up():
                        raise
                    await asyncio.sleep(_LOOK_SECONDS)
                else:
                    break
            if stored.superseded_at is not None:  # taken back before it was seen there: no catching up meets it
                await events.supersede(self._database, conversation.id, event.id)
        return bool(waiting)

    async def catch_up(self, conversation: Conversation) -> wire.Session | None:
        """Takes in what is new; gives the session, None where there is none. Raises what session_service says."""
        key = conversation.session
        try:
            session = await self._sessions.get_session(key)
            if session.version == conversation.logged_version:
                return session
            seq, is_last, is_answered = conversation.logged_seq, False, False
            while not is_last:
                page = (await self._sessions.list_messages(key, after_seq=seq, limit=_PAGE)).messages
                is_last = len(page) < _PAGE
                version = session.version if is_last else conversation.logged_version
                take_in = partial(_take_in, conversation_id=conversation.id, new=page, version=version)
                count, logged_seq = await self._database.transact(take_in)
                seq = page[-1].seq if page else seq
                is_answered = is_answered or any(speaker(message.role) == "assistant" for message in page)
            if count > session.message_count:
                await self._mark(conversation, count, logged_seq)
        except SessionNotFound:
            return None
        if conversation.title is None and is_answered:
            await self._name(conversation)
        return session

    async def _mark(self, conversation: Conversation, count: int, logged_seq: int) -> None:
        """Marks the messages that were taken back: as many as there are too many, looked for from the end."""
        key = conversation.session
        left, before_seq = count - (await self._sessions.get_session(key)).message_count, logged_seq + 1
        while left > 0 and before_seq > 1:
            wanted = {"before_seq": before_seq, "order": "desc", "limit": _PAGE, "include_superseded": True}
            page = (await self._sessions.list_messages(key, **wanted)).messages
            gone = [message.message_id for message in page if message.superseded_at is not None]
            left -= await self._database.transact(partial(_supersede, conversation_id=conversation.id, ids=gone))
            before_seq = page[-1].seq if page else 1

    async def _name(self, conversation: Conversation) -> None:
        """After the first answer a conversation is called by what was said first."""
        first_ones = await self._sessions.list_messages(conversation.session, page_size=_FIRST_MESSAGES)
        first = next((message.content for message in first_ones.messages if message.role == "user"), "")
        if title := _title_of(first):
            await conversations.name(self._database, conversation.id, title)


async def _take_in(conn: Conn, conversation_id: str, new: list[wire.Message], version: int) -> tuple[int, int]:
    """Gives the number of visible messages among the events, and the seq up to which they are there."""
    row = await conversations.lock(conn, conversation_id)
    unseen = [message for message in new if message.seq > row.logged_seq]
    known = await conn.rows(events.KNOWN, id=row.id, event_ids=[message.message_id for message in unseen])
    waited = {each["id"] for each in known}
    if waited:
        await conn.rows(events.ARRIVED, id=row.id, event_ids=list(waited))
    await events.append(conn, row.id, [_event(message) for message in unseen if message.message_id not in waited])
    count = row.logged_count + len(unseen)
    seq = max((message.seq for message in unseen), default=row.logged_seq)
    await conn.rows(conversations.LOGGED, id=row.id, version=max(version, row.logged_version), seq=seq, count=count)
    return count, seq


async def _supersede(conn: Conn, conversation_id: str, ids: list[str]) -> int:
    """Marks these messages; how many of them were not marked yet."""
    row = await conversations.lock(conn, conversation_id)
    marked = len(await conn.rows(events.SUPERSEDE, id=row.id, event_ids=ids))
    logged = {"version": row.logged_version, "seq": row.logged_seq, "count": row.logged_count - marked}
    await conn.rows(conversations.LOGGED, id=row.id, **logged)
    return marked


def _title_of(text: str) -> str:
    """The text's beginning in one line; cut off between words, where it has any."""
    line = " ".join(text.split())
    if len(line) <= _TITLE_CHARACTERS:
        return line
    head = line[:_TITLE_CHARACTERS].rpartition(" ")[0]
    if len(head) < _TITLE_CHARACTERS // 2:
        head = line[: _TITLE_CHARACTERS - 1]
    return head + "…"


def new_message(message_id: str, payload: dict[str, Any]) -> wire.NewMessage:
    """The session's message of an event; raises ValidationFailed for what no session can hold."""
    blocks = blocks_of(payload["content"])
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    content = texts[0] if len(blocks) == len(texts) == 1 else blocks
    try:
        return wire.NewMessage.model_validate({"role": payload["role"], "content": content, "message_id": message_id})
    except ValidationError as error:
        raise ValidationFailed.at("body", "content", msg=error.errors()[0]["msg"]) from None


def _event(message: wire.Message) -> NewEvent:
    role = speaker(message.role)
    payload = {"role": role, "content": parts_of(message.content, message.content_blocks)}
    source = _SOURCES.get(role, "environment")
    return NewEvent("message", source, payload, id=message.message_id, created_at=message.created_at)
