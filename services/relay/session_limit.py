"""How many sessions are active, and whether there may be one more.

Its one invariant: with one relay, and near the limit, a session counts from the moment `check` has let it in until
it is closed, or its turn did not open.

The store's count may be some seconds old. It is lined up with what this relay did in those seconds: of all the
moments that the count may be of, the one holds that agrees best with what was known before. So nothing that this
relay did is counted twice; what others did (other relays, expiry) is seen a few seconds late, and for so long the
limit is too strict or too lenient by that.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from math import inf
from time import monotonic
from typing import Final

import structlog

from services.relay.errors import TooManySessions
from shared import wire
from shared.errors import ServiceError, SessionNotFound
from shared.session_client import SessionClient, SessionKey

log = structlog.get_logger(__name__)

# Within so many of the limit the store is asked whether a session is active already; before, a guess will do.
_NEAR: Final = 100
_MOST_CHANGES: Final = 10_000
_RETRY_SECONDS: Final = 5.0
# When a turn has made its session, that was written three times: made, its messages appended, the turn held.
_WRITES_OF_FIRST_TURN: Final = 3
_JUST_NOW: Final = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Times:
    """How often the store is asked, for how long its answer is fresh, how long it may take, and how old it may be.

    That is five seconds by the contract, and one for the sums that session_service makes beside its requests.
    """

    count_seconds: float = 5.0
    fresh_seconds: float = 1.0
    longest_call_seconds: float = 2.0
    oldest_seconds: float = 6.0


_USUAL: Final = Times()


class SessionLimit:
    """The active sessions of the whole store, as far as this relay knows."""

    def __init__(self, sessions: SessionClient, *, max_sessions: int, times: Times = _USUAL) -> None:
        self.max = max_sessions
        self._sessions = sessions
        self._times = times
        self._active: int | None = None
        self._changes: deque[tuple[float, int]] = deque(maxlen=_MOST_CHANGES)
        # Let in, and not open yet; True: certainly not active before, so it is counted in _active already.
        self._opening: dict[SessionKey, bool] = {}
        self._asking = asyncio.Lock()
        self._answered_at = -inf

    @property
    def active(self) -> int | None:
        """How many are active, those that are being made included; None while the store has never said."""
        return None if self._active is None else max(0, self._active)

    async def keep_counting(self) -> None:
        """Asks the store for ever; while it is away, the last known number stays."""
        while True:
            await self._ask()
            await asyncio.sleep(self._times.count_seconds)

    async def check(self, key: SessionKey, *, is_new: bool) -> None:
        """Lets a turn in this session go on; raises TooManySessions when that would make one session too many.

        Calls nobody while there is ample room; near the limit it raises what session_service says. What it lets in
        takes up room until `opened` or `leave`: one of them must follow.
        """
        if key in self._opening:
            return
        if self._active is None:
            await self._ask()
        if not is_new and self._left() <= _NEAR:
            if await self._goes_on(key):
                return
            is_new = True
        if self._left() <= 0:
            await self._ask()
            if self._left() <= 0:
                raise TooManySessions(retry_after_seconds=_RETRY_SECONDS)
        self.leave(key)  # of another request, which came in between
        self._opening[key] = is_new
        if is_new:
            self._change(1)

    def opened(self, session: wire.Session) -> None:
        """A turn was opened: the session counts, if the turn has made it or brought it back."""
        is_counted = self._opening.pop(SessionKey(session.user_id, session.session_id), False)
        if not is_counted and _was_made_just_now(session):
            self._change(1)

    def leave(self, key: SessionKey) -> None:
        """The turn did not open, so that its session does not count; after `opened` this does nothing."""
        if self._opening.pop(key, False):
            self._change(-1)

    def closed(self) -> None:
        """An active session has ended."""
        self._change(-1)

    def _left(self) -> int:
        """How many more there may be, as if every turn that is not open yet made a session."""
        return self.max - (self._active or 0) - sum(not is_counted for is_counted in self._opening.values())

    def _change(self, by: int) -> None:
        self._changes.append((monotonic(), by))
        if self._active is not None:
            self._active += by

    async def _goes_on(self, key: SessionKey) -> bool:
        """Whether a turn makes no session active here: this one is, or is one that the store refuses by itself."""
        try:
            return (await self._sessions.get_session(key)).status != "ended"
        except SessionNotFound:
            return False

    async def _ask(self) -> None:
        """Asks the store, unless its last answer is fresh; who comes meanwhile waits for that answer."""
        async with self._asking:
            if monotonic() - self._answered_at < self._times.fresh_seconds:
                return
            asked_at = monotonic()
            try:
                async with asyncio.timeout(self._times.longest_call_seconds):
                    self._line_up((await self._sessions.get_stats()).active_sessions, asked_at)
            except (ServiceError, TimeoutError) as error:
                log.warning("active_sessions_not_told", error=type(error).__name__)
            finally:
                self._answered_at = monotonic()

    def _line_up(self, counted: int, asked_at: float) -> None:
        while self._changes and self._changes[0][0] < asked_at - self._times.oldest_seconds:
            self._changes.popleft()
        # Since the count was made there was none of the changes, the last one, the last two … or all of them.
        possible = list(accumulate((by for _, by in reversed(self._changes)), initial=counted))
        known = max(possible) if self._active is None else self._active
        self._active = min(max(known, min(possible)), max(possible))


def _was_made_just_now(session: wire.Session) -> bool:
    """Whether the turn that gave this session has made it, as far as one can tell; a restarted one is not seen."""
    is_young = session.updated_at - session.created_at < _JUST_NOW
    return is_young and session.version <= _WRITES_OF_FIRST_TURN
