"""Side conversations of clients that send a session id of their own accord: which session each of them has.

Its one invariant: under one implied id, conversations that begin with different messages are kept in different
sessions, also when they begin at the same time.
"""

import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

from services.relay.session_ids import Choice, keeps_rules
from shared.errors import SessionNotFound
from shared.session_client import SessionClient, SessionKey

_LONGEST_CHARACTERS: Final = 200
_HASH_DIGITS: Final = 12


@dataclass(slots=True)
class _Beginning:
    first: str
    people: int = 0


class Sides:
    """The conversations under implied ids that this relay serves now, by the hash of their first message."""

    def __init__(self, sessions: SessionClient) -> None:
        self._sessions = sessions
        self._served: dict[SessionKey, _Beginning] = {}

    @asynccontextmanager
    async def session_of(self, user_id: str, choice: Choice, first: str) -> AsyncIterator[SessionKey]:
        """The chosen session; for a client's side conversation under an implied id, a side session of its own.

        `first` is the hash of the first message. While inside, nobody who begins differently is given the same one.
        """
        key = SessionKey(user_id, choice.session_id)
        if choice.kind != "implied":
            yield key
        elif choice.agent_id is not None:
            yield SessionKey(user_id, _side_id(choice.session_id, choice.agent_id))
        else:
            is_main = await self._begins(key, first)
            with self._serving(key, first) as is_first:
                yield key if is_main and is_first else side_of(key, first)

    async def _begins(self, key: SessionKey, first: str) -> bool:
        try:
            return bool((await self._sessions.align(key, [first])).matched) or not await holds_another(
                self._sessions, key
            )
        except SessionNotFound:
            return True

    @contextmanager
    def _serving(self, key: SessionKey, first: str) -> Iterator[bool]:
        beginning = self._served.setdefault(key, _Beginning(first))
        if beginning.first != first:
            yield False
            return
        beginning.people += 1
        try:
            yield True
        finally:
            beginning.people -= 1
            if not beginning.people:
                del self._served[key]


async def holds_another(sessions: SessionClient, key: SessionKey) -> bool:
    """Whether the session, none of whose messages a conversation begins with, is another one's.

    One that its user has closed is nobody's: it begins anew. Raises SessionNotFound.
    """
    session = await sessions.get_session(key)
    return bool(session.message_count) and session.ended_reason != "user"


def side_of(key: SessionKey, first: str) -> SessionKey:
    """The side session of a conversation that begins with the message of this hash."""
    return SessionKey(key.user_id, _side_id(key.session_id, first[:_HASH_DIGITS]))


def _side_id(session_id: str, part: str) -> str:
    """A part that no id can hold, or only a very long one, is replaced by its hash, as a very long session id is."""
    if len(session_id) > _LONGEST_CHARACTERS:
        session_id = hashlib.sha256(session_id.encode()).hexdigest()
    side_id = f"{session_id}~{part}"
    return side_id if keeps_rules(side_id) else f"{session_id}~{hashlib.sha256(part.encode()).hexdigest()}"
