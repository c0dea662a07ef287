"""What this process remembers of the sessions whose turns it opened and completed last, so that their next turn need
not read what it has just written.

Its one invariant: it is never believed. A turn is opened by a statement that stores nothing unless the session has
still the version and the times that are remembered; what is out of date costs a round trip, and nothing else.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from services.session_service.drafts import Draft
from services.session_service.recent import Stretch, stretch_of
from services.session_service.sessions import Detail
from shared import wire

_MOST_CHARACTERS: Final = 16 * 2**20
"""Of all sessions together."""
_LARGE_CHARACTERS: Final = 2**20
"""A session beyond this is read each time: what is saved is little beside what its context takes."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Known:
    """A session as a turn has left it, with everything visible from its window's start on."""

    found: Detail
    stretch: Stretch

    @property
    def key(self) -> Key:
        return self.found.session.user_id, self.found.session.session_id

    def completed(self, session: wire.Session, drafts: Sequence[Draft]) -> "Known | None":
        """The same after its turn was completed, and has become `session`; None where anything else happened to it."""
        if session.version != self.found.session.version + 1 + min(1, len(drafts)):
            return None
        last_seq = self.found.last_seq
        found = replace(self.found, session=session, last_seq=last_seq + len(drafts), lease_left_seconds=None)
        return Known(found, self.stretch.followed_by(stretch_of(drafts, last_seq)))


class KnownSessions:
    """The sessions known, as many as `most`; those used longest ago are forgotten first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[Key, tuple[Known, int]] = OrderedDict()
        self._characters = 0

    def get(self, key: Key) -> Known | None:
        known, _ = self._known.get(key, (None, 0))
        return known

    def put(self, known: Known) -> None:
        self.forget(known.key)
        session, pieces = known.found.session, [*known.stretch.pieces.values(), *known.stretch.system]
        characters = _characters([session.metadata, session.conversation_data, session.session_summary])
        characters += sum(_characters(piece.content) for piece in pieces)
        if characters > _LARGE_CHARACTERS:
            return
        self._known[known.key] = known, characters
        self._characters += characters
        while len(self._known) > self._most or self._characters > _MOST_CHARACTERS:
            self.forget(next(iter(self._known)))

    def forget(self, key: Key) -> None:
        _, characters = self._known.pop(key, (None, 0))
        self._characters -= characters

    def forget_user(self, user_id: str) -> None:
        for key in [key for key in self._known if key[0] == user_id]:
            self.forget(key)


def _characters(value: Any) -> int:
    """How long all texts in there are together; names and numbers count a little."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(8 + _characters(each) for each in value.values())
    if isinstance(value, list):
        return sum(map(_characters, value))
    return 8
