"""When the rounds of news are made: in small bites, all the time.

Its one invariant: nothing waits longer for lack of rest: a pass over all news that is late goes on without any.
"""

import asyncio
from time import monotonic

import structlog

from services.session_service.news import FIRST, Key, Round, see_to_news
from shared.database import Database
from shared.errors import Unavailable

log = structlog.get_logger(__name__)


async def keep_up(database: Database, *, interval_seconds: float) -> None:
    """Sees to what is new, for ever; an outage of the database, or a fault of ours, only delays it.

    Once in each interval it passes over all sessions that have news. The rounds of a pass are spread over the interval,
    so that requests meet a little of this work all the time and never much of it; a pass that is late goes on at once.
    """
    pace = Pace(interval_seconds, monotonic())
    after = FIRST
    is_behind = False
    while True:
        last, has_more = await _round(database, after)
        is_behind |= has_more
        await asyncio.sleep(pace.pause_seconds(monotonic(), is_over=last is None and not is_behind))
        is_behind &= last is not None
        after = last or FIRST


async def _round(database: Database, after: Key) -> Round:
    try:
        return await see_to_news(database, after)
    except Unavailable as error:
        log.warning("news_delayed", reason=error.code)
    except Exception:  # whatever it is, search and sums must not stop for good
        log.exception("news_failed")
    return Round(None, is_behind=False)


class Pace:
    """How long to rest after each round, so that a pass of as many as the last one takes the interval.

    A pass that has more of them than the last one does without rests once the interval is over.
    """

    def __init__(self, interval_seconds: float, now: float) -> None:
        self._interval_seconds = interval_seconds
        self._expected = 1
        self._rounds = 0
        self._pass_began = self._round_began = now

    def pause_seconds(self, now: float, *, is_over: bool) -> float:
        """After a round that ended `now`; `is_over` says that it was the last of its pass."""
        self._rounds += 1
        until = self._pass_began + self._interval_seconds
        if not is_over:
            until = min(until, self._round_began + self._interval_seconds / self._expected)
        pause = max(0.0, until - now)
        self._round_began = now + pause
        if is_over:
            self._pass_began, self._expected, self._rounds = self._round_began, self._rounds, 0
        return pause
